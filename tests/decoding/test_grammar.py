"""Decoding with grammars: only their texts come out, in any company, and a new one compiles nothing."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.small import quick_compilation, small_mel, small_model, small_tokenizer  # noqa: F401
from whisper_nnx import DecodingOptions, transcribe, warmup
from whisper_nnx.transcription.windows import decode, decode_windows, encode_windows

ROWS = 4
GERMAN = DecodingOptions(language="de")
STRATEGIES: list[dict[str, Any]] = [
    {},
    {"beam_size": 3, "patience": 2.0, "max_new_tokens": 20},
    {"temperature": 1.0, "best_of": 2, "without_timestamps": True},
]


@pytest.fixture(scope="module")
def model():
    return small_model(decoder_layers=1)


@pytest.fixture(scope="module")
def encoded(model):
    return encode_windows(model, small_mel(ROWS))


texts = st.lists(st.text("ab .é☃0", min_size=1, max_size=8).map(str.strip).filter(bool), min_size=1, max_size=12)


def only_listed(model, choices, seed, strategy, windows=ROWS) -> None:
    options = replace(GERMAN, choices=choices, **strategy)
    for result in decode(model, small_mel(windows, seed=seed), options, seed=seed):
        assert result.text in choices
        assert -np.inf < result.avg_logprob <= 0


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_only_listed_texts_come_out(model, strategy):
    @settings(deadline=None, max_examples=6)
    @given(texts, st.integers(0, 10**6))
    def check(choices, seed):
        only_listed(model, choices, seed, strategy)

    check()


@pytest.mark.slow
def test_only_listed_texts_come_out_of_ten_thousand_windows(model):
    @settings(deadline=None, max_examples=200)
    @given(texts, st.integers(0, 10**6), st.sampled_from(STRATEGIES))
    def check(choices, seed, strategy):
        only_listed(model, choices, seed, strategy, windows=50)

    check()


ENDLESS = r"(one|two)( and (one|two))*!"


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_a_text_without_limit_ends_within_its_window(model, encoded, strategy):
    options = [replace(GERMAN, regex=ENDLESS, **{**strategy, "max_new_tokens": most}) for most in (5, 8, 20, None)]
    for result in decode_windows(model, encoded, options, range(ROWS)):
        assert re.fullmatch(ENDLESS, result.text)


MIXED = [
    replace(GERMAN, choices=("one", "two and one")),
    GERMAN,
    replace(GERMAN, grammar='root ::= " a"\nother ::= " the " ("one" | "two")+ "."', grammar_rule="other"),
    replace(GERMAN, regex="(a|b){2,5}", grammar_penalty=3.0),
]


def test_rows_with_grammars_of_their_own_equal_those_alone(model, encoded):
    options = [replace(o, beam_size=3) for o in MIXED]
    together = decode_windows(model, encoded, options, range(ROWS))
    for row, o in enumerate(options):
        alone = decode_windows(model, encoded, [o if i == row else None for i in range(ROWS)], range(ROWS))[row]
        assert (alone.tokens, alone.avg_logprob) == (together[row].tokens, pytest.approx(together[row].avg_logprob))


def noise(seconds: float, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, int(seconds * 16_000)).astype(np.float32)


def test_batched_equals_sequential_and_each_window_begins_the_grammar_anew(model):
    recordings = [noise(s, seed) for seed, s in enumerate((2.5, 0.8, 3.2))]
    options = {"regex": ENDLESS, "language": "de", "no_speech_threshold": None, "temperature": 0.0}
    one_by_one = [transcribe(model, audio, **options) for audio in recordings]
    together = transcribe(model, recordings, batch_size=2, **options)
    assert [result["text"] for result in together] == [result["text"] for result in one_by_one]
    for result in one_by_one:
        assert re.fullmatch(rf"( ?{ENDLESS})+", result["text"])
        assert result["text"].count("!") == len({segment["seek"] for segment in result["segments"]})


def test_a_penalty_softens_and_a_great_one_forbids_text(model, encoded):
    free = replace(GERMAN, suppress_tokens=(), suppress_blank=False)
    plain = [r.tokens for r in decode_windows(model, encoded, [free] * ROWS, range(ROWS))]
    results = {}
    for penalty in (1e-6, 1e4):
        options = replace(free, regex="[ab]+", grammar_penalty=penalty)
        results[penalty] = decode_windows(model, encoded, [options] * ROWS, range(ROWS))
    assert [r.tokens for r in results[1e-6]] == plain
    assert all(re.fullmatch("[ab]*", r.text) for r in results[1e4])
    assert any(not re.fullmatch("[ab]*", r.text) for r in results[1e-6])


def test_symbols_that_the_grammar_has_may_be_written(model, encoded):
    options = replace(GERMAN, json_schema={"type": "object", "properties": {"on": {"type": "boolean"}}})
    for result in decode_windows(model, encoded, [options] * ROWS, range(ROWS)):
        assert re.fullmatch(r'\{ ?("on" ?: ?(true|false) ?)?\}', result.text)


def test_a_prefix_is_the_beginning_of_the_text(model, encoded):
    options = replace(GERMAN, choices=("one and one", "two"), prefix="one")
    for result in decode_windows(model, encoded, [options] * ROWS, range(ROWS)):
        assert result.text == "and one"
    with pytest.raises(ValueError, match="prefix='the' is not the beginning of a text of choices='one,two'; drop it"):
        decode(model, small_mel(1), GERMAN, choices=["one", "two"], prefix="the")


LETTERS = "a b c d e f g h i j k l m n o p q r s t u v w"
CONTEXT, PROMPT = 48, tuple(range(60, 83))  # as many tokens of previous text as there may be


@pytest.mark.parametrize("strategy", [{}, {"beam_size": 3, "patience": 2.0}], ids=str)
@pytest.mark.parametrize("times", [True, False])
@pytest.mark.parametrize(
    ("letters", "options"),
    [*((n, {}) for n in range(20, 24)), (30, {"max_new_tokens": CONTEXT}), (40, {"prefix": "a" * 18})],
    ids=str,
)
def test_a_long_text_takes_room_from_the_prompt(model, letters, options, times, strategy):
    text, written = "a" * letters, len(options.get("prefix", ""))
    options = {"choices": [text], "prompt": PROMPT, "without_timestamps": not times, **options, **strategy}
    assert decode(model, small_mel(1), GERMAN, **options)[0].text == text[written:]


def test_a_text_may_fill_the_context_and_is_refused_beyond_it(model):
    start, time = 3, 1
    most = CONTEXT - start + 1 - time  # the last token is not fed
    options = {"max_new_tokens": 1000, "prompt": PROMPT, "choices": ["a" * most]}
    assert decode(model, small_mel(1), GERMAN, **options)[0].text == "a" * most
    for options, message in (
        ({"max_new_tokens": 1000}, "takes at least 47 tokens, more than the 46 of a window"),
        ({"max_new_tokens": 1000, "prefix": "a"}, "takes at least 45 tokens, more than the 44 of a window"),
        ({}, "takes at least 47 tokens, more than the 24 of a window"),
    ):
        with pytest.raises(ValueError, match=message):
            decode(model, small_mel(1), GERMAN, prompt=PROMPT, choices=["a" * (most + 1)], **options)
        with pytest.raises(ValueError, match=message):
            transcribe(model, noise(1.0), language="de", choices=["a" * (most + 1)], **options)


def test_a_prefix_with_a_time_within_the_text_is_refused(model):
    times, one = [model.tokenizer.special.timestamp_begin + step for step in (0, 10)], model.tokenizer.encode(" one")
    prefix = (times[0], *one, times[1])
    options = {"choices": ["one and one"], "language": "de"}
    with pytest.raises(ValueError, match="is not the beginning of a text of choices='one and one'; drop it"):
        decode(model, small_mel(1), prefix=prefix, **options)
    assert decode(model, small_mel(1), prefix=prefix[:2], **options)[0].text == "and one"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"choices": ["a" * 30]}, "choices='a+' takes at least 31 tokens, more than the 24 of a window"),
        ({"choices": ["a"], "suppress_regex": ".?a"}, "choices='a': cannot be written with the tokens that are not"),
        ({"choices": ["a"], "regex": "a"}, "choices and regex both state what a text must match; drop one"),
        ({"choices": []}, "must be texts, at least one, and none of them empty"),
        ({"choices": "one,two"}, "choices='one,two' must be several texts; give a list"),
        ({"grammar_penalty": 3.0}, "grammar_penalty=3.0 needs a grammar"),
        ({"grammar_rule": "x"}, "grammar_rule='x' needs a grammar"),
        ({"regex": "a", "grammar_rule": "x"}, "grammar_rule='x' is of a grammar, not of regex"),
        ({"regex": "a", "grammar_penalty": -1.0}, "grammar_penalty=-1.0 must be above 0 and finite"),
        ({"regex": "a", "no_repeat_ngram_size": 2}, "no_repeat_ngram_size=2 may leave regex no next token"),
        ({"choices": ["a a a a"], "max_repeats": 3}, "max_repeats=3 may end a text of choices too early"),
        ({"choices": ["a"], "beam_size": 3, "patience": 0.4}, "patience=0.4 may keep a beam that is not yet a whole"),
    ],
)
def test_what_cannot_be_met_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        decode(model, small_mel(1), GERMAN, **options)


@pytest.mark.parametrize("before", [{"initial_prompt": LETTERS, "carry_initial_prompt": True}, {"hotwords": LETTERS}])
@pytest.mark.parametrize("text", ["one the two and one the two and one the", "a" * 23, "a" * 40])
def test_a_long_text_has_room_after_much_previous_text(model, text, before):
    """So that fewer than 23 of the 48 positions are left for what was before."""
    options = {"choices": [text], "language": "de", "no_speech_threshold": None, "temperature": 0.0}
    found = transcribe(model, noise(2.5), max_new_tokens=41, **before, **options)
    assert {segment["text"].strip() for segment in found["segments"]} == {text}


def test_another_grammar_of_the_same_size_compiles_nothing(model, compilations):
    options = {"language": "de", "temperature": 0.0}
    warmup(model, (1, 2), choices=["one", "two"], **options)
    compilations.clear()
    for grammar in ({"choices": ["the one", "a"]}, {"regex": "(one|two)+"}, {"grammar": 'root ::= [a-f] " one"'}):
        transcribe(model, noise(2.5), **grammar, **options)
        transcribe(model, [noise(3.2), noise(0.7)], batch_size=2, **grammar, **options)
    assert compilations == []
    transcribe(model, noise(1.0), regex="a{150}|b", **options)  # a larger one
    assert compilations
