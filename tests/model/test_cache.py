"""The decoder's memory: all rows write at one place, beams refer to what others have written, nothing changes."""

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
    """Two positions written, of which the rows read 0, 2 and 1; the buffers are full of noise."""
    empty = KVCache.init(tuple(keys_values(i) for i in range(LAYERS)), SIZE)
    noise = (keys_values(10 + i, length=SIZE) for i in range(LAYERS))
    return replace(empty, self_attention=tuple(noise)).appended(2, jnp.array([0, 2, 1]))


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
    assert cache.source.tolist() == [[-1] * SIZE] * ROWS


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("group", [1, 2])
def test_append_writes_in_each_rows_place_at_the_end_and_nowhere_else(cache, n, group):
    cache = cache.repeat(group)
    new = keys_values(20, rows=ROWS * group, length=n)
    for layer in range(LAYERS):
        written = cache.append(layer, new)
        for before, pieces, after in zip(cache.self_attention[layer], new, written, strict=True):
            expected = np.array(before)
            for row in range(ROWS * group):
                expected[row // group, :, 2 * group + row % group : (2 + n) * group : group] = pieces[row]
            np.testing.assert_array_equal(after, expected)


def test_append_leaves_the_cache_as_it_was(cache):
    before = jax.tree.map(np.array, cache)
    cache.append(0, keys_values(20, length=2))
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, cache))


def test_rows_go_on_side_by_side_and_leave_gaps_where_they_are_shorter(cache):
    assert cache.source.tolist() == [[-1] * 6, [0, 0, *[-1] * 4], [-1, 0, *[-1] * 4]]
    longer = cache.appended(2)
    assert (longer.length.tolist(), int(longer.end)) == ([2, 4, 3], 4)
    assert longer.source.tolist() == [[-1, -1, 0, 0, -1, -1], [0, 0, 0, 0, -1, -1], [-1, 0, 0, 0, -1, -1]]
    around = longer.appended(2).appended(1, jnp.array([1, 1, 0]))  # the first position is written again
    assert around.source.tolist() == [[0, -1, 0, 0, 0, 0], [0] * 6, [-1, 0, 0, 0, 0, 0]]
    written = around.append(0, keys_values(20, length=1))
    np.testing.assert_array_equal(written.k[:, :, 1], keys_values(20, length=1).k[:, :, 0])


def test_beams_refer_to_each_other_and_nothing_is_moved(cache):
    """One window of three beams: what a beam has read goes with it, and it writes in its own place."""
    one = jax.tree.map(lambda x: x[1:2] if x.ndim else x, cache).repeat(3)
    assert one.source[:, :3].tolist() == [[0, 0, -1]] * 3
    one = one.appended(1)
    moved = one.reorder(jnp.array([2, 0, 0]))
    assert moved.source[:, :4].tolist() == [[0, 0, 2, -1], [0, 0, 0, -1], [0, 0, 0, -1]]
    assert moved.appended(1).source[:, 3].tolist() == [0, 1, 2]
    assert moved.self_attention is one.self_attention
    assert moved.cross_attention is one.cross_attention


def test_repeat_makes_room_and_shares_the_audio_and_what_was_written(cache):
    repeated = cache.repeat(2)
    assert repeated.length.tolist() == [0, 0, 2, 2, 1, 1]
    assert repeated.source[2:4, :3].tolist() == [[0, 0, -1]] * 2
    pairs = zip(jax.tree.leaves(cache.self_attention), jax.tree.leaves(repeated.self_attention), strict=True)
    for before, after in pairs:
        assert after.shape == (ROWS, HEADS, SIZE * 2, WIDTH)
        np.testing.assert_array_equal(after[:, :, ::2], before)
    assert repeated.cross_attention is cache.cross_attention


def test_a_cache_is_a_frozen_pytree_that_jit_takes_and_returns(cache):
    with pytest.raises(FrozenInstanceError):
        cache.length = jnp.zeros(ROWS)
    leaves, treedef = jax.tree.flatten(cache)
    assert len(leaves) == 2 * LAYERS + 2 * LAYERS + 3
    assert isinstance(jax.tree.unflatten(treedef, leaves), KVCache)
    moved = jax.jit(KVCache.reorder)(cache, jnp.array([1, 2, 0]))
    jax.tree.map(np.testing.assert_array_equal, moved, cache.reorder(jnp.array([1, 2, 0])))


def test_rejected_positions_become_gaps_and_are_written_again(cache):
    longer = cache.appended(3).keep(3, jnp.array([2, 0, 1]))
    assert (longer.length.tolist(), int(longer.end)) == ([2, 2, 2], 4)
    assert longer.source.tolist() == [[-1, -1, 0, 0, -1, -1], [0, 0, -1, -1, -1, -1], [-1, 0, 0, -1, -1, -1]]


def test_closed_up_rows_read_the_same_keys_and_values_without_gaps_at_the_end(cache):
    cache = cache.appended(3).keep(3, jnp.array([2, 0, 1]))
    closed = cache.closed_up(jnp.array([True, True, False]))
    assert (closed.length.tolist(), int(closed.end)) == ([2, 2, 2], 2)
    assert closed.source.tolist() == [[0, 0, -1, -1, -1, -1]] * ROWS
    for before, after in zip(
        jax.tree.leaves(cache.self_attention), jax.tree.leaves(closed.self_attention), strict=True
    ):
        for row in range(ROWS):
            reads = [
                np.asarray(x)[row][:, np.asarray(source[row]) == 0]
                for x, source in ((before, cache.source), (after, closed.source))
            ]
            np.testing.assert_array_equal(*reads)
