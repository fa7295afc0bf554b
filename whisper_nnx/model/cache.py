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
    """Keys and values of R = B*G rows, G of which share a window, in buffers of fixed size, so that nothing recompiles.

    All rows write at the same position, and rows that follow others (beams) refer to what those have written: nothing
    is moved. Behind the last position the first is written again; a row must not be longer than the buffers.

    self_attention: one per layer, [B,H,S,G,K]: S text positions, each with a place for every row of the window.
    cross_attention: one per layer, [B,H,T,K], computed once per window.
    source [R,S]: the place, of G, that a row reads at each position; -1: none, a gap or not written yet.
    length [R]: how many positions each row reads: the position of its next token within its text.
    end: how many positions were written; position `end % S` is the next one.
    """

    self_attention: tuple[KeysValues, ...]
    cross_attention: tuple[KeysValues, ...]
    source: jax.Array
    length: jax.Array
    end: jax.Array

    @classmethod
    def init(cls, cross_attention: tuple[KeysValues, ...], size: int) -> KVCache:
        """Creates an empty cache of `size` text positions for windows with this cross-attention, one row for each."""
        rows, heads, _, width = cross_attention[0].k.shape
        dtype, _ = ops.current().cache_dtypes(cross_attention[0].k.dtype)
        empty = KeysValues(*[jnp.zeros((rows, heads, size, 1, width), dtype)] * 2)
        return cls(
            (empty,) * len(cross_attention),
            to_cache(cross_attention),
            source=jnp.full((rows, size), -1, jnp.int32),
            length=jnp.zeros(rows, jnp.int32),
            end=jnp.int32(0),
        )

    @property
    def group(self) -> int:
        """G, rows per window."""
        return self.self_attention[0].k.shape[3]

    def append(self, layer: int, new: KeysValues) -> KeysValues:
        """Returns a layer's buffers with `new` [R,H,n,K] written, for which there must be room before the last one."""

        def write(buffer: jax.Array, new: jax.Array) -> jax.Array:
            windows, heads, size, group, width = buffer.shape
            places = new.reshape(windows, group, heads, -1, width).transpose(0, 2, 3, 1, 4)
            return jax.lax.dynamic_update_slice(buffer, places.astype(buffer.dtype), (0, 0, self.end % size, 0, 0))

        return jax.tree.map(write, self.self_attention[layer], new)

    def appended(self, n: int, kept: jax.Array | None = None) -> KVCache:
        """Returns the cache n positions longer, whose keys and values are still to be appended.

        kept [R]: how many of these, the last ones, belong to each row's text; the others are gaps. Default: all.
        """
        rows, size = self.source.shape
        position = (jnp.arange(size) - self.end) % size  # counted from the first new one
        gaps = 0 if kept is None else (n - kept)[:, None]
        new = jnp.where(position >= gaps, (jnp.arange(rows) % self.group)[:, None], -1)
        return replace(
            self,
            source=jnp.where(position < n, new, self.source),
            length=self.length + (n if kept is None else kept),
            end=self.end + n,
        )

    def reorder(self, rows: jax.Array) -> KVCache:
        """Row i goes on from what row `rows[i]` of the same window has read, as in beam search."""
        return replace(self, source=self.source[rows], length=self.length[rows])

    def repeat(self, group: int) -> KVCache:
        """Makes each row of its own window into `group` rows that share the window, and what was written so far."""
        room = ((0, 0), (0, 0), (0, 0), (0, group - 1), (0, 0))
        return replace(
            self,
            self_attention=jax.tree.map(lambda x: jnp.pad(x, room), self.self_attention),
            source=jnp.repeat(self.source, group, axis=0),
            length=jnp.repeat(self.length, group),
        )
