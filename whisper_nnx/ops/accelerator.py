"""The operations on GPUs and TPUs: what differs from `reference.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from whisper_nnx.ops import fused, int8_attention, reference
from whisper_nnx.ops.implementation import Implementation
from whisper_nnx.ops.reference import precision_of, scale_and_shift


def flat_matmul(x: jax.Array, matrix: jax.Array, dtype: Any = None) -> jax.Array:
    """x [...,K], matrix [K,N] -> [...,N]: as one product of two matrices, whose gradient needs no transposed copies."""
    rows = x.reshape(-1, x.shape[-1])
    product = jnp.matmul(rows, matrix, precision=precision_of(x.dtype), preferred_element_type=dtype)
    return product.reshape(*x.shape[:-1], matrix.shape[-1])


def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, scale: jax.Array | None) -> jax.Array:
    return scale_and_shift(flat_matmul(x, kernel.astype(x.dtype)), bias, scale)


def unembed(x: jax.Array, table: jax.Array, scale: jax.Array | None) -> jax.Array:
    return flat_matmul(x, reference.rescaled(table, scale, x.dtype).T, jnp.float32)


def unembedding(table: jax.Array, scale: jax.Array | None, dtype: Any, rows: int) -> Callable[[jax.Array], jax.Array]:
    matrix = reference.rescaled(table, scale, dtype).T
    return lambda x: flat_matmul(x, matrix, jnp.float32)


# The token loop's cache. Positions first and heads side by side [B,T,D] fill the registers of a TPU, whose last axis is
# 128 wide; heads apart [B,H,T,K] would leave half of them empty, and take a reduction where this takes a product.


def pack(x: jax.Array) -> jax.Array:
    """Keys or values [B,G,H,T,K] -> [B,T*G,D]."""
    windows, group, _, positions, _ = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(windows, positions * group, -1)


def pack_audio(x: jax.Array) -> jax.Array:
    """[B,H,T,K] -> [B,T,D]."""
    return x.swapaxes(1, 2).reshape(len(x), x.shape[2], -1)


def unpack(stored: jax.Array, heads: int) -> jax.Array:
    """[B,T,D] -> [B,H,T,K]."""
    if stored.ndim == 4:
        return stored
    return stored.reshape(*stored.shape[:2], heads, -1).swapaxes(1, 2)


def cached_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, source: jax.Array | None, end: jax.Array | int
) -> jax.Array:
    """q [B,H,Q,K], k and v [B,S*G,D], source [B*G,S], Q = G*n; without source k and v [B,T,D] -> [B,H,Q,K]."""
    if source is None:
        return fused.cached_attention(q, k, v, None, end or k.shape[1], one_product)
    group, size = len(source) // len(q), source.shape[1]
    mask = reference.cache_mask(source, end, q.shape[2] // group, group, size)
    return fused.cached_attention(q, k, v, mask, jnp.minimum(end, size) * group, one_product)


def one_product(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, length: jax.Array | int) -> jax.Array:
    """One product for all heads of a window: each query is as wide as all heads, and zero outside its own.

    Reading the keys takes longer than multiplying them. Where a mesh divides the heads, each has its own product, or
    the devices would have to sum the scores. Arguments as in `fused.cached_attention`.
    """
    windows, heads, queries, width = q.shape
    if mask is None and not (isinstance(length, int) and length == k.shape[1]):
        mask = jnp.arange(k.shape[1]) < length
    k, v = reference.operands(q, k, v)
    product = partial(jnp.einsum, precision=precision_of(k.dtype))
    q_scaled = (q * width**-0.5).astype(k.dtype)
    if by_heads := fused.is_split(q):
        k, v = (x.reshape(windows, -1, heads, width) for x in (k, v))
        scores = product("bhqk,bthk->bhqt", q_scaled, k, preferred_element_type=jnp.float32)
    else:
        own = jnp.eye(heads, dtype=k.dtype)[:, None, :, None]
        wide = (q_scaled[:, :, :, None] * own).reshape(windows, heads * queries, -1)
        scores = product("bqd,btd->bqt", wide, k, preferred_element_type=jnp.float32)
        scores = scores.reshape(windows, heads, queries, -1)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    if by_heads:
        return product("bhqt,bthk->bhqk", weights, v).astype(q.dtype)
    attended = product("bqt,btd->bqd", weights.reshape(windows, heads * queries, -1), v)
    return jnp.einsum("bhqhk->bhqk", attended.reshape(windows, heads, queries, heads, width)).astype(q.dtype)


def key() -> str:
    """Where a kernel of these modules does not work, programs are others; on a CPU they are lowered without."""
    if jax.default_backend() == "cpu":
        return ""
    usable = fused.usable(), fused.usable_for_cache(), int8_attention.usable()
    return "; ".join(" ".join(platforms) for platforms in usable)


def create() -> Implementation:
    operations = replace(
        reference.create(),
        name="accelerator",
        linear=linear,
        unembed=unembed,
        unembedding=unembedding,
        cached_attention=cached_attention,
        pack=pack,
        pack_audio=pack_audio,
        unpack=unpack,
        heads_axis=-1,
        audio_multiple=32,  # rows of a TPU's tile in 8 bits; others would be copied before each product
        attention=fused.attention,
        key=key,
    )
    return for_gpus(operations) if jax.default_backend() == "gpu" else operations


def for_gpus(operations: Implementation) -> Implementation:
    """The operations with what differs on GPUs."""

    def reads_written(dtype: Any) -> bool:
        return fused.is_half(dtype) and "cuda" in fused.usable_for_cache()

    return replace(operations, audio_multiple=1, reads_written=reads_written)
