"""Operations of the model, the token loop and word timing, by the implementation for the processor at hand.

`reference.py` is the plain form, to read and to compare with. `accelerator.py` is for GPUs and TPUs, `cpu/` for CPUs.
One of them is chosen once, by JAX's default backend; $WHISPER_NNX_OPS or `using` override that.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from importlib import import_module
from typing import Any

import jax

from whisper_nnx.ops.implementation import Implementation
from whisper_nnx.ops.int8 import Int8Array, quantize, times
from whisper_nnx.ops.reference import attention_scores, cache_mask, precision_of
from whisper_nnx.runtime.programs import key_by
from whisper_nnx.runtime.startup import OPERATIONS, chosen_operations

__all__ = [
    "Implementation",
    "Int8Array",
    "argmax",
    "attention",
    "attention_scores",
    "cache_mask",
    "cached_attention",
    "current",
    "embed",
    "first_positions",
    "linear",
    "named",
    "pack",
    "pack_audio",
    "precision_of",
    "quantize",
    "unembed",
    "unembedding",
    "unpack",
    "using",
]

_MODULES = dict(zip(OPERATIONS, ("reference", "cpu.operations", "accelerator"), strict=True))
_context = jax.make_user_context(None)  # part of the key of every jitted function


def current() -> Implementation:
    """The implementation that the current trace uses."""
    return _context.value or _default()


def using(implementation: str | Implementation) -> AbstractContextManager[Any]:
    """A context, for this thread, that uses another implementation: a name of `named`, or an `Implementation`.

    Compiled functions are not shared between implementations.
    """
    return _context(named(implementation) if isinstance(implementation, str) else implementation)


@cache
def named(name: str) -> Implementation:
    """ "reference", "cpu" or "accelerator". Raises ValueError for another name."""
    if name not in _MODULES:
        raise ValueError(f"operations {name!r} are unknown; choose one of {', '.join(_MODULES)}")
    return import_module(f"{__name__}.{_MODULES[name]}").create()


@cache
def _default() -> Implementation:
    return named(chosen_operations() or ("cpu" if jax.default_backend() == "cpu" else "accelerator"))


@key_by
def _key() -> str | None:
    """Part of the key of a stored program; None for an implementation from outside this package."""
    implementation = current()
    if implementation.name not in _MODULES or named(implementation.name) is not implementation:
        return None
    return f"{implementation.name} {implementation.key()}"


def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None, scale: jax.Array | None = None) -> jax.Array:
    """x [...,n_in], kernel [n_in,n_out], bias [n_out] -> x kernel + bias [...,n_out].

    scale [n_out]: of an int8 kernel; the product is multiplied by it.
    """
    return current().linear(x, kernel, bias, scale)


def embed(ids: jax.Array, table: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """Rows of a table [V,D] at ids [...] -> [...,D]. scale [V]: of an int8 table."""
    return current().embed(ids, table, scale)


def unembed(x: jax.Array, table: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """x [...,D], table [V,D] -> logits [...,V], float32. scale [V]: of an int8 table."""
    return current().unembed(x, table, scale)


def unembedding(table: jax.Array, scale: jax.Array | None, dtype: Any, rows: int) -> Callable[[jax.Array], jax.Array]:
    """`unembed` for all steps of a loop: x [R,D] of `dtype`, R = `rows`, -> logits. The table is prepared once."""
    return current().unembedding(table, scale, dtype, rows)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """q [B,H,S,K], k and v [B,H,T,K], mask broadcastable to [B,H,S,T] (True: attend) -> [B,H,S,K] of q's dtype.

    Scores and softmax are float32; the operands of both matmuls have the keys' dtype.
    """
    return current().attention(q, k, v, mask)


def pack(x: jax.Array) -> jax.Array:
    """Keys or values [B,G,H,T,K] of G rows of each window, in the layout of a cache: [B,H,T*G,K] or [B,T*G,D]."""
    return current().pack(x)


def pack_audio(x: jax.Array) -> jax.Array:
    """Keys or values of the audio [B,H,T,K] in that layout, with G = 1."""
    return current().pack_audio(x)


def unpack(stored: jax.Array | Int8Array, heads: int) -> jax.Array:
    """Keys or values of a cache, [B,H,T,K] or [B,T,D] -> [B,H,T,K]."""
    if isinstance(stored, Int8Array):
        values = unpack(stored.values, heads).astype(stored.dtype)
        return times(values, unpack(stored.scale, heads))
    return current().unpack(stored, heads)


def cached_attention(
    q: jax.Array,
    k: jax.Array | Int8Array,
    v: jax.Array | Int8Array,
    source: jax.Array | None = None,
    end: jax.Array | int = 0,
) -> jax.Array:
    """The attention of the token loop: q [B,H,G*n,K] to buffers k and v -> [B,H,G*n,K] of q's dtype.

    k and v, laid out by `pack`, have a place for each of the G rows of a window at each of S positions. `end` positions
    were written; the last n of them, up to `(end - 1) % S`, are those of the n queries of each row. source [B*G,S]: the
    place that each row reads at each position; -1: none. A query reads its own position, and no later one. Without
    source all rows of a window share the places, and read the first `end` of them; 0: all.

    k and v in 8 bits, with a scale for each channel: the operands of both matmuls are the integers, converted to q's
    dtype; the scales are applied to the queries and to the result, so that no other copy of k and v is needed.
    """
    if isinstance(k, Int8Array):
        assert isinstance(v, Int8Array)
        heads = q.shape[1]
        attended = cached_attention(times(q, unpack(k.scale, heads)), k.values, v.values, source, end)
        return times(attended, unpack(v.scale, heads))
    assert not isinstance(v, Int8Array)
    return current().cached_attention(q, k, v, source, end)


def argmax(logits: jax.Array) -> jax.Array:
    """logits [...,V] -> index of the first maximum [...]."""
    return current().argmax(logits)


def first_positions(cost: jax.Array, n: jax.Array, m: jax.Array) -> jax.Array:
    """Dynamic time warping over cost[:n,:m] of [N,M] -> [N]: the column where the cheapest path enters each row.

    Where the diagonal and the downward step tie, the path moves right even if that costs more, as in openai-whisper.
    """
    return current().first_positions(cost, n, m)
