"""Tokenizer tests on the digits checkpoint's vocabulary and on small synthetic ones."""

import copy
import json
import pickle
import random
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_nnx.text.languages import LANGUAGES, to_language_code
from whisper_nnx.text.tokenizer import Tokenizer

Files = dict[str, bytes]

MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("-", "-"), ("Ġ", "["), ("Ã", "©"), ("a", "a"), ("aa", "a")]
NAMES = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|xyz|>", "<|translate|>", "<|transcribe|>"]
NAMES += ["<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
TIMES = [f"<|{i / 50:.2f}|>" for i in range(1501)]
FIELDS = ["eot", "sot", "en", "de", "xyz", "translate", "transcribe", "sot_lm", "sot_prev", "no_speech"]


def byte_characters() -> list[str]:
    """GPT-2's characters for the 256 bytes, in id order."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in visible] + [chr(256 + n) for n in range(256 - len(visible))]


def small_files(
    *,
    merges: Sequence[tuple[str, str]] = MERGES,
    names: Iterable[str] = (*NAMES, *TIMES),
    words: Iterable[str] = (),
    shuffle: bool = False,
    without: str = "",
) -> Files:
    """Three files with all bytes except `without`, merges, special tokens and added words."""
    tokens = [c for c in byte_characters() if c not in without] + [a + b for a, b in merges]
    ids = list(range(len(tokens)))
    if shuffle:
        random.Random(0).shuffle(ids)
    added = {name: len(tokens) + i for i, name in enumerate([*names, *words])}
    return {
        "vocab.json": json.dumps(dict(zip(tokens, ids, strict=True))).encode(),
        "merges.txt": "\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in merges), ""]).encode(),
        "added_tokens.json": json.dumps(added).encode(),
    }


def as_tokenizer_json(files: Files, *, pairs: bool = True, ordinary: Iterable[str] = ()) -> Files:
    """The same vocabulary as a single tokenizer.json; `ordinary` are added tokens that are not special."""
    merges = [line for line in files["merges.txt"].decode().split("\n")[1:] if line]
    added = json.loads(files["added_tokens.json"])
    split = [line.split(" ") for line in merges] if pairs else merges
    tokens = [{"id": i, "content": text, "special": text not in ordinary} for text, i in added.items()]
    content = {"model": {"vocab": json.loads(files["vocab.json"]), "merges": split}, "added_tokens": tokens}
    return {"tokenizer.json": json.dumps(content).encode()}


def make(vocab_size: int | None = None, **kind) -> Tokenizer:
    return Tokenizer.from_files(small_files(**kind), vocab_size)


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return make()


@pytest.fixture(scope="module")
def released(digits: Path) -> Tokenizer:
    return Tokenizer.from_folder(digits)


@settings(deadline=None)
@given(text=st.text())
def test_text_survives_encoding_and_decoding(text: str, small: Tokenizer, released: Tokenizer):
    for tokenizer in (small, released):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.text_tokens(ids) == ids


def test_merges_apply_by_precedence(small: Tokenizer):
    assert small.encode("the the") == [256 + 1, 256 + 2]
    assert small.encode("tthhé") == [83, 256, 71, 256 + 5]
    assert small.encode("aaaa") == [256 + 6, 256 + 6]


def test_special_tokens_names_in_text_are_text(small: Tokenizer, released: Tokenizer):
    for tokenizer in (small, released):
        for name in ("<|endoftext|>", "<|en|>", "<|0.00|>"):
            ids = tokenizer.encode(name)
            assert len(ids) > 1
            assert tokenizer.text_tokens(ids) == ids
            assert tokenizer.decode(ids) == name


def test_decoding_drops_timestamps_and_shows_other_special_tokens(small: Tokenizer):
    special = small.special
    ids = [special.sot, special.timestamp_begin, *small.encode("the é"), special.timestamp_begin + 54, special.eot]
    assert small.decode(ids) == "<|startoftranscript|>the é<|endoftext|>"
    assert small.decode_with_timestamps(ids) == "<|startoftranscript|><|0.00|>the é<|1.08|><|endoftext|>"
    assert small.text_tokens(ids) == small.encode("the é")


def test_invalid_utf8_becomes_the_replacement_character(small: Tokenizer):
    assert small.decode(small.encode("♪")[:2] + small.encode("a")) == "\ufffda"


def test_an_id_without_a_token_cannot_be_decoded(small: Tokenizer):
    for token in (-1, 100_000):
        with pytest.raises(ValueError, match=f"id {token} has no token"):
            small.decode([token])


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_tokenizer_json_equals_vocab_with_merges(pairs: bool, shuffle: bool):
    files = small_files(shuffle=shuffle)
    one, other = Tokenizer.from_files(files), Tokenizer.from_files(as_tokenizer_json(files, pairs=pairs))
    assert one.special == other.special
    assert one.encode("the [é] -- ♪") == other.encode("the [é] -- ♪")
    assert one.non_speech_tokens == other.non_speech_tokens
    assert (one.known_ids == other.known_ids).all()


def test_the_released_tokenizer_json_equals_vocab_with_merges(released: Tokenizer):
    split = Tokenizer.from_files({name: data for name, data in released.files.items() if name != "tokenizer.json"})
    for name in ("special", "non_speech_tokens", "vocab_size"):
        assert getattr(split, name) == getattr(released, name)
    everything = range(split.vocab_size)
    assert split.decode_with_timestamps(everything) == released.decode_with_timestamps(everything)
    assert split.text_tokens(everything) == released.text_tokens(everything)
    assert split != released


def test_special_tokens_may_be_in_the_vocabulary(small: Tokenizer):
    files = small_files()
    vocab = {**json.loads(files["vocab.json"]), **json.loads(files.pop("added_tokens.json"))}
    assert Tokenizer.from_files({**files, "vocab.json": json.dumps(vocab).encode()}).special == small.special


def test_special_tokens_may_be_in_the_tokenizer_config(small: Tokenizer):
    files = small_files(words=["new"])
    added = json.loads(files.pop("added_tokens.json"))
    decoder = {i: {"content": text, "special": text != "new"} for text, i in added.items()}
    files["tokenizer_config.json"] = json.dumps({"added_tokens_decoder": decoder}).encode()
    assert Tokenizer.from_files(files).special == small.special
    assert Tokenizer.from_files(files).encode("new") == [added["new"]]


def test_ids_need_not_be_in_merge_order(small: Tokenizer):
    shuffled = make(shuffle=True)
    text = "the [é] -- ♪ then aaaaa"
    assert [shuffled.decode([i]) for i in shuffled.encode(text)] == [small.decode([i]) for i in small.encode(text)]
    assert shuffled.decode(shuffled.encode(text)) == text
    marks = [{tokenizer.decode([i]) for i in tokenizer.non_speech_tokens} for tokenizer in (small, shuffled)]
    assert marks[0] == marks[1]


def test_bytes_without_a_token_are_dropped(small: Tokenizer):
    tokenizer = make(without="z")
    assert tokenizer.decode(tokenizer.encode("the zoo")) == "the oo"
    assert len(tokenizer.non_speech_tokens) == len(small.non_speech_tokens)


def test_files_are_kept_unchanged(digits: Path, released: Tokenizer):
    names = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json")
    assert released.files == {name: (digits / name).read_bytes() for name in names}
    assert Tokenizer.from_files(released.files).files == released.files


def _damage(name: str, data: bytes | None):
    files = small_files()
    files.pop(name) if data is None else files.update({name: data})
    return files


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({}, FileNotFoundError, "merges.txt and vocab.json missing, and no tokenizer.json"),
        (_damage("merges.txt", None), FileNotFoundError, "merges.txt missing"),
        (_damage("vocab.json", None), FileNotFoundError, "vocab.json missing"),
        (_damage("vocab.json", b'{"a": 1, "b'), ValueError, "vocab.json .*damaged"),
        (_damage("vocab.json", b"[]"), ValueError, "vocab.json .*damaged"),
        (_damage("vocab.json", b'{"a": 1}'), ValueError, "vocab.json with merges.txt .*damaged.*'th'"),
        (_damage("merges.txt", "Ġ t\nĠ".encode()), ValueError, "damaged"),
        (_damage("merges.txt", b"\xff\xfe"), ValueError, "merges.txt .*damaged"),
        (_damage("added_tokens.json", b"version https://git-lfs"), ValueError, "added_tokens.json .*damaged"),
        (_damage("added_tokens.json", None), ValueError, "files lack .*startoftranscript.*; take them"),
        (_damage("generation_config.json", b"{"), ValueError, "generation_config.json .*damaged"),
        ({"tokenizer.json": b"{}"}, ValueError, "tokenizer.json .*damaged"),
        ({"tokenizer.json": b'{"model": {"type": "Unigram", "vocab": []}}'}, ValueError, "is not Whisper's"),
    ],
)
def test_bad_files_are_rejected_in_one_line(files: Files, error: type[Exception], message: str, tmp_path: Path):
    with pytest.raises(error, match=message):
        Tokenizer.from_files(files)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(error, match=message) as raised:
        Tokenizer.from_folder(tmp_path)
    assert str(raised.value).startswith(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_special_ids_are_read(small: Tokenizer):
    first = 256 + len(MERGES)
    languages = dict(small.special.languages)
    assert [getattr(small.special, name, languages.get(name)) for name in FIELDS] == [first + i for i in range(10)]
    assert small.special.no_timestamps == first + 10
    assert (small.special.timestamp_begin, small.special.timestamp_end) == (first + 11, first + 11 + 1500)
    assert small.languages == ("en", "de", "xyz")


def test_special_ids_match_the_generation_config(digits: Path, released: Tokenizer):
    config = json.loads((digits / "generation_config.json").read_text())
    special = released.special
    assert {f"<|{code}|>": i for code, i in special.languages} == config["lang_to_id"]
    assert {"transcribe": special.transcribe, "translate": special.translate} == config["task_to_id"]
    assert (special.eot, special.sot) == (config["eos_token_id"], config["decoder_start_token_id"])
    assert special.no_timestamps == config["no_timestamps_token_id"]
    assert list(released.blank_tokens) == config["begin_suppress_tokens"][:1]
    assert set(released.non_speech_tokens) <= set(config["suppress_tokens"])


def test_special_tokens_of_older_vocabularies(small: Tokenizer):
    assert make(names=[*(name.replace("nospeech", "nocaptions") for name in NAMES), *TIMES]).special == small.special
    special = make(names=[name for name in NAMES if name not in ("<|nospeech|>", "<|startoflm|>")]).special
    assert special.no_speech is special.sot_lm is None


def test_unlisted_timestamps_follow_no_timestamps(small: Tokenizer):
    old = make(names=NAMES)
    assert old.special == small.special
    assert old.vocab_size == small.vocab_size
    assert old.known_ids.all()
    everything = range(old.vocab_size)
    assert old.decode_with_timestamps(everything) == small.decode_with_timestamps(everything)
    assert old.text_tokens(everything) == small.text_tokens(everything)


def test_unlisted_timestamps_end_at_the_vocabulary_or_an_added_token():
    files, begin = small_files(names=NAMES), 256 + len(MERGES) + len(NAMES)
    added = {**json.loads(files["added_tokens.json"]), "new": begin + 3}
    more = {**files, "added_tokens.json": json.dumps(added).encode()}
    for kind, size, end in ((files, begin, begin - 1), (files, begin + 5, begin + 4), (more, None, begin + 2)):
        special = Tokenizer.from_files(kind, size).special
        assert (special.timestamp_begin, special.timestamp_end) == (begin, end)
    assert Tokenizer.from_files(more).encode("new") == [begin + 3]


def test_timestamps_must_be_consecutive():
    for times in (["<|0.00|>", "new", "<|0.02|>"], ["<|0.02|>", "<|0.00|>"], ["<|0.02|>", "<|0.04|>"]):
        with pytest.raises(ValueError, match=r"timestamp ids.*are not consecutive"):
            make(names=[*NAMES, *times])


@pytest.mark.parametrize("single", [True, False])
def test_tokens_added_after_the_timestamps_are_not_timestamps(single: bool, small: Tokenizer):
    files = small_files(words=["new", "newer", "<|noise|>"])
    new, newer, noise = range(small.vocab_size, small.vocab_size + 3)
    tokenizer = Tokenizer.from_files(as_tokenizer_json(files, ordinary=["new", "newer"]) if single else files)
    assert tokenizer.special == small.special
    assert not any(map(tokenizer.is_timestamp, (new, newer, noise)))
    assert tokenizer.encode("newerthenew") == [newer, *tokenizer.encode("the"), new]
    assert tokenizer.decode([new, noise, newer]) == "new<|noise|>newer"
    assert tokenizer.text_tokens([new, noise, newer]) == [new, newer]
    assert len(tokenizer.encode("<|noise|>")) > 1


def test_language_tokens_are_known_codes_or_among_the_language_ids():
    assert make(words=["<|yue|>", "<|abc|>"]).languages == ("en", "de", "xyz", "yue")


def test_ids_without_a_token_are_known(small: Tokenizer):
    padded = make(vocab_size=small.vocab_size + 7)
    assert padded.known_ids.shape == (small.vocab_size + 7,)
    assert padded.known_ids.sum() == small.vocab_size
    assert not padded.known_ids[-7:].any()


def test_a_model_smaller_than_its_tokenizer_is_rejected(small: Tokenizer):
    with pytest.raises(ValueError, match=r"ids up to \d+, but the model has .*; take both from the same"):
        make(vocab_size=small.vocab_size - 1)
    extended = make(small.vocab_size, words=["new"])
    assert extended.encode("new") == small.encode("new")


@pytest.mark.parametrize(
    ("names", "config", "vocab_size", "multilingual"),
    [
        (NAMES, b"{}", None, True),
        (NAMES, b'{"is_multilingual": false}', None, False),
        (NAMES, b"{}", 51864, False),
        (NAMES, b'{"is_multilingual": true}', 51864, True),
        ([n for n in NAMES if n not in ("<|en|>", "<|de|>", "<|xyz|>")], b"{}", None, False),
    ],
)
def test_is_multilingual(names: list[str], config: bytes, vocab_size: int | None, multilingual: bool):
    files = small_files(names=[*names, *TIMES]) | {"generation_config.json": config}
    assert Tokenizer.from_files(files, vocab_size).is_multilingual is multilingual


def test_non_speech_tokens_exclude_ordinary_text(small: Tokenizer):
    marks = [small.decode([i]) for i in small.non_speech_tokens]
    assert set(marks) == {*'"#()*+/:;<=>@[\\]^_`{|}~', "--", " ["}
    assert set(small.encode("' - ♪ … “a”")).isdisjoint(small.non_speech_tokens)


def test_a_transcript_starts_with_language_and_task(small: Tokenizer):
    s, ids = small.special, dict(small.special.languages)
    assert small.sot_sequence() == (s.sot, ids["en"], s.transcribe)
    assert small.sot_sequence("xyz") == (s.sot, ids["xyz"], s.transcribe)
    quiet = small.sot_sequence("German", "translate", timestamps=False)
    assert quiet == (s.sot, ids["de"], s.translate, s.no_timestamps)


def test_an_english_transcript_starts_without_language_and_task():
    tokenizer = Tokenizer.from_files(small_files() | {"generation_config.json": b'{"is_multilingual": false}'})
    s = tokenizer.special
    assert tokenizer.sot_sequence() == tokenizer.sot_sequence("en", "transcribe") == (s.sot,)
    assert tokenizer.sot_sequence(timestamps=False) == (s.sot, s.no_timestamps)
    for language, task in (("de", None), (None, "translate")):
        with pytest.raises(ValueError, match="only transcribes English"):
            tokenizer.sot_sequence(language, task)


@pytest.mark.parametrize(
    ("language", "task", "message"),
    [
        ("germn", None, "'germn' is unknown to Whisper; did you mean 'german'"),
        ("qqqq", None, "'qqqq' is unknown to Whisper; give a code such as 'en'"),
        ("fr", None, "'fr' is not in this checkpoint, which has en, de, xyz"),
        ("en", "transcibe", "task 'transcibe' is unknown; choose 'transcribe' or 'translate'"),
    ],
)
def test_unsupported_languages_and_tasks_are_rejected(language: str, task: str | None, message: str, small: Tokenizer):
    with pytest.raises(ValueError, match=message):
        small.sot_sequence(language, task)


@settings(deadline=None)
@given(data=st.data())
def test_words_hold_the_whole_text_and_all_tokens(data: st.DataObject, small: Tokenizer):
    ids = data.draw(st.lists(st.integers(0, 300) | st.sampled_from(small.encode("♪é😀 "))))
    for language in (None, "en", "ja"):
        words, groups = small.split_to_word_tokens(ids, language)
        assert "".join(words) == small.decode_with_timestamps(ids)
        assert [i for group in groups for i in group] == ids
        assert [small.decode_with_timestamps(group) for group in groups] == words


def test_words_start_with_a_space_punctuation_or_a_special_token(small: Tokenizer):
    ids = [*small.encode("then, the café"), small.special.timestamp_begin, *small.encode("é")]
    assert small.split_to_word_tokens(ids, "en")[0] == ["then", ",", " the", " café", "<|0.00|>é"]
    assert small.split_to_word_tokens(small.encode("日本 é"), "ja")[0] == ["日", "本", " ", "é"]


def test_equal_files_make_equal_tokenizers(small: Tokenizer):
    same = Tokenizer.from_files(dict(reversed(small_files().items())))
    for twin in (same, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert twin == small
        assert hash(twin) == hash(small)
        assert twin.encode("the [é]") == small.encode("the [é]")
    assert small not in (make(shuffle=True), make(vocab_size=2000), "a tokenizer")


def test_jit_compiles_once_for_equal_tokenizers(small: Tokenizer):
    traced = []

    def is_end(tokenizer: Tokenizer, token: jax.Array) -> jax.Array:
        traced.append(tokenizer)
        return token == tokenizer.special.eot

    compiled = jax.jit(is_end, static_argnums=0)
    assert compiled(small, small.special.eot)
    assert compiled(make(), small.special.eot)
    assert len(traced) == 1


def test_importing_the_tokenizer_is_light():
    heavy = ["jax", "torch", "numpy", "tiktoken", "transformers"]
    code = f"import sys, whisper_nnx.text.tokenizer; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_languages_are_found_by_code_name_and_alias_in_any_case():
    assert len(LANGUAGES) == 100
    for code, name in LANGUAGES.items():
        assert to_language_code(code.upper()) == to_language_code(name.title()) == code
    assert to_language_code(" Castilian ") == "es"
