"""What may not be repeated, and loops: the rules against plain Python, and decoding with them."""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle import ROWS, PlainDecoder, has_loop, repetition_oracle
from tests.small import quick_compilation, small_config, small_mel, small_model, small_tokenizer  # noqa: F401
from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.decoding.rules import LONGEST_LOOP, RepetitionRule
from whisper_nnx.model.whisper import Whisper
from whisper_nnx.text.special_tokens import SpecialTokens
from whisper_nnx.transcription.windows import decode, decode_windows, encode_windows

TINY = SpecialTokens(
    eot=4, sot=5, transcribe=6, translate=7, sot_lm=None, sot_prev=8, no_speech=9, no_timestamps=10,
    timestamp_begin=11, timestamp_end=17,
)  # fmt: skip
V, SIZE = 20, 40  # 18 and 19 are text

apply = jax.jit(RepetitionRule.apply)
append = jax.jit(RepetitionRule.append)


def rule_of(rows: Sequence[Sequence[int]], **limits) -> RepetitionRule:
    limits = {"penalty": 1.0, "ngram": 0, "repeats": None, **limits}
    each = {name: x if isinstance(x, list) else [x] * len(rows) for name, x in limits.items()}
    return RepetitionRule.from_prefixes(rows, TINY, size=SIZE, **each)


# The rules, token by token.

few = st.lists(st.sampled_from([0, 1, 18, 12, 4]), max_size=14)  # so few that they repeat themselves
logit = st.integers(-24, 24).map(lambda n: n / 4)
row = st.tuples(few, st.sampled_from([1.0, 0.5, 1.25, 2.0]), st.integers(0, 5))


@settings(deadline=None, max_examples=150)
@given(st.lists(row, min_size=ROWS, max_size=ROWS), st.lists(logit, min_size=V, max_size=V))
def test_rows_with_penalties_and_ngrams_of_their_own_equal_plain_python(rows, logits):
    sampled, penalties, ngrams = map(list, zip(*rows, strict=True))
    given_logits = jnp.broadcast_to(jnp.array(logits, jnp.float32), (ROWS, V))
    for found, ids, penalty, ngram in zip(
        apply(rule_of(sampled, penalty=penalties, ngram=ngrams), given_logits), *zip(*rows, strict=True), strict=True
    ):
        expected = repetition_oracle(np.array(logits, np.float32), ids, penalty, ngram, TINY)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(few, min_size=ROWS, max_size=ROWS), st.lists(st.lists(st.integers(0, 18), min_size=ROWS, max_size=ROWS))
)
def test_a_rule_that_grows_token_by_token_is_that_of_the_whole(prefixes, steps):
    grown = rule_of(prefixes)
    for tokens in steps[:6]:
        grown = append(grown, jnp.array(tokens, jnp.int32))
    whole = rule_of([[*ids, *(step[i] for step in steps[:6])] for i, ids in enumerate(prefixes)])
    for name in ("tokens", "length", "matched"):
        np.testing.assert_array_equal(getattr(grown, name), getattr(whole, name))


def loops(sampled: Sequence[int], repeats: int) -> bool:
    """Whether a loop was seen at any of the tokens."""
    rule, seen = rule_of([[]], repeats=repeats), False
    for token in sampled:
        rule = append(rule, jnp.array([token], jnp.int32))
        seen |= bool(rule.stops()[0])
    return seen


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([0, 1, 12]), max_size=24), st.integers(2, 4))
def test_a_loop_is_seen_where_plain_python_sees_one(sampled, repeats):
    assert loops(sampled, repeats) == has_loop(sampled, repeats, TINY)


def test_timestamps_do_not_hide_a_loop():
    assert loops([11, 1, 2, 12, 12, 1, 2, 13, 13, 1, 2], repeats=3)
    assert not loops([11, 1, 2, 12, 12, 1, 2, 13, 13, 1, 3], repeats=3)


@pytest.mark.parametrize(("period", "seen"), [(LONGEST_LOOP, True), (LONGEST_LOOP + 1, False)])
def test_a_loop_has_so_many_tokens_at_most(period, seen):
    ids = [*range(100, 100 + period)] * 2  # text behind the timestamps
    assert loops(ids, repeats=2) is seen


# Decoding with them.

TOKENIZER = small_tokenizer()
SPECIAL = TOKENIZER.special
GERMAN = DecodingOptions(language="de")
START = [SPECIAL.sot, dict(SPECIAL.languages)["de"], SPECIAL.transcribe]
ENDLESS = replace(GERMAN, suppress_tokens=(-1, SPECIAL.eot))


@pytest.fixture(scope="module")
def model() -> Whisper:
    return small_model(decoder_layers=1)


@pytest.fixture(scope="module")
def mel() -> jax.Array:
    return small_mel(ROWS)


@pytest.fixture(scope="module")
def encoded(model, mel):
    return encode_windows(model, mel)


def plain(model, window, options: DecodingOptions) -> PlainDecoder:
    prefix = [SPECIAL.timestamp_begin, *TOKENIZER.encode(" one")] if options.prefix else []
    start = [*START, SPECIAL.no_timestamps] if options.without_timestamps else START
    return PlainDecoder(model, window, options, [*start, *prefix], prefix)


def agree(result, decoder: PlainDecoder, *, beam: bool = False) -> None:
    tokens, total = decoder.beam() if beam else decoder.greedy()
    assert result.tokens == tokens
    np.testing.assert_allclose(result.avg_logprob, total / (len(tokens) + 1), atol=1e-4)
    assert result.looped is decoder.loops(tokens)


LIMITED = [
    replace(GERMAN, repetition_penalty=1.3, max_repeats=2),
    replace(GERMAN, no_repeat_ngram_size=1, prefix="one", repetition_penalty=0.9),
    replace(ENDLESS, no_repeat_ngram_size=2, max_new_tokens=20),
    replace(ENDLESS, max_repeats=3, without_timestamps=True),
]


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0]])
def test_rows_with_limits_of_their_own_equal_the_plain_decoder(model, mel, encoded, order):
    options = [LIMITED[i] for i in order]
    for result, window, o in zip(decode_windows(model, encoded, options, range(ROWS)), mel, options, strict=True):
        agree(result, plain(model, window, o))


@pytest.mark.parametrize(
    "changes",
    [
        {"max_repeats": 2},
        {"max_repeats": 3, "suppress_tokens": (-1, SPECIAL.eot)},
        {"no_repeat_ngram_size": 2, "repetition_penalty": 1.1, "length_penalty": 0.5},
    ],
    ids=str,
)
def test_beams_with_limits_equal_the_plain_decoder(model, mel, encoded, changes):
    options = replace(GERMAN, beam_size=3, **changes)
    results = decode_windows(model, encoded, [options] * ROWS, range(ROWS))
    for result, window in zip(results, mel, strict=True):
        agree(result, plain(model, window, options), beam=True)


@pytest.mark.parametrize("strategy", [{}, {"temperature": 0.7, "best_of": 3}, {"beam_size": 3}])
def test_a_row_that_may_repeat_all_is_the_same_beside_one_that_may_not(model, encoded, strategy):
    free = replace(GERMAN, **strategy)
    alone = decode_windows(model, encoded, [free] * ROWS, range(ROWS))
    limited = replace(free, repetition_penalty=1.5, no_repeat_ngram_size=2, max_repeats=2)
    beside = decode_windows(model, encoded, [free, limited, free, None], range(ROWS))
    assert [r and r.tokens for r in beside[::2]] == [r.tokens for r in alone[::2]]
    assert beside[1].tokens != alone[1].tokens
    assert not any(result.looped for result in alone)


@pytest.mark.parametrize("strategy", [{}, {"temperature": 0.7, "best_of": 3}, {"beam_size": 3}])
def test_a_limit_that_is_not_reached_changes_nothing(model, mel, strategy):
    options = replace(GERMAN, **strategy)
    for a, b in zip(decode(model, mel, options), decode(model, mel, options, max_repeats=10**9), strict=True):
        assert (a.tokens, a.token_logprobs, a.looped, b.looped) == (b.tokens, b.token_logprobs, False, False)


def test_a_looping_row_stops_at_the_loop_and_is_marked(model, mel):
    whole = decode(model, mel, ENDLESS)
    stopped = decode(model, mel, ENDLESS, max_repeats=2)
    for a, b in zip(whole, stopped, strict=True):
        assert b.looped
        assert b.tokens == a.tokens[: len(b.tokens)]
        assert has_loop(b.tokens, 2, SPECIAL)
        assert not has_loop(b.tokens[:-1], 2, SPECIAL)
    assert sum(len(r.tokens) for r in stopped) < sum(len(r.tokens) for r in whole)


def test_a_row_that_is_done_does_not_loop_while_others_go_on(model, encoded):
    short = replace(ENDLESS, max_repeats=2, max_new_tokens=3)
    for order in (1, -1):
        results = decode_windows(model, encoded, [short, short, ENDLESS, ENDLESS][::order], range(ROWS))[::order]
        assert [len(result.tokens) for result in results[:2]] == [3, 3]
        assert not any(result.looped for result in results)


def test_limits_on_repetition_are_compiled_once(model, encoded, compilations):
    def run(**changes):
        decode_windows(model, encoded, [replace(GERMAN, **changes), GERMAN, None, GERMAN], range(ROWS))

    run(max_repeats=2)
    compilations.clear()
    for changes in (
        {"max_repeats": 5},
        {"repetition_penalty": 1.2},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 30, "prefix": "one"},
        {"repetition_penalty": 0.8, "max_repeats": 2, "max_new_tokens": 7, "suppress_regex": "a+"},
        {"max_repeats": 4, "tinydiarize": True},
    ):
        run(**changes)
    assert compilations == []


def test_max_new_tokens_limits_what_is_sampled_and_shortens_no_prefix(model, mel):
    long = tuple(range(100, 120))
    for n in (1, 5, small_config().max_target_positions):
        results = decode(model, mel, ENDLESS, max_new_tokens=n, prefix=long)
        room = small_config().max_target_positions - len(START) - 1 - len(long) + 1
        assert {len(result.tokens) for result in results} == {min(n, room)}
