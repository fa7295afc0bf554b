"""Time warping and its parts against plain NumPy."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.small import small_model
from whisper_nnx.timing import BUCKETS, align_tokens, alignment_heads, alignment_matrix, bucket, first_positions
from whisper_nnx.timing import median_filter as median_filter_of
from whisper_nnx.windows import encode_windows

ROWS, COLUMNS = 6, 12
warp = jax.jit(first_positions)
median_filter = jax.jit(median_filter_of)


def warp_plainly(cost: np.ndarray) -> list[int]:
    """Where the cheapest path enters each row, cell by cell, in float64.

    As in the reference, two steps that tie make way for the one to the right, even if that costs more.
    """
    n, m = cost.shape
    total = np.full((n + 1, m + 1), np.inf)
    total[0, 0] = 0
    came_from: dict[tuple[int, int], tuple[int, int]] = {}
    for i in range(1, n + 1):
        for j in range(1, m + 1):
            diagonal, up, left = total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]
            if diagonal < up and diagonal < left:
                came_from[i, j] = i - 1, j - 1
            elif up < diagonal and up < left:
                came_from[i, j] = i - 1, j
            else:
                came_from[i, j] = i, j - 1
            total[i, j] = cost[i - 1, j - 1] + total[came_from[i, j]]
    path = [(n, m)]
    while path[-1] in came_from:
        path.append(came_from[path[-1]])
    return [min(j - 1 for i, j in path if i == row and j > 0) for row in range(1, n + 1)]


# Few different values, so that ties are common; and ordinary numbers.
costs = st.one_of(
    hnp.arrays(np.float32, (ROWS, COLUMNS), elements=st.sampled_from([-1.0, 0.0, 0.5, 1.0])),
    hnp.arrays(np.float32, (ROWS, COLUMNS), elements=st.floats(-8, 8, width=32, allow_subnormal=False)),
)


@settings(deadline=None, max_examples=300)
@given(costs, st.integers(1, ROWS), st.integers(1, COLUMNS))
def test_warping_takes_the_path_of_plain_dynamic_programming(cost, n, m):
    """What lies behind [n,m] is padding. What ties in float64 ties here too: sums of few float32 are exact in both."""
    padded = cost.copy()
    padded[n:], padded[:, m:] = 99.0, -99.0
    assert np.asarray(warp(padded, n, m))[:n].tolist() == warp_plainly(cost[:n, :m].astype(np.float64))


def test_warping_tells_paths_apart_that_float32_sums_confuse():
    """Hundreds of costs around -8 sum up to where float32 resolves 2e-4; the paths differ by less than that."""
    random = np.random.default_rng(0)
    cost = (-8 + random.random((40, 700)) * 1e-3).astype(np.float32)
    assert np.asarray(warp(cost, 40, 700)).tolist() == warp_plainly(cost.astype(np.float64))


@settings(deadline=None, max_examples=100)
@given(
    hnp.arrays(np.float32, (3, COLUMNS), elements=st.floats(-8, 8, width=32, allow_subnormal=False)),
    st.integers(1, COLUMNS),
)
def test_the_median_filter_mirrors_at_both_ends_of_what_counts(x, n):
    filtered = np.asarray(median_filter(x, n))[:, :n]
    if n <= 3:
        np.testing.assert_array_equal(filtered, x[:, :n])
    else:
        mirrored = np.pad(x[:, :n], ((0, 0), (3, 3)), mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(mirrored, 7, axis=1)
        np.testing.assert_array_equal(filtered, np.median(windows, axis=-1))


def test_padding_does_not_change_the_alignment_matrix():
    scores = np.random.default_rng(1).normal(size=(2, 5, 20)).astype(np.float32)
    padded = np.pad(scores, ((0, 0), (0, 3), (0, 9)), constant_values=50.0)
    alone, with_padding = alignment_matrix(scores, 5, 20), alignment_matrix(padded, 5, 20)
    np.testing.assert_allclose(with_padding[:5, :20], alone, atol=1e-5)


def test_attention_too_weak_for_float32_is_standardised_all_the_same():
    """In silence all weights are below 1e-38: as they are, XLA would make them zeros."""
    scores = np.random.default_rng(2).normal(size=(1, 5, 20)).astype(np.float32)
    scores[:, :, 10:] -= 95.0
    exact = np.exp(scores.astype(np.float64))
    exact /= exact.sum(axis=-1, keepdims=True)
    exact = (exact - exact.mean(axis=1, keepdims=True)) / exact.std(axis=1, keepdims=True)
    expected = np.asarray(median_filter_of(exact.astype(np.float32), 20))[0]
    np.testing.assert_allclose(alignment_matrix(scores, 5, 20), expected, atol=1e-3)


def test_texts_of_a_batch_are_aligned_as_each_alone():
    model = small_model(alignment_heads=[[0, 0], [0, 1]], decoder_layers=1)
    mel = np.random.default_rng(3).normal(size=(2, 80, 100)).astype(np.float32)[:, : model.config.num_mel_bins]
    tokenizer = model.tokenizer
    start, eot = tokenizer.sot_sequence("de", "transcribe", timestamps=False), tokenizer.special.eot
    texts, positions = [[5, 6, 7, 8], [9, 10]], [50, 31]

    def align(rows: list[int]) -> list[tuple[list[float], list[float]]]:
        cross = encode_windows(model, mel[rows]).cross
        wanted = [texts[row] for row in rows], eot, [positions[row] for row in rows]
        return align_tokens(model.decoder, cross, model.config, [start] * len(rows), *wanted)

    together = align([0, 1])
    for row, (begins_s, probs) in enumerate(together):
        ((alone_s, alone_probs),) = align([row])
        assert begins_s == alone_s
        assert len(begins_s) == len(texts[row]) + 1
        assert begins_s == sorted(begins_s)
        np.testing.assert_allclose(probs, alone_probs, rtol=1e-4)


def test_heads_come_from_the_checkpoint_or_else_from_the_upper_half_of_the_layers():
    config = small_model(decoder_layers=3).config
    assert alignment_heads(config) == tuple(
        (layer, head) for layer in (1, 2) for head in range(config.decoder_attention_heads)
    )


def test_a_text_goes_to_the_smallest_bucket_that_holds_it():
    assert [bucket(n, 448) for n in (1, BUCKETS[0], BUCKETS[0] + 1, 300, 448)] == [64, 64, 128, 448, 448]


def test_a_text_beyond_the_context_is_refused():
    model = small_model(decoder_layers=1)
    with pytest.raises(ValueError, match="exceeds the context"):
        align_tokens(model.decoder, (), model.config, [[1]], [[5] * 999], 0, [10])
