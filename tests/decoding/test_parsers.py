"""Decoding with grammars that are not regular: only their texts come out, in any company; parsed on the host."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.decoding.test_grammar import GERMAN, ROWS, STRATEGIES, noise
from tests.small import quick_compilation, small_mel, small_model  # noqa: F401
from whisper_nnx import DecodingOptions, keep_programs, transcribe, warmup
from whisper_nnx.grammar.expressions import Sequence, literal, optional
from whisper_nnx.grammar.grammar import Grammar
from whisper_nnx.grammar.lark import lark_of_rules
from whisper_nnx.grammar.regex import read_regex
from whisper_nnx.transcription import grammars
from whisper_nnx.transcription.windows import decode, decode_windows, encode_windows

BRACKETS = 'root ::= " "? (pair | "one")\npair ::= "(" root ")" | "[" (root ",")? root "]" '
OTHER = 'root ::= " a" root? "n" | " a"'
LEVELS = 'root ::= "(" root ")" | "(((((((a)))))))"'  # of at least seven
MOST = 24  # tokens of a window


@pytest.fixture(scope="module")
def model():
    return small_model(decoder_layers=1)


@pytest.fixture(scope="module")
def encoded(model):
    return encode_windows(model, small_mel(ROWS))


def is_of_brackets(text: str) -> bool:
    """Whether it is a text of `BRACKETS`: what is innermost is replaced until nothing is left."""
    before, text = None, text.replace("one", "x")
    while text != before:
        before, text = text, re.sub(r" ?(\( ?x\)|\[( ?x,)? ?x\])", "x", text)
    return text.strip() == "x"


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_only_texts_of_the_grammar_come_out(model, strategy):
    found = []
    for seed in range(5):
        options = replace(GERMAN, grammar=BRACKETS, **strategy)
        found += decode(model, small_mel(ROWS, seed=seed), options, seed=seed)
    whole = [r.text for r in found if len(r.tokens) < min(MOST, strategy.get("max_new_tokens", MOST))]
    assert all(map(is_of_brackets, whole))
    assert len(set(whole)) > 1
    for r in found:  # one that is cut off is the beginning of such a text
        assert re.fullmatch(r"[\[\](), one]*", r.text)
        assert -np.inf < r.avg_logprob <= 0


def test_texts_are_nested_as_deep_as_the_grammar_says(model, encoded):
    options = replace(GERMAN, grammar=LEVELS, max_new_tokens=40)
    found = [r.text for r in decode_windows(model, encoded, [options] * ROWS, range(ROWS))]
    assert all(text == "(" * (len(text) // 2) + "a" + ")" * (len(text) // 2) for text in found)
    assert all(len(text) >= 15 for text in found)


def test_a_text_that_does_not_end_in_time_is_cut_off(model, encoded):
    options = replace(GERMAN, grammar=LEVELS, max_new_tokens=12)
    for r in decode_windows(model, encoded, [options] * ROWS, range(ROWS)):
        assert re.fullmatch(r"\({7,}a?\)*", r.text)
        assert len(r.tokens) == 12


def as_parser(grammar: Grammar):
    """For `automaton_of`: a regular expression as a grammar that is not regular."""
    return lark_of_rules({"root": Sequence((optional(literal(" ")), read_regex(str(grammar.text))))}, "root")


@pytest.mark.parametrize(
    ("strategy", "penalty"),
    [
        *((strategy, None) for strategy in STRATEGIES),
        (STRATEGIES[0], 2.0),
        *(pytest.param(strategy, 2.0, marks=pytest.mark.slow) for strategy in STRATEGIES[1:]),
    ],
    ids=str,
)
def test_a_regular_grammar_gives_the_same_either_way(model, encoded, strategy, penalty, monkeypatch):
    patterns = [" ?(a|the one|two)", " ?[^ a-z]{2,3}", " ?(the |one ){1,3}and", " (é|☃|a){1,4}"]
    rest = {**strategy, "grammar_penalty": penalty, "max_new_tokens": 40}  # room for any of these texts
    options = [replace(GERMAN, regex=pattern, **rest) for pattern in patterns]
    expected = decode_windows(model, encoded, options, range(ROWS))
    monkeypatch.setattr(grammars, "automaton_of", as_parser)
    grammars._over_tokens.cache_clear()
    found = decode_windows(model, encoded, options, range(ROWS))
    grammars._over_tokens.cache_clear()
    assert grammars.grammar_program(model.tokenizer, model.config.vocab_size, options[0]) == (0,)
    grammars._over_tokens.cache_clear()
    assert [r.tokens for r in found] == [r.tokens for r in expected]
    np.testing.assert_allclose([r.avg_logprob for r in found], [r.avg_logprob for r in expected], atol=1e-5)


MIXED = [
    replace(GERMAN, grammar=BRACKETS),
    replace(GERMAN, choices=("one", "two and one")),
    replace(GERMAN, grammar=OTHER),
    replace(GERMAN, grammar=BRACKETS, grammar_penalty=3.0),
]


@pytest.mark.parametrize("strategy", [{}, pytest.param({"beam_size": 3}, marks=pytest.mark.slow)], ids=str)
def test_rows_with_grammars_of_their_own_equal_those_alone(model, encoded, strategy):
    options = [replace(o, **strategy) for o in MIXED]
    together = decode_windows(model, encoded, options, range(ROWS))
    for row, o in enumerate(options):
        alone = decode_windows(model, encoded, [o if i == row else None for i in range(ROWS)], range(ROWS))[row]
        assert (alone.tokens, alone.avg_logprob) == (together[row].tokens, pytest.approx(together[row].avg_logprob))


TRANSCRIBED: dict[str, Any] = {"language": "de", "no_speech_threshold": None, "temperature": 0.0}
RETRIED = {**TRANSCRIBED, "temperature": (0.0, 0.8), "best_of": 2, "logprob_threshold": -0.45}
RECORDINGS = [noise(s, seed) for seed, s in enumerate((2.5, 0.8, 3.2))]


@pytest.mark.parametrize(
    "options",
    [RETRIED, pytest.param({**TRANSCRIBED, "draft": "ngram"}, marks=pytest.mark.slow)],
    ids=["retries", "draft"],
)
def test_batched_equals_sequential(model, options):
    one_by_one = [transcribe(model, audio, grammar=BRACKETS, **options) for audio in RECORDINGS]
    together = transcribe(model, RECORDINGS, batch_size=2, grammar=BRACKETS, **options)
    assert [result["text"] for result in together] == [result["text"] for result in one_by_one]
    if "draft" in options:
        plain = transcribe(model, RECORDINGS, batch_size=2, grammar=BRACKETS, **TRANSCRIBED)
        assert [result["text"] for result in together] == [result["text"] for result in plain]
    temperatures = {segment["temperature"] for result in together for segment in result["segments"]}
    assert len(temperatures) == (2 if options is RETRIED else 1)


def test_another_grammar_compiles_nothing(model, compilations):
    options = {"language": "de", "temperature": 0.0}
    warmup(model, (1, 2), grammar=BRACKETS, **options)
    compilations.clear()
    for grammar in (OTHER, LEVELS):
        transcribe(model, noise(2.5), grammar=grammar, **options)
        transcribe(model, [noise(3.2), noise(0.7)], batch_size=2, grammar=grammar, **options)
    assert compilations == []


def test_programs_that_ask_the_host_are_not_stored(model, tmp_path):
    plain = transcribe(model, RECORDINGS[0], grammar=BRACKETS, **TRANSCRIBED)
    keep_programs(tmp_path)
    try:
        kept = transcribe(model, RECORDINGS[0], grammar=BRACKETS, **TRANSCRIBED)
        assert not list(tmp_path.glob("generate-*"))
        transcribe(model, RECORDINGS[0], choices=["one"], **TRANSCRIBED)
        assert list(tmp_path.glob("generate-*"))
    finally:
        keep_programs(None)
    assert kept["text"] == plain["text"]


def test_a_prefix_is_the_beginning_of_the_text(model, encoded):
    options = replace(GERMAN, grammar=LEVELS, prefix=tuple(model.tokenizer.encode("(" * 9 + "a")))
    for r in decode_windows(model, encoded, [options] * ROWS, range(ROWS)):
        assert r.text == ")" * 9
    with pytest.raises(ValueError, match=r"prefix='a' is not the beginning of a text of grammar='root.*; drop it"):
        decode(model, small_mel(1), GERMAN, grammar=LEVELS, prefix="a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suppress_regex": r" ?[(]"}, r"grammar='root.*': cannot be written with the tokens that are not suppressed"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size=2 may leave grammar no next token"),
        ({"grammar": 'root ::= "(" root ")"'}, "grammar=.*: matches no text; correct it"),
    ],
    ids=str,
)
def test_what_cannot_be_met_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        decode(model, small_mel(1), GERMAN, **{"grammar": LEVELS, **options})


def test_options_are_validated_by_llguidance():
    assert DecodingOptions(json_schema={"type": "array", "items": {"$ref": "#"}}).constraint
    with pytest.raises(ValueError, match=r"json_schema=.*: cannot be used: .*Unimplemented keys"):
        DecodingOptions(json_schema={"type": "array", "items": {"$ref": "#"}, "uniqueItems": True})
