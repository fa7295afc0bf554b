"""The rules on logits against an independent reading of them, one row at a time."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle import timestamp_oracle
from tests.small import quick_compilation  # noqa: F401
from whisper_nnx.decoding.rules import NO_LIMIT, SuppressRule, TimestampRule, suppress
from whisper_nnx.text.special_tokens import SpecialTokens

SPECIAL = SpecialTokens(
    eot=4, sot=5, transcribe=6, translate=7, sot_lm=None, sot_prev=8, no_speech=9, no_timestamps=10,
    timestamp_begin=11, timestamp_end=17,
)  # fmt: skip
V, ROWS = 20, 4  # 18 and 19 are tokens that a fine-tune added behind the timestamps

apply = jax.jit(TimestampRule.apply)
append = jax.jit(TimestampRule.append)

ids = st.one_of(st.integers(0, V - 1), st.integers(SPECIAL.timestamp_begin, SPECIAL.timestamp_end), st.just(18))
history = st.lists(ids, max_size=7)
# Quarters: no sum of exponentials of them lies so near to another one that rounding could decide.
logit = st.one_of(st.integers(-24, 24).map(lambda n: n / 4), st.just(-np.inf))
row = st.tuples(history, st.lists(logit, min_size=V, max_size=V), st.one_of(st.none(), st.integers(0, 9)))


def rule_of(histories, limits=None, special=SPECIAL) -> TimestampRule:
    max_initial = [NO_LIMIT if limit is None else limit for limit in limits or [None] * len(histories)]
    enabled = [True] * len(histories)
    return TimestampRule.from_prefixes(histories, special, enabled=enabled, max_initial=max_initial)


def ruled(histories, logits, limits) -> np.ndarray:
    return np.asarray(apply(rule_of(histories, limits), jnp.asarray(logits, jnp.float32)))


@settings(deadline=None, max_examples=150)
@given(st.lists(row, min_size=ROWS, max_size=ROWS))
def test_the_timestamp_rule_of_a_batch_equals_plain_python_row_by_row(rows):
    histories, logits, limits = zip(*rows, strict=True)
    for found, (ids, row_logits, limit) in zip(ruled(histories, logits, limits), rows, strict=True):
        expected = timestamp_oracle(np.array(row_logits, np.float32), ids, limit, SPECIAL)
        np.testing.assert_array_equal(found, expected)


@settings(deadline=None, max_examples=100)
@given(st.lists(history, min_size=ROWS, max_size=ROWS), st.lists(ids, min_size=ROWS, max_size=ROWS))
def test_a_rule_with_a_token_appended_is_that_of_the_longer_list(histories, tokens):
    grown = append(rule_of(histories), jnp.array(tokens, jnp.int32))
    longer = rule_of([[*ids, token] for ids, token in zip(histories, tokens, strict=True)])
    jax.tree.map(np.testing.assert_array_equal, grown, longer)


def allowed(ids: list[int], *, favoured: tuple[int, ...] = (), limit: int | None = None) -> set[int]:
    logits = np.zeros(V)
    logits[list(favoured)] = 9.0
    (found,) = ruled([ids], [logits], [limit])
    return set(np.flatnonzero(np.isfinite(found)).tolist())


TIMES = set(range(11, 18))
TEXT = {0, 1, 2, 3, 18, 19}


def test_the_first_token_is_a_timestamp_up_to_the_limit():
    assert allowed([]) == TIMES
    assert allowed([], limit=2) == {11, 12, 13}
    assert allowed([], limit=0) == {11}
    assert allowed([], limit=NO_LIMIT) == TIMES


def test_the_limit_of_the_first_timestamp_is_no_limit_of_later_ones():
    assert {16, 17} <= allowed([11, 1], limit=0)


def test_text_must_follow_a_start():
    assert not TIMES & allowed([11])
    assert allowed([11]) >= TEXT


def test_after_an_end_comes_its_start_or_the_end_of_text():
    found = allowed([11, 1, 14], favoured=(SPECIAL.eot,))
    assert {14, 15, 16, 17, SPECIAL.eot} <= found
    assert not found & (TEXT | {11, 12, 13})


def test_no_segment_is_empty():
    assert allowed([13, 1]) & TIMES == {14, 15, 16, 17}
    assert allowed([13, 1, 15, 15, 1]) & TIMES == {16, 17}


def test_the_timestamps_together_win_over_any_single_text():
    together, alone = [11, 0], (0,)
    logits = np.zeros(V)
    logits[0] = np.log(6.0) - 0.01  # timestamps 12 to 17 are six
    (found,) = ruled([together], [logits], [None])
    assert set(np.flatnonzero(np.isfinite(found))) == TIMES - {11}
    assert allowed(together, favoured=alone) >= TEXT


def test_an_added_token_is_text_and_not_a_later_timestamp():
    assert allowed([11, 18], favoured=(0,)) & TIMES == TIMES - {11}
    assert 18 not in allowed([11, 18, 14])


def test_the_token_that_switches_timestamps_off_is_never_sampled():
    assert SPECIAL.no_timestamps not in allowed([11, 1], favoured=(SPECIAL.no_timestamps, 0))


def test_a_turn_of_speakers_may_come_where_text_may():
    special = replace(SPECIAL, sot_lm=5, sot=4)
    for ids in ([], [11], [11, 1], [11, 5], [11, 1, 14], [11, 1, 14, 14]):
        (found,) = apply(rule_of([ids], special=special), jnp.zeros((1, V)).at[:, :6].set(9.0))
        assert np.isfinite(found[5]) == np.isfinite(found[0])


@pytest.mark.parametrize("shape", [(V,), (ROWS, V)])
def test_suppress_takes_away_what_the_mask_names_and_nothing_else(shape):
    logits = np.random.default_rng(0).normal(size=(ROWS, V)).astype(np.float32)
    mask = np.random.default_rng(1).random(shape) < 0.5
    found = suppress(jnp.asarray(logits), jnp.asarray(mask))
    np.testing.assert_array_equal(found, np.where(np.broadcast_to(mask, (ROWS, V)), -np.inf, logits))


def test_a_window_without_timestamps_is_left_alone():
    rule, logits = rule_of([[], []]), jnp.asarray(np.random.default_rng(0).normal(size=(2, V)), jnp.float32)
    found = apply(replace(rule, enabled=np.array([True, False])), logits)
    np.testing.assert_array_equal(found[1], logits[1])
    assert (found[0] != logits[0]).any()


def test_what_is_suppressed_at_the_start_may_follow_another_token():
    always, at_start = (np.arange(V) == i for i in (3, 7))
    rule, logits = SuppressRule.from_masks(always, at_start, ROWS), jnp.zeros((ROWS, V))
    assert set(np.flatnonzero(np.isinf(rule.apply(logits)[0]))) == {3, 7}
    later = rule.append(jnp.zeros(ROWS, jnp.int32))
    assert set(np.flatnonzero(np.isinf(later.apply(logits)[0]))) == {3}


def test_rows_are_repeated_and_reordered_and_masks_are_not():
    prefixes = [[11, 1], [12], [13, 2, 14], []]
    rule, masks = rule_of(prefixes), SuppressRule.from_masks(*np.zeros((2, V), bool), ROWS)
    source = jnp.array([0, 0, 3, 2, 4, 5, 7, 7])
    expected = rule_of([prefixes[int(i) // 2] for i in source])
    jax.tree.map(np.testing.assert_array_equal, rule.repeat(2).take(source), expected)
    np.testing.assert_array_equal(masks.repeat(2).take(source).always, masks.always)
    np.testing.assert_array_equal(masks.repeat(2).take(source).at_start, masks.at_start)
