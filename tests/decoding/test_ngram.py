"""N-gram models from ARPA files: against kenlm, against plain Python, and decoding with them."""

import gzip
import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.oracle import ROWS
from tests.small import (  # noqa: F401
    quick_compilation,
    small_mel,
    small_model,
    small_tokenizer,
    small_tokenizer_files,
)
from whisper_nnx import NgramModel, keep_programs, load_audio, load_model, transcribe
from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.runtime.programs import Program
from whisper_nnx.transcription.language_models import window_with_lm
from whisper_nnx.transcription.windows import decode, decode_windows, encode_windows

FOLDER = Path(__file__).parent / "ngram"
ARPA = FOLDER / "ids.arpa"  # over ids of the small vocabulary, order 4; some lower-order n-grams are pruned
TOKENIZER = small_tokenizer()
V = TOKENIZER.vocab_size
TEXT = TOKENIZER.text_tokens(range(V))
NAMES = {str(i): name for name, i in json.loads(small_tokenizer_files()["vocab.json"]).items()}
GERMAN = DecodingOptions(language="de")

predict = jax.jit(lambda model, tokens: model(tokens))


def logprobs(model: NgramModel, histories) -> np.ndarray:
    """Of all tokens [histories,V], after these."""
    tokens = np.full((len(histories), 64), -1, np.int32)
    for row, ids in zip(tokens, histories, strict=True):
        row[len(row) - len(ids) :] = ids
    return np.asarray(predict(model, tokens))


def test_log_probabilities_are_kenlms():
    """By kenlm 0.3.0: `Model.BaseScore` after `BeginSentenceWrite`, in natural logarithms."""
    stored = json.loads((FOLDER / "kenlm.json").read_text())
    found = logprobs(NgramModel.from_arpa(ARPA, TOKENIZER), [one["history"] for one in stored["logprobs"]])
    expected = [one["values"] for one in stored["logprobs"]]
    np.testing.assert_allclose(found[:, stored["tokens"]], expected, rtol=0, atol=1e-5)


# Random models, against the definition.

START, UNKNOWN = "<s>", "<unk>"


def random_model(seed: int, order: int, count: int, has_unknown: bool) -> dict[tuple[str, ...], tuple[float, float]]:
    """n-gram -> logarithms, to base 10, of its probability and its backoff weight."""
    rng = np.random.default_rng(seed)
    words = [*map(str, rng.choice(TEXT, 30, replace=False)), *[UNKNOWN] * has_unknown]
    ngrams = [(word,) for word in (START, "</s>", *words)]
    for n in range(2, order + 1):
        contexts = [one for one in ngrams if len(one) == n - 1 and one[-1] != "</s>"]
        picked = {(*contexts[rng.integers(len(contexts))], str(rng.choice([*words, "</s>"]))) for _ in range(count)}
        ngrams += sorted(picked)
    return {one: (-4 * rng.random(), -rng.random() * (rng.random() < 0.8)) for one in ngrams}


def arpa(model: dict[tuple[str, ...], tuple[float, float]], order: int, name=lambda word: word) -> str:
    parts = ["\\data\\\n"]
    of_length = {n: [one for one in model if len(one) == n] for n in range(1, order + 1)}
    parts += [f"ngram {n}={len(some)}\n" for n, some in of_length.items()]
    for n, some in of_length.items():
        parts.append(f"\n\\{n}-grams:\n")
        for one in some:
            logprob, backoff = model[one]
            words = " ".join(map(name, one))
            parts.append(f"{logprob:.7f}\t{words}\t{backoff:.7f}\n" if n < order else f"{logprob:.7f}\t{words}\n")
    return "".join([*parts, "\n\\end\\\n"])


def plain_logprob(model: dict[tuple[str, ...], tuple[float, float]], context: tuple[str, ...], word: str) -> float:
    if (*context, word) in model:
        return model[*context, word][0]
    if not context:
        return -100.0  # <unk> of a model without it
    return model.get(context, (0.0, 0.0))[1] + plain_logprob(model, context[1:], word)


@pytest.mark.parametrize(
    ("order", "count", "has_unknown"), [(1, 0, True), (2, 0, True), (2, 300, False), (3, 400, True), (5, 600, True)]
)
def test_log_probabilities_are_those_of_the_definition(tmp_path, order, count, has_unknown):
    model = random_model(order, order, count, has_unknown)
    file = tmp_path / "model.arpa"
    file.write_text(arpa(model, order))
    rng = np.random.default_rng(0)
    known = [int(word) for (word, *more) in model if not more and word.isdigit()]
    histories = [rng.choice([*known, *known, *TEXT], length).tolist() for length in (0, 1, 2, 3, 5, 9, 64, 64)]
    histories += [[int(word) for word in one] for one in model if all(map(str.isdigit, one))][-10:]
    found = logprobs(NgramModel.from_arpa(file, TOKENIZER), histories)

    def word(token: int) -> str:
        return str(token) if token in known else UNKNOWN

    for row, history in zip(found, histories, strict=True):
        context = (*[START] * (len(history) < 64), *map(word, history))[-(order - 1) :] if order > 1 else ()
        expected = [np.log(10) * plain_logprob(model, context, word(token)) for token in TEXT]
        np.testing.assert_allclose(row[TEXT], expected, rtol=2e-7, atol=1e-5)


def test_tokens_by_name_and_compressed_files_are_the_same_model(tmp_path):
    lines = ARPA.read_text().splitlines()
    named = [re.sub(r"(?<=[\t ])\d+(?=[\t ]|$)", lambda match: NAMES[match[0]], line) for line in lines]
    (tmp_path / "names.arpa").write_text("\n".join(named), encoding="utf-8")
    (tmp_path / "ids.arpa.gz").write_bytes(gzip.compress(ARPA.read_bytes()))
    expected = NgramModel.from_arpa(ARPA, TOKENIZER)
    for name in ("names.arpa", "ids.arpa.gz"):
        found = NgramModel.from_arpa(tmp_path / name, TOKENIZER)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


GOOD = ARPA.read_text()
BAD = {
    "empty": ("", "is not an ARPA file: it has no line"),
    "audio": ("RIFF\0\0\0\0WAVE" * 99, "is not an ARPA file"),
    "binary": (
        "mmap lm http://kheafield.com/code format version 5\n\0",
        "is KenLM's binary format; give the ARPA file",
    ),
    "truncated": (GOOD[:3000], "not a 3-gram|is truncated, copy it again"),
    "no end": (GOOD.replace("\\end\\\n", ""), "ends after line .*is truncated, copy it again"),
    "too few": (GOOD.replace("ngram 2=72", "ngram 2=73"), "there are fewer than 73 2-grams"),
    "too many": (GOOD.replace("ngram 2=72", "ngram 2=71"), r"in place of '\\\\3-grams:'; the counts do not match"),
    "counts": (GOOD.replace("ngram 2=72", "ngram 2=many"), "'ngram 2=many' in place of 'ngram 2=COUNT'"),
    "huge": (GOOD.replace("ngram 2=72", "ngram 2=99999999"), "at most 20000000 .* are read .lmplz --prune"),
    "number": (GOOD.replace("-0.840020\t130 259", "x\t130 259"), "'x 130 259 .*' has something else than numbers"),
    "infinite": (
        GOOD.replace("-0.840020\t130 259", "nan\t130 259"),
        "a 2-gram before line .* above 0 or not finite",
    ),
    "positive": (
        GOOD.replace("-0.840020\t130 259", "0.84\t130 259"),
        "a 2-gram before line .* above 0 or not finite",
    ),
    "twice": (GOOD.replace("\t130 262\t", "\t130 259\t"), "an n-gram occurs twice"),
    "not a 1-gram": (GOOD.replace("\t130 259\t", "\t130 258\t"), "'258' is not among the 1-grams"),
    "special": (re.sub(r"\b68\b", str(TOKENIZER.special.eot), GOOD), "is not a text token of this model; its"),
    "beyond": (re.sub(r"\b68\b", "99999", GOOD), "'99999' is not a text token of this model"),
    "words": (re.sub(r"\b68\b", "grimmelshausen", GOOD), "is a model of words; read it with WordNgramModel"),
    "1-gram twice": (re.sub(r"\b68\b", "259", GOOD), "a 1-gram occurs twice"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(tmp_path, content, message):
    file = tmp_path / "model.arpa"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(file))}.*({message})") as error:
        NgramModel.from_arpa(file, TOKENIZER)
    assert "\n" not in str(error.value)


def test_a_damaged_archive_and_a_folder_are_refused(tmp_path):
    packed = gzip.compress(ARPA.read_bytes())
    for content in (packed[:500], b"text", packed[:300] + b"\0" * 50 + packed[350:]):
        file = tmp_path / "model.arpa.gz"
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.arpa\.gz( is damaged: .*; copy it again|.*line)"):
            NgramModel.from_arpa(file, TOKENIZER)
    with pytest.raises(ValueError, match="is not a regular file"):
        NgramModel.from_arpa(tmp_path, TOKENIZER)


# Decoding with them.


@pytest.fixture(scope="module")
def model():
    return small_model(decoder_layers=1)


@pytest.fixture(scope="module")
def encoded(model):
    return encode_windows(model, small_mel(ROWS))


@pytest.fixture
def files(tmp_path):
    """Two models of different lengths."""
    found = []
    for seed in (1, 2):
        found.append(str(tmp_path / f"{seed}.arpa"))
        Path(found[-1]).write_text(arpa(random_model(seed, 3, 100 * seed, True), 3))
    return found


def test_decoding_with_a_file_is_decoding_with_its_model_as_a_function(model, files):
    read, mel = NgramModel.from_arpa(files[0], TOKENIZER), small_mel(ROWS)
    options = replace(GERMAN, beam_size=2, lm_weight=0.5)
    found = [one.tokens for one in decode(model, mel, options, lm=files[0])]
    assert found == [one.tokens for one in decode(model, mel, options, lm=lambda tokens: read(tokens))]


def test_another_model_of_the_same_size_compiles_nothing(model, encoded, files, compilations):
    def run(file):
        options = window_with_lm(TOKENIZER, replace(GERMAN, beam_size=2, lm=file, lm_weight=1.0))
        return [r.tokens for r in decode_windows(model, encoded, [options] * ROWS, range(ROWS))]

    first = run(files[0])
    compilations.clear()
    assert run(files[1]) != first
    assert compilations == []


@pytest.mark.parametrize("beam_size", [None, 2])
def test_recordings_with_files_of_their_own_are_the_same_in_any_company(model, files, beam_size):
    noise = np.random.default_rng(0).normal(0, 0.1, (4, 16_000)).astype(np.float32)
    options = {"language": "de", "temperature": 0.0, "no_speech_threshold": None, "lm_weight": 2.0}
    options["beam_size"] = beam_size
    lms = [files[0], files[1], files[0], files[0]]
    sources = [{"audio": audio, "lm": lm} for audio, lm in zip(noise, lms, strict=True)]
    together = [one["text"] for one in transcribe(model, sources, batch_size=3, **options)]
    assert together == [transcribe(model, source, **options)["text"] for source in sources]


def test_kept_programs_take_any_model_of_the_same_size(model, files, tmp_path, monkeypatch):
    noise, traced, made = np.random.default_rng(0).normal(0, 0.1, (2, 9000)).astype(np.float32), [], Program.exported
    monkeypatch.setattr(Program, "exported", lambda self, *a: traced.append(self.__name__) or made(self, *a))
    options = {"language": "de", "temperature": 0.0, "lm_weight": 2.0, "sample_len": 8, "batch_size": 2}
    expected = [transcribe(model, [*noise], lm=file, **options) for file in files]
    (tmp_path / "programs").mkdir(mode=0o700)
    keep_programs(tmp_path / "programs")
    try:
        assert transcribe(model, [*noise], lm=files[0], **options) == expected[0]
        assert {"begin", "advance"} <= set(traced)
        traced.clear()
        assert transcribe(model, [*noise], lm=files[1], **options) == expected[1]
        assert traced == []
    finally:
        keep_programs(None)


def test_a_file_that_cannot_be_used_is_an_error_before_any_recording(model, tmp_path):
    (tmp_path / "model.arpa").write_text("no model")
    with pytest.raises(ValueError, match="is not an ARPA file"):
        transcribe(model, [np.zeros(8000, np.float32)] * 2, lm=tmp_path / "model.arpa")


@pytest.mark.real
def test_a_real_recording_is_written_as_the_domain_writes(real_tiny_en, real_speech, tmp_path):
    model = load_model(real_tiny_en)
    words = [
        *map(str, model.tokenizer.encode(" When forty thousand brothers could not with all their quantity of love"))
    ]
    ngrams = {(word,): (-2.0, -0.3) for word in (START, "</s>", *words)} | {(UNKNOWN,): (-4.0, 0.0)}
    (tmp_path / "hamlet.arpa").write_text(arpa(ngrams | dict.fromkeys(pairwise(words), (-0.5, 0.0)), 2))
    audio, options = load_audio(real_speech("en_sonnet_53s.mp3"))[: 8 * 16_000], {"temperature": 0.0}
    assert "40 winters" in transcribe(model, audio, **options)["text"]
    assert "forty winters" in transcribe(model, audio, lm=tmp_path / "hamlet.arpa", lm_weight=0.3, **options)["text"]
