"""The tokenizer against openai-whisper's and transformers', on the released vocabularies and small ones."""

import base64
import json
from itertools import chain, pairwise
from pathlib import Path

import pytest
import whisper
import whisper.tokenizer as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperTokenizer

from tests.text.test_tokenizer import MERGES, TIMES, Files, as_tokenizer_json, byte_characters, small_files
from whisper_nnx.text.languages import LANGUAGES, to_language_code
from whisper_nnx.text.tokenizer import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file.*tiktoken:ResourceWarning")  # openai-whisper's

# name -> the reference's arguments. "digits" are files of a checkpoint; those of the others are made of its own assets.
RELEASED = {
    "digits": {"multilingual": True, "num_languages": 99},
    "large-v3": {"multilingual": True, "num_languages": 100},
    "tiny.en": {"multilingual": False, "num_languages": 99},
}
# For transformers: only assigned characters (its tables are of another Unicode version than tiktoken's), and no special
# tokens' names (it takes them for these tokens).
ASSIGNED = st.text(st.characters(exclude_categories=["Cs", "Cn", "Co"])).filter(lambda text: "<|" not in text)
WORDS = st.lists(
    st.sampled_from(["don't", " they'LL", "  ", "\n", " 12", "日本語", " ♪♪", "-[", "é", "👩‍👩‍👧", " ("])
).map("".join)


@pytest.fixture(scope="module")
def ours(digits: Path) -> dict[str, Tokenizer]:
    made = {"large-v3": hf_files("multilingual", 100), "tiny.en": hf_files("gpt2", 99)}
    return {"digits": Tokenizer.from_folder(digits)} | {name: Tokenizer.from_files(f) for name, f in made.items()}


@pytest.fixture(scope="module")
def transformers_of_digits(digits: Path) -> WhisperTokenizer:
    return WhisperTokenizer.from_pretrained(digits)


def theirs(name: str, **options: str) -> reference.Tokenizer:
    return reference.get_tokenizer(**RELEASED[name], **options)


def hf_files(asset: str, languages: int) -> Files:
    """vocab.json, merges.txt, added_tokens.json as on the Hub, from one of openai-whisper's *.tiktoken files."""
    lines = (Path(whisper.__file__).parent / "assets" / f"{asset}.tiktoken").read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    byte_of_id = {rank: token[0] for token, rank in ranks.items() if len(token) == 1}
    character = {byte_of_id[i]: c for i, c in enumerate(byte_characters())}

    def write(token: bytes) -> str:
        return "".join(character[byte] for byte in token)

    merges = [merge_of(token, ranks) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    encoding = reference.get_encoding(asset, languages)
    return {
        "vocab.json": json.dumps({write(token): rank for token, rank in ranks.items()}).encode(),
        "merges.txt": "\n".join(f"{write(a)} {write(b)}" for a, b in merges).encode(),
        "added_tokens.json": json.dumps(encoding._special_tokens).encode(),
    }


def merge_of(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that merges of lower rank leave of a token."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    first, second = parts
    return first, second


# Ids


@pytest.mark.parametrize("name", RELEASED)
@settings(deadline=None)
@given(text=st.text(st.characters()) | WORDS)
def test_ids_equal_those_of_openai_whisper(name: str, text: str, ours: dict[str, Tokenizer]):
    assert ours[name].encode(text) == theirs(name).encode(text, disallowed_special=())


@settings(deadline=None)
@given(text=ASSIGNED | WORDS)
def test_ids_equal_those_of_transformers(
    text: str, ours: dict[str, Tokenizer], transformers_of_digits: WhisperTokenizer
):
    ids = transformers_of_digits.encode(text, add_special_tokens=False)
    assert ours["digits"].encode(text) == ids
    assert ours["digits"].decode(ids) == transformers_of_digits.decode(ids, clean_up_tokenization_spaces=False)


def thousand_merges(digits: Path) -> list[tuple[str, ...]]:
    return [tuple(line.split()) for line in (digits / "merges.txt").read_text().splitlines()[1:745]]


@pytest.mark.parametrize("kind", ["plain", "shuffled", "words added", "byte missing", "few merges"])
def test_ids_of_a_small_vocabulary_equal_those_of_transformers(kind: str, digits: Path, tmp_path: Path):
    merges = MERGES if kind == "few merges" else thousand_merges(digits)
    words = ["newword", "newwords", "<|noise|>"] if kind == "words added" else []
    without = "Ï" if kind == "byte missing" else ""  # no merge of these uses it
    files = small_files(merges=merges, words=words, shuffle=kind == "shuffled", without=without)
    files = as_tokenizer_json(files, ordinary=[*words[:2], *TIMES])
    content = json.loads(files["tokenizer.json"])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"] = [token | flags for token in content["added_tokens"]]
    content["model"]["type"] = "BPE"
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", **content}))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "WhisperTokenizer"}')
    their, our = WhisperTokenizer.from_pretrained(tmp_path), Tokenizer.from_folder(tmp_path)

    @settings(deadline=None)
    @given(text=ASSIGNED | WORDS | st.lists(st.sampled_from(["newword", "s", " ", "a", "πx"])).map("".join))
    def check(text: str):
        ids = their.encode(text, add_special_tokens=False)
        assert our.encode(text) == ids

    check()


def test_a_word_added_with_transformers_has_the_id_that_it_gave(tmp_path: Path, digits: Path):
    their = WhisperTokenizer.from_pretrained(digits)
    their.add_tokens(["newword", "newwords"])
    their.save_pretrained(tmp_path)
    our = Tokenizer.from_folder(tmp_path)
    text = "a newword, newwordsnewword"
    assert our.encode(text) == their.encode(text, add_special_tokens=False)
    assert our.special == Tokenizer.from_folder(digits).special


# Text


def ids_of(name: str) -> st.SearchStrategy[list[int]]:
    """Any ids, with many single bytes (broken UTF-8) and parts of characters among them."""
    encoding = theirs(name).encoding
    parts = encoding.encode("♪♫日本語é👩\ufffd ☃")
    return st.lists(st.integers(0, encoding.n_vocab - 1) | st.integers(0, 255) | st.sampled_from(parts))


@pytest.mark.parametrize("name", RELEASED)
@settings(deadline=None)
@given(data=st.data())
def test_text_equals_that_of_openai_whisper(name: str, data: st.DataObject, ours: dict[str, Tokenizer]):
    ids = data.draw(ids_of(name))
    assert ours[name].decode(ids) == theirs(name).decode(ids)
    assert ours[name].decode_with_timestamps(ids) == theirs(name).decode_with_timestamps(ids)
    assert ours[name].text_tokens(ids) == [i for i in ids if i < theirs(name).eot]


def words_of_reference(name: str, ids: list[int], language: str) -> tuple[list[str], list[list[int]]] | None:
    """None where it fails, or loses tokens or text, as it does where a broken character spans tokens."""
    tokenizer = theirs(name, language=language)
    try:
        words, tokens = tokenizer.split_to_word_tokens(ids)
    except IndexError:
        return None
    whole = list(chain(*tokens)) == ids and "".join(words) == tokenizer.decode_with_timestamps(ids)
    return (words, tokens) if whole else None


@pytest.mark.parametrize("language", ["en", "ja"])
@pytest.mark.parametrize("name", RELEASED)
@settings(deadline=None)
@given(data=st.data())
def test_words_equal_those_of_openai_whisper(name: str, language: str, data: st.DataObject, ours: dict[str, Tokenizer]):
    ids = data.draw(ids_of(name))
    expected = words_of_reference(name, ids, language)
    language = language if ours[name].is_multilingual else "en"
    assert expected in (None, ours[name].split_to_word_tokens(ids, language))


@pytest.mark.parametrize("language", ["en", "ja"])
@pytest.mark.parametrize("name", ["digits", "large-v3"])
@settings(deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_characters="\ufffd")) | WORDS, max_size=4))
def test_words_of_valid_text_equal_those_of_openai_whisper(
    name: str, language: str, texts: list[str], ours: dict[str, Tokenizer]
):
    our = ours[name]
    ids = [i for n, text in enumerate(texts) for i in (our.special.timestamp_begin + n, *our.encode(text))]
    assert our.split_to_word_tokens(ids, language) == words_of_reference(name, ids, language)


# What the ids mean


@pytest.mark.parametrize("name", RELEASED)
def test_special_tokens_equal_those_of_openai_whisper(name: str, ours: dict[str, Tokenizer]):
    our, their = ours[name], theirs(name)
    for field in ("eot", "sot", "transcribe", "translate", "sot_lm", "sot_prev", "no_speech", "no_timestamps"):
        assert getattr(our.special, field) == getattr(their, field), field
    assert our.special.timestamp_begin == their.timestamp_begin
    assert our.special.timestamp_end == their.encoding.n_vocab - 1 == our.vocab_size - 1
    assert dict(our.special.languages) == {code: their.to_language_token(code) for code in our.languages}
    assert our.languages == tuple(reference.LANGUAGES)[: their.num_languages]
    assert our.is_multilingual is RELEASED[name]["multilingual"]
    assert our.known_ids.all()
    assert our.non_speech_tokens == their.non_speech_tokens
    assert list(our.blank_tokens) == their.encode(" ")


@pytest.mark.parametrize("task", ["transcribe", "translate"])
@pytest.mark.parametrize("name", ["digits", "large-v3"])
def test_transcripts_start_as_those_of_openai_whisper(name: str, task: str, ours: dict[str, Tokenizer]):
    for language in ours[name].languages:
        their = theirs(name, language=language, task=task)
        assert ours[name].sot_sequence(language, task) == their.sot_sequence
        expected = their.sot_sequence_including_notimestamps
        assert ours[name].sot_sequence(language, task, timestamps=False) == expected


def test_english_transcripts_start_as_those_of_openai_whisper(ours: dict[str, Tokenizer]):
    assert ours["tiny.en"].sot_sequence() == theirs("tiny.en").sot_sequence


def test_merges_recovered_from_the_reference_are_those_of_the_checkpoint(digits: Path, ours: dict[str, Tokenizer]):
    lines = (digits / "merges.txt").read_text().splitlines()
    assert ours["large-v3"].files["merges.txt"].decode().splitlines() == lines[1:]


def test_languages_equal_those_of_openai_whisper():
    assert list(LANGUAGES.items()) == list(reference.LANGUAGES.items())
    for name, code in reference.TO_LANGUAGE_CODE.items():
        assert to_language_code(name) == code
