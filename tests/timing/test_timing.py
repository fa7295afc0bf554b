"""Time warping and its parts against plain NumPy."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.conftest import missing
from tests.small import quick_compilation, small_config, small_model, small_tokenizer  # noqa: F401
from whisper_nnx import ops
from whisper_nnx.model.config import RELEASED, RELEASED_ALIGNMENT_HEADS
from whisper_nnx.model.heads import parse_heads
from whisper_nnx.ops.cpu import kernels
from whisper_nnx.ops.warping import warp_by_diagonals
from whisper_nnx.timing import token_times as times
from whisper_nnx.timing.alignment_heads import alignment_heads
from whisper_nnx.timing.token_times import (
    BUCKETS,
    AlignedText,
    align_tokens,
    alignment_matrix,
    bucket,
    padded_ids,
    row_begins,
    text_ids,
    token_times,
)
from whisper_nnx.timing.token_times import median_filter as median_filter_of
from whisper_nnx.transcription.windows import encode_windows

ROWS, COLUMNS = 6, 12
scan_map = jax.lax.map
WAYS = {"diagonals": jax.jit(warp_by_diagonals), "kernel": jax.jit(kernels.first_positions)}
median_filter = jax.jit(median_filter_of)


def warp(way: str, cost: np.ndarray, n: int, m: int) -> list[int]:
    if way == "kernel" and not kernels.usable():
        missing("no C++ compiler")
    return np.asarray(WAYS[way](cost, np.array([n, m], np.int32)))[:n].tolist()


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
    hnp.arrays(np.float32, (ROWS, COLUMNS), elements=st.integers(-(2**20), 2**20).map(lambda i: i / 2**17)),
)


@pytest.mark.parametrize("way", WAYS)
@settings(deadline=None, max_examples=300)
@given(costs, st.integers(1, ROWS), st.integers(1, COLUMNS))
def test_warping_takes_the_path_of_plain_dynamic_programming(way, cost, n, m):
    """What lies behind [n,m] is padding. What ties in float64 ties here too: sums are exact in both."""
    padded = cost.copy()
    padded[n:], padded[:, m:] = 99.0, -99.0
    assert warp(way, padded, n, m) == warp_plainly(cost[:n, :m].astype(np.float64))


@pytest.mark.parametrize("way", WAYS)
def test_warping_tells_paths_apart_that_float32_sums_confuse(way):
    """Hundreds of costs around -8 sum up to where float32 resolves 2e-4; the paths differ by less than that."""
    random = np.random.default_rng(0)
    cost = (-8 + random.random((40, 700)) * 1e-3).astype(np.float32)
    assert warp(way, cost, 40, 700) == warp_plainly(cost.astype(np.float64))


def test_both_ways_end_where_costs_are_no_numbers():
    if not kernels.usable():
        missing("no C++ compiler")
    cost, counts = np.full((ROWS, COLUMNS), np.nan, np.float32), np.array([4, 9], np.int32)
    found, expected = (way(cost, counts) for way in WAYS.values())
    np.testing.assert_array_equal(found, expected)
    for way in WAYS.values():
        assert not way(cost, np.zeros(2, np.int32)).any()


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


def test_attention_too_weak_for_float32_is_standardized_all_the_same():
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
        own = {"texts": [texts[row] for row in rows], "positions": [positions[row] for row in rows]}
        return align_tokens(model.decoder, cross, model.config, starts=[start] * len(rows), **own, eot=eot)

    together = align([0, 1])
    for row, (begins_s, probs) in enumerate(together):
        ((alone_s, alone_probs),) = align([row])
        assert begins_s == alone_s
        assert len(begins_s) == len(texts[row]) + 1
        assert begins_s == sorted(begins_s)
        np.testing.assert_allclose(probs, alone_probs, rtol=1e-4)


@pytest.fixture(params=["cpu", "accelerator"])
def implementation(request):
    with ops.using(request.param):
        yield


@pytest.mark.parametrize(("rows", "chunks"), [(2, 3), (4, 2)])
@pytest.mark.usefixtures("implementation")
def test_windows_are_aligned_some_at_a_time_where_all_would_take_much_memory(rows, chunks, monkeypatch):
    model, heads = small_model(), ((1, 0), (0, 1), (1, 1))
    random = np.random.default_rng(5)
    cross = encode_windows(model, random.normal(size=(6, model.config.num_mel_bins, 100)).astype(np.float32)).cross
    ids = random.integers(0, 200, (6, 20)).astype(np.int32)
    placed = np.tile(np.arange(20, dtype=np.int32), (6, 1))
    text = AlignedText(ids, random.integers(9, 20, 6), placed, random.integers(5, 9, 6), random.integers(25, 50, 6))
    known = {"decoder": model.decoder, "cross": cross, "text": text, "heads": heads}
    is_text = np.arange(model.config.vocab_size) < 150
    levels, within = random.random((2, 6, 50), np.float32), np.tile(np.float32([5, 30]), (6, 20, 1))
    expected = {"pauses": levels[0], "speech": levels[1], "within": within, "distance_cost": 0.1}
    counts, most = [], times._CHUNK_BYTES
    monkeypatch.setattr(jax.lax, "map", lambda f, xs: counts.append(len(xs)) or scan_map(f, xs))
    for function, options in ((token_times, {"is_text": is_text}), (row_begins, expected)):
        monkeypatch.setattr(times, "_CHUNK_BYTES", most)
        whole = function(**options, **known)
        numbers = len(heads) * 50 + (len(is_text) if function is token_times else 0)
        monkeypatch.setattr(times, "_CHUNK_BYTES", rows * 4 * 20 * numbers)
        arrays = {name: value for name, value in known.items() if name != "heads"} | options
        cut = jax.jit(lambda arrays, function=function: function.__wrapped__(**arrays, heads=heads))(arrays)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), cut, whole)
    assert counts == [chunks, chunks]


@pytest.fixture(scope="module")
def aligner():
    """(model, its window of noise after the encoder)"""
    tokenizer = small_tokenizer(added=["zebra"])
    model = small_model(alignment_heads=[[0, 0], [0, 1]], decoder_layers=1, tokenizer=tokenizer)
    mel = np.random.default_rng(4).normal(size=(1, model.config.num_mel_bins, 100)).astype(np.float32)
    return model, encode_windows(model, mel)


def test_the_probability_of_a_token_is_that_among_all_text_with_words_that_a_fine_tune_added(aligner):
    model, encoded = aligner
    tokenizer, eot = model.tokenizer, model.tokenizer.special.eot
    start, text = tokenizer.sot_sequence("de", timestamps=False), tokenizer.encode(" one zebra two")
    assert max(text) > tokenizer.special.timestamp_end
    texts = {"starts": [start], "texts": [text], "positions": [50]}
    known = {"eot": eot, "is_text": text_ids(tokenizer)}
    [(_, probs)] = align_tokens(model.decoder, encoded.cross, model.config, **texts, **known)
    ids = jnp.array([[*start, *text]])
    logits = np.asarray(model.decode(ids, encoded.features))[0, len(start) - 1 : -1]
    of_text = np.exp(logits[:, tokenizer.text_tokens(range(tokenizer.vocab_size))]).sum(axis=1)
    np.testing.assert_allclose(probs, np.exp(logits[np.arange(len(text)), text]) / of_text, rtol=1e-3)


def test_rows_lie_where_they_are_expected_and_pauses_take_the_rest(aligner):
    model, encoded = aligner
    tokenizer = model.tokenizer
    start, text = tokenizer.sot_sequence("de", timestamps=False), [5, 6, 7]
    ids, length = padded_ids([[*start, *text, tokenizer.special.eot]], model.config, tokenizer.special.eot)
    first = len(start) - 1
    rows = np.array([[-1, first, -1, first + 1, first + 2, -1, first + 3]], np.int32)
    anywhere, early, late = (0, 1e6), (10, 14), (30, 36)
    within = np.array([[anywhere, early, anywhere, late, late, anywhere, anywhere]], np.float32)
    pauses = np.full((1, model.config.max_source_positions), 1.0, np.float32)
    begin = row_begins(
        model.decoder,
        encoded.cross,
        AlignedText(ids, length, rows, n_rows=np.array([7]), positions=np.array([50])),
        pauses=pauses,
        speech=np.ones_like(pauses),
        within=within,
        distance_cost=0.5,
        heads=model.config.alignment_heads,
    )
    pause, first_token, pause_2, second, third, pause_3, _ = np.asarray(begin)[0].tolist()
    assert pause == 0
    assert 10 <= first_token <= pause_2 <= 14
    assert 30 <= second <= third <= pause_3 <= 36  # noise is like no token: pauses may take all


def test_heads_come_from_the_checkpoint_or_else_from_the_released_size():
    assert alignment_heads(small_config(alignment_heads=[[1, 1]])) == ((1, 1),)
    for name in ("tiny", "tiny.en", "large-v3", "large-v3-turbo"):
        assert alignment_heads(RELEASED[name]) == RELEASED_ALIGNMENT_HEADS[name]


def test_where_no_heads_are_known_those_of_the_upper_layers_serve_with_one_warning():
    config = small_config(decoder_layers=3, d_model=20)
    with pytest.warns(UserWarning, match=r"no alignment heads.*find_alignment_heads\(\)"):
        assert alignment_heads(config) == ((1, 0), (1, 1), (2, 0), (2, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alignment_heads(config)


def test_heads_may_be_chosen():
    config = small_config(decoder_layers=3)
    assert alignment_heads(config, 2) == ((1, 0), (1, 1), (2, 0), (2, 1))
    assert alignment_heads(config, [[2, 1], [0, 0]]) == ((0, 0), (2, 1))
    assert alignment_heads(config, parse_heads("2")) == alignment_heads(config, 2)
    assert parse_heads("1:0, 2:1") == ((1, 0), (2, 1))
    for wrong, message in (
        (4, "alignment_heads=4 top layers"),
        (0, "alignment_heads=0"),
        ([(3, 0)], r"\(3, 0\) does not exist"),
        ([(0, 2)], r"\(0, 2\) does not exist"),
        ((), "name at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            alignment_heads(config, wrong)
    for text in ("1.0", "1:0,2", "x", "", "1:0:2"):
        with pytest.raises(ValueError, match="cannot be read; write layer:head"):
            parse_heads(text)


def test_a_text_goes_to_the_smallest_bucket_that_holds_it():
    assert [bucket(n, 448) for n in (1, BUCKETS[0], BUCKETS[0] + 1, 300, 448)] == [64, 64, 128, 448, 448]


def test_a_text_beyond_the_context_is_refused():
    model = small_model(decoder_layers=1)
    with pytest.raises(ValueError, match="exceeds the context"):
        align_tokens(model.decoder, (), model.config, starts=[[1]], texts=[[5] * 999], positions=[10], eot=0)
