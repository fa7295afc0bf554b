"""`KVCache`: the decoder's keys and values, a frozen pytree of fixed size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from whisper_nnx import ops
from whisper_nnx.runtime.programs import exportable


@exportable
class KeysValues(NamedTuple):
    """Keys and values of one attention, heads first: each [B,H,T,K]."""

    k: jax.Array
    v: jax.Array


def to_cache(cross_attention: tuple[KeysValues, ...]) -> tuple[KeysValues, ...]:
    """Casts audio keys and values to the dtype in which the cache stores them: the one that is read fastest."""
    return jax.tree.map(lambda x: x.astype(ops.current().cache_dtypes(x.dtype)[1]), cross_attention)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of B rows, in buffers of fixed size, so that nothing recompiles.

    self_attention: one per layer, [B,H,S,K]: a buffer of S text positions, of which the first `length` are valid.
    cross_attention: one per layer, [B/G,H,T,K], computed once per window; G adjacent rows (beams, samples) share one.
    length [B]: the position at which each row is written next.
    """

    self_attention: tuple[KeysValues, ...]
    cross_attention: tuple[KeysValues, ...]
    length: jax.Array

    @classmethod
    def init(cls, cross_attention: tuple[KeysValues, ...], size: int) -> KVCache:
        """Creates an empty cache of `size` text positions for windows with this cross-attention."""
        rows, heads, _, width = cross_attention[0].k.shape
        dtype, _ = ops.current().cache_dtypes(cross_attention[0].k.dtype)
        empty = KeysValues(*[jnp.zeros((rows, heads, size, width), dtype)] * 2)
        return cls((empty,) * len(cross_attention), to_cache(cross_attention), jnp.zeros(rows, jnp.int32))

    def append(self, layer: int, new: KeysValues) -> KeysValues:
        """Returns a layer's buffer with `new` [B,H,n,K] written at each row's `length`.

        A row without room for n positions overwrites its last ones; the caller must stop it before.
        """
        write = jax.vmap(lambda buffer, value, at: jax.lax.dynamic_update_slice(buffer, value, (0, at, 0)))
        if self.length.shape == (1,):  # XLA would copy the buffer for a batched update of one row
            write = lambda buffer, value, at: jax.lax.dynamic_update_slice(buffer, value, (0, 0, at[0], 0))  # noqa: E731
        past = self.self_attention[layer]
        new = jax.tree.map(lambda x: x.astype(past.k.dtype), new)
        return KeysValues(write(past.k, new.k, self.length), write(past.v, new.v, self.length))

    def advance(self, written: list[KeysValues], n: jax.Array | int) -> KVCache:
        """Returns the cache with each layer's appended buffer, n positions longer; n is one number or one per row."""
        return replace(self, self_attention=tuple(written), length=self.length + n)

    def reorder(self, rows: jax.Array) -> KVCache:
        """Replaces row i by row `rows[i]` of the same window, as beam search does."""
        return replace(
            self, self_attention=jax.tree.map(lambda x: x[rows], self.self_attention), length=self.length[rows]
        )

    def repeat(self, group: int) -> KVCache:
        """Repeats each row `group` times in adjacent rows; the cross-attention stays shared."""
        return replace(
            self,
            self_attention=jax.tree.map(lambda x: jnp.repeat(x, group, axis=0), self.self_attention),
            length=jnp.repeat(self.length, group),
        )
