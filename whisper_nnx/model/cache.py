"""`KVCache`: the decoder's keys and values, a frozen pytree of fixed size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from whisper_nnx import ops
from whisper_nnx.runtime.devices import over_model
from whisper_nnx.runtime.programs import exportable


@exportable
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeysValues:
    """Keys and values of one attention: each [B,H,T,K], heads first; or as `to_cache` stores them.

    They are of type `jax.Array`, or `ops.Int8Array` if stored in 8 bits. `positions`: how many of those stored for the
    audio are not padding; None for others.
    """

    k: Any
    v: Any
    positions: int | None = field(default=None, kw_only=True, metadata={"static": True})

    def __iter__(self) -> Iterator[Any]:
        return iter((self.k, self.v))


def checked_kv_dtype(dtype: Any) -> str | None:
    """A dtype in which `to_cache` stores audio keys and values, by its name. Raises ValueError for any but int8."""
    if dtype is None or dtype in ("int8", jnp.int8, jnp.dtype("int8")):
        return dtype and "int8"
    raise ValueError(f"kv_cache_dtype={dtype!r} is not supported; choose int8, or None for the dtype of the model")


def padded_audio(x: jax.Array) -> jax.Array:
    """x [B,T,...] with as many audio positions as `to_cache` stores."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % ops.current().audio_multiple), *[(0, 0)] * (x.ndim - 2)))


def to_cache(
    cross_attention: tuple[KeysValues, ...], dtype: str | None = None, positions: int | None = None
) -> tuple[KeysValues, ...]:
    """Stores audio keys and values in the dtype and the layout that the token loop reads fastest.

    Each is then [B,H,T,K] or [B,T,D] (`ops.pack_audio`), padded on the right, on a mesh divided by heads over `model`.
    What is stored already stays as it is.

    Args:
      cross_attention: keys and values of each layer.
      dtype: "int8" rounds them to 8 bits, with a scale for each channel of each row.
      positions: how many positions are not padding, if they are those of `padded_audio`. Padding before the projections
        saves a copy.
    """
    operations = ops.current()

    def store(x: jax.Array) -> Any:
        x = padded_audio(x.swapaxes(1, 2)).swapaxes(1, 2)
        if dtype == "int8":
            return jax.tree.map(pack, ops.quantize(x, -2, x.dtype))
        return pack(x.astype(operations.cache_dtypes(x.dtype)[1]))

    def pack(x: jax.Array) -> jax.Array:
        return over_model(ops.pack_audio(x), operations.heads_axis)

    return tuple(
        KeysValues(store(kv.k), store(kv.v), positions=positions or kv.k.shape[2]) if kv.positions is None else kv
        for kv in cross_attention
    )


def from_cache(stored: KeysValues, heads: int) -> KeysValues:
    """The keys and values [B,H,T,K] of what `to_cache` stored, or was given."""
    return KeysValues(*(ops.unpack(x, heads)[:, :, : stored.positions] for x in stored))


@exportable
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of R = B*G rows, G of which share a window, in buffers of fixed size, so that nothing recompiles.

    All rows write at the same position, and rows that follow others (beams) refer to what those have written: nothing
    is moved. Behind the last position the first is written again; a row must not be longer than the buffers.

    self_attention: one per layer, [B,H,S*G,K] or [B,S*G,D] (`ops.pack`): S text positions, each with a place for every
      row of the window. They share an axis, or a TPU would copy the buffers into the layout of its products.
    cross_attention: one per layer, as `to_cache` stores them; computed once per window.
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
        stored = to_cache(cross_attention)
        dtype, _ = ops.current().cache_dtypes(cross_attention[0].k.dtype)
        rows, *between, _, width = stored[0].k.shape
        empty = KeysValues(*[jnp.zeros((rows, *between, size, width), dtype)] * 2)
        return cls(
            (empty,) * len(stored),
            stored,
            source=jnp.full((rows, size), -1, jnp.int32),
            length=jnp.zeros(rows, jnp.int32),
            end=jnp.int32(0),
        )

    @property
    def group(self) -> int:
        """G, rows per window."""
        return len(self.source) // len(self.self_attention[0].k)

    def append(self, layer: int, new: KeysValues) -> KeysValues:
        """Returns a layer's buffers with `new` [R,H,n,K] written, for which there must be room before the last one."""

        def write(buffer: jax.Array, new: jax.Array) -> jax.Array:
            places = ops.pack(new.reshape(len(buffer), self.group, *new.shape[1:])).astype(buffer.dtype)
            at = self.end % self.source.shape[1] * self.group
            return jax.lax.dynamic_update_slice_in_dim(buffer, places, at, axis=-2)

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

    def keep(self, n: int, kept: jax.Array) -> KVCache:
        """Returns the cache with the first `kept` [R] of each row's last n positions; the others become gaps.

        What no row keeps is written again. The ring must not have come round yet.
        """
        position = jnp.arange(self.source.shape[1]) - (self.end - n)
        dropped = (position >= kept[:, None]) & (position < n)
        return replace(
            self,
            source=jnp.where(dropped, -1, self.source),
            length=self.length - n + kept,
            end=self.end - n + kept.max(),
        )

    def closed_up(self, going: jax.Array) -> KVCache:
        """Moves keys and values together, so that no `going` [R] row, each of a window of its own, has gaps at the end.

        The ring must not have come round yet.
        """
        position, end = jnp.arange(self.source.shape[1]), jnp.where(going, self.length, 0).max()
        order = jnp.roll(jnp.argsort(self.source >= 0, axis=1, stable=True), end, axis=1)  # gaps, then what is read

        def move(buffer: jax.Array) -> jax.Array:
            places = jnp.expand_dims(order, [*range(1, buffer.ndim - 2), -1])
            return jnp.take_along_axis(buffer, places, axis=-2)

        reads = (position >= end - self.length[:, None]) & (position < end)
        return replace(
            self,
            self_attention=jax.tree.map(move, self.self_attention),
            source=jnp.where(reads, 0, -1),
            end=end,
        )

    def reorder(self, rows: jax.Array) -> KVCache:
        """Row i goes on from what row `rows[i]` of the same window has read, as in beam search."""
        return replace(self, source=self.source[rows], length=self.length[rows])

    def repeat(self, group: int) -> KVCache:
        """Makes each row of its own window into `group` rows that share the window, and what was written so far."""

        def with_room(x: jax.Array) -> jax.Array:
            """A place for each of the rows at each position, the first one filled."""
            apart = x[..., None, :]
            room = [(0, 0)] * (apart.ndim - 2) + [(0, group - 1), (0, 0)]
            return jax.lax.collapse(jnp.pad(apart, room), x.ndim - 2, x.ndim)

        return replace(
            self,
            self_attention=jax.tree.map(with_room, self.self_attention),
            source=jnp.repeat(self.source, group, axis=0),
            length=jnp.repeat(self.length, group),
        )
