"""The decoder's memory: writes go to each row's own place, and nothing changes in place."""

from dataclasses import FrozenInstanceError, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from whisper_nnx.model.cache import KeysValues, KVCache
from whisper_nnx.ops.cpu import kernels

LAYERS, ROWS, HEADS, SIZE, T, WIDTH = 2, 3, 2, 6, 5, 4


def keys_values(seed: int, rows: int = ROWS, length: int = T) -> KeysValues:
    k, v = np.random.default_rng(seed).normal(size=(2, rows, HEADS, length, WIDTH))
    return KeysValues(jnp.asarray(k, jnp.float32), jnp.asarray(v, jnp.float32))


@pytest.fixture
def cache() -> KVCache:
    """Every row at another length, its buffers full of noise."""
    empty = KVCache.init(tuple(keys_values(i) for i in range(LAYERS)), SIZE)
    buffers = tuple(keys_values(10 + i, length=SIZE) for i in range(LAYERS))
    return replace(empty, self_attention=buffers, length=jnp.array([0, 2, 3]))


def test_an_empty_cache_has_a_buffer_for_each_layer_in_the_dtype_that_is_read_fastest():
    cross = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tuple(keys_values(i) for i in range(LAYERS)))
    cache = KVCache.init(cross, SIZE)
    shapes = {(x.shape, x.dtype) for x in jax.tree.leaves(cache.self_attention)}
    assert len(cache.self_attention) == LAYERS
    kept = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    assert shapes == {((ROWS, HEADS, SIZE, WIDTH), jnp.dtype(kept))}
    of_sound = jnp.bfloat16 if kernels.usable() else kept  # they read it as fast as it is short
    assert {x.dtype for x in jax.tree.leaves(cache.cross_attention)} == {jnp.dtype(of_sound)}
    assert cache.length.tolist() == [0] * ROWS


@pytest.mark.parametrize("n", [1, 3])
def test_append_writes_at_each_rows_length_and_nowhere_else(cache, n):
    new = keys_values(20, length=n)
    for layer in range(LAYERS):
        written = cache.append(layer, new)
        for row, length in enumerate([0, 2, 3]):
            for before, piece, after in zip(cache.self_attention[layer], new, written, strict=True):
                expected = np.array(before[row])
                expected[:, length : length + n] = piece[row]
                np.testing.assert_array_equal(after[row], expected)


def test_append_leaves_the_cache_as_it_was(cache):
    before = jax.tree.map(np.array, cache)
    cache.append(0, keys_values(20, length=2))
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, cache))


def test_advance_keeps_what_was_written_and_moves_on(cache):
    written = [cache.append(layer, keys_values(20 + layer, length=2)) for layer in range(LAYERS)]
    longer = cache.advance(written, 2)
    assert longer.length.tolist() == [2, 4, 5]
    jax.tree.map(np.testing.assert_array_equal, longer.self_attention, tuple(written))
    assert cache.advance(written, jnp.array([1, 0, 2])).length.tolist() == [1, 2, 5]


def test_reorder_takes_rows_from_other_rows_but_not_their_audio(cache):
    rows = jnp.array([2, 0, 0])
    moved = cache.reorder(rows)
    assert moved.length.tolist() == [3, 0, 0]
    for before, after in zip(jax.tree.leaves(cache.self_attention), jax.tree.leaves(moved.self_attention), strict=True):
        np.testing.assert_array_equal(after, before[rows])
    assert moved.cross_attention is cache.cross_attention


def test_repeat_puts_copies_side_by_side_and_shares_the_audio(cache):
    repeated = cache.repeat(2)
    assert repeated.length.tolist() == [0, 0, 2, 2, 3, 3]
    for before, after in zip(
        jax.tree.leaves(cache.self_attention), jax.tree.leaves(repeated.self_attention), strict=True
    ):
        np.testing.assert_array_equal(after[::2], before)
        np.testing.assert_array_equal(after[1::2], before)
    assert repeated.cross_attention is cache.cross_attention


def test_a_cache_is_a_frozen_pytree_that_jit_takes_and_returns(cache):
    with pytest.raises(FrozenInstanceError):
        cache.length = jnp.zeros(ROWS)
    leaves, treedef = jax.tree.flatten(cache)
    assert len(leaves) == 2 * LAYERS + 2 * LAYERS + 1
    assert isinstance(jax.tree.unflatten(treedef, leaves), KVCache)
    moved = jax.jit(KVCache.reorder)(cache, jnp.array([1, 2, 0]))
    jax.tree.map(np.testing.assert_array_equal, moved, cache.reorder(jnp.array([1, 2, 0])))
