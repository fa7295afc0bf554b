"""The operations in plain JAX: the definitions, without regard to any processor. `whisper_nnx.ops` documents them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from whisper_nnx.ops.implementation import Implementation
from whisper_nnx.ops.warping import warp_by_diagonals

Dtype = Any


def precision_of(dtype: Dtype) -> jax.lax.Precision | None:
    """Float32 products ask for the highest precision: GPUs and TPUs would otherwise round operands to 10 or 8 bits."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, scale: jax.Array | None) -> jax.Array:
    """x [...,n_in], kernel [n_in,n_out], bias and scale [n_out] -> [...,n_out] of x's dtype."""
    product = jnp.matmul(x, kernel.astype(x.dtype), precision=precision_of(x.dtype))
    return scale_and_shift(product, bias, scale)


def scale_and_shift(product: jax.Array, bias: jax.Array | None, scale: jax.Array | None) -> jax.Array:
    """product [...,n_out] times scale [n_out] plus bias [n_out]: what an int8 kernel and a bias add to a matmul."""
    if scale is not None:
        product = product * scale.astype(product.dtype)
    return product if bias is None else product + bias.astype(product.dtype)


def embed(ids: jax.Array, table: jax.Array, scale: jax.Array | None) -> jax.Array:
    """ids [...], table [V,D], scale [V] -> [...,D]."""
    rows = table[ids]
    return rows if scale is None else rows * scale[ids][..., None]


def unembed(x: jax.Array, table: jax.Array, scale: jax.Array | None) -> jax.Array:
    """x [...,D], table [V,D], scale [V] -> [...,V], float32."""
    table = rescaled(table, scale, x.dtype)
    return jnp.matmul(x, table.T, precision=precision_of(x.dtype), preferred_element_type=jnp.float32)


def rescaled(table: jax.Array, scale: jax.Array | None, dtype: Dtype) -> jax.Array:
    """table [V,D] times scale [V] -> [V,D] of `dtype`: dequantizes an int8 table."""
    return (table if scale is None else table * scale[:, None]).astype(dtype)


def attention_scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """q [B,H,S,K], k [B,H,T,K] -> [B,H,S,T], float32, before the softmax."""
    q = (q * q.shape[-1] ** -0.5).astype(k.dtype)
    return jnp.einsum("bhsk,bhtk->bhst", q, k, precision=precision_of(q.dtype), preferred_element_type=jnp.float32)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """q [B,H,S,K], k and v [B,H,T,K], mask broadcastable to [B,H,S,T] -> [B,H,S,K] of q's dtype."""
    scores = attention_scores(q, k)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhst,bhtk->bhsk", weights, v, precision=precision_of(v.dtype)).astype(q.dtype)


def cache_mask(source: jax.Array, end: jax.Array | int, n: int, group: int, size: int) -> jax.Array:
    """Which of the S*G places of a cache the n queries of each of R = B*G rows read: [B,1,G*n,S*G].

    source [R,S] (of a cache of `size` positions, S of them at most), end: as in `cached_attention`.
    """
    rows, positions = source.shape
    place = jnp.arange(group)
    index = ((jnp.arange(positions) - (end - n)) % size)[:, None]  # counted from the first new position
    query = jnp.arange(n)[:, None, None]
    earlier = (source[:, None, :, None] == place) & ((index >= n) | (index <= query))
    own = (index == query) & ((jnp.arange(rows) % group)[:, None, None, None] == place)  # padding reads itself alone
    return (earlier | own).reshape(rows // group, 1, group * n, positions * group)


def pack(x: jax.Array) -> jax.Array:
    """Keys or values [B,G,H,T,K] -> [B,H,T*G,K]."""
    return jax.lax.collapse(x.transpose(0, 2, 3, 1, 4), 2, 4)


def pack_audio(x: jax.Array) -> jax.Array:
    """[B,H,T,K], as it is."""
    return x


def unpack(stored: jax.Array, heads: int) -> jax.Array:
    """[B,H,T,K], as it is."""
    return stored


def operands(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """k and v as operands of matmuls: integers become q's dtype, in which they are exact."""
    return (k.astype(q.dtype), v.astype(q.dtype)) if k.dtype == jnp.int8 else (k, v)


def cached_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, source: jax.Array | None, end: jax.Array | int
) -> jax.Array:
    """q [B,H,G*n,K], k and v [B,H,S*G,K], source [B*G,S]; without source k and v [B,H,T,K] -> [B,H,G*n,K]."""
    k, v = operands(q, k, v)
    if source is None:
        return attention(q, k, v, None if end in (0, k.shape[2]) else jnp.arange(k.shape[2]) < end)
    group = len(source) // len(q)
    return attention(q, k, v, cache_mask(source, end, q.shape[2] // group, group, source.shape[1]))


def unembedding(table: jax.Array, scale: jax.Array | None, dtype: Dtype, rows: int) -> Callable[[jax.Array], jax.Array]:
    """table [V,D], scale [V] -> a function from x [rows,D] of `dtype` to logits [rows,V]."""
    return lambda x: unembed(x, table, scale)


def create() -> Implementation:
    return Implementation(
        name="reference",
        linear=linear,
        embed=embed,
        unembed=unembed,
        unembedding=unembedding,
        attention=attention,
        cached_attention=cached_attention,
        pack=pack,
        pack_audio=pack_audio,
        unpack=unpack,
        heads_axis=1,
        argmax=lambda logits: jnp.argmax(logits, axis=-1),
        first_positions=lambda cost, n, m: warp_by_diagonals(cost, jnp.stack([n, m]).astype(jnp.int32)),
        cache_dtypes=lambda dtype: (dtype, dtype),
    )
