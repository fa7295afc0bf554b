"""The operations on CPUs: XLA's own where it is fast, else the kernels in C++, on a single device.

In bfloat16 only the operands of products are rounded, and sums are float32: only then does XLA use the matrix units,
and what comes next computes in float32 in any case.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from whisper_nnx.ops import accelerator, reference
from whisper_nnx.ops.cpu import kernels
from whisper_nnx.ops.implementation import Implementation
from whisper_nnx.ops.reference import (
    attention_scores,
    cache_mask,
    operands,
    precision_of,
    rescaled,
    scale_and_shift,
)
from whisper_nnx.ops.warping import warp_by_diagonals

Dtype = Any

_FEW_ROWS = 4  # below this, XLA multiplies bfloat16 in a loop that is 10 times slower
_KERNEL_ROWS = 32  # above this, XLA's own matmul is faster
_FEW_QUERIES = 32  # a step of the token loop, or a chunk of its prompt
_CACHED = 2**20  # number of scores up to which attention stays in a core's cache uncut
_SPANS = (64, 128, 256)  # text positions read: the first of these that covers those that are written


def kernels_usable() -> bool:
    """Whether the kernels may compute what is traced now."""
    return jax.device_count() == 1 and kernels.usable()


def key() -> str:
    """Another number of devices, or a processor with other kernels, runs other programs."""
    used = kernels_usable()
    return f"{jax.device_count() == 1} {used} {used and kernels.multiplies_bfloat16()}"


# Matmuls.


def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, scale: jax.Array | None) -> jax.Array:
    if kernel.dtype == jnp.int8 and _has_few_rows(x) and kernels.can_multiply_layer(kernel) and kernels_usable():
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        product = kernels.layer_product(rows, kernel).reshape(*x.shape[:-1], kernel.shape[-1])
    else:
        product = flat_matmul(x, kernel.astype(x.dtype))
    return scale_and_shift(product, bias, scale)


def flat_matmul(x: jax.Array, matrix: jax.Array, dtype: Dtype = None) -> jax.Array:
    """x [...,K], matrix [K,N] -> [...,N] of `dtype`, default: float32 for bfloat16, else that of x."""
    if x.dtype == jnp.bfloat16:
        dtype = jnp.float32
        if x.size < _FEW_ROWS * x.shape[-1]:
            x, matrix = x.astype(jnp.float32), matrix.astype(jnp.float32)
    return accelerator.flat_matmul(x, matrix, dtype)


def embed(ids: jax.Array, table: jax.Array, scale: jax.Array | None) -> jax.Array:
    """XLA would convert the whole bfloat16 table first; the kernel reads only the requested rows."""
    if table.dtype == jnp.bfloat16 and kernels.can_multiply_table(table) and kernels_usable():
        return kernels.table_rows(table, ids.reshape(-1)).reshape(*ids.shape, -1)
    return reference.embed(ids, table, scale)


def unembed(x: jax.Array, table: jax.Array, scale: jax.Array | None) -> jax.Array:
    """A few rows take as long as reading the table."""
    if _takes_kernel(x, table):
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        product = kernels.table_product(rows, table)
    elif x.size == x.shape[-1] and table.dtype.itemsize < 4:
        # XLA converts operands while it multiplies if they are contiguous along the sum. Without the barrier it would
        # convert the whole table before a loop, whose steps would then read more.
        rows, table = jax.lax.optimization_barrier((x.reshape(1, -1).astype(jnp.float32), table))
        product = jnp.matmul(rows, table.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST)
    else:
        return flat_matmul(x, rescaled(table, scale, x.dtype).T, jnp.float32)
    return scale_and_shift(product.reshape(*x.shape[:-1], len(table)), None, scale)


def unembedding(table: jax.Array, scale: jax.Array | None, dtype: Dtype, rows: int) -> Callable[[jax.Array], jax.Array]:
    """With more rows than a kernel takes, bfloat16 is laid out for the CPU's matrix units."""
    least = _KERNEL_ROWS + 1 if kernels_usable() else _FEW_ROWS
    if dtype != jnp.bfloat16 or rows < least:
        return lambda x: unembed(x, table, scale)
    matrix = with_layout_constraint(rescaled(table, scale, dtype).T, Layout((0, 1)))
    return lambda x: flat_matmul(x, matrix, jnp.float32)


def _has_few_rows(x: jax.Array) -> bool:
    return x.size <= _KERNEL_ROWS * x.shape[-1]


def _takes_kernel(x: jax.Array, table: jax.Array) -> bool:
    return _has_few_rows(x) and kernels.can_multiply_table(table) and kernels_usable()


# Attention.


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    if mask is None and _attends_by_kernel(k, q.shape[2]):
        return _attention_by_kernel(q, k, v, jnp.full(len(q), k.shape[2], jnp.int32))
    if mask is None and k.dtype == jnp.float32 and len(q) == 1 and q.shape[2] * k.shape[2] > _CACHED:
        return _in_pieces(q, k, v)
    to = q.dtype
    if k.dtype == jnp.bfloat16:  # row-major, or XLA does not use the matrix units
        q, k, v = (with_layout_constraint(x, Layout((0, 1, 2, 3))) for x in (q.astype(k.dtype), k, v))
    scores = attention_scores(q, k)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    precision = precision_of(v.dtype)
    attended = jnp.einsum("bhst,bhtk->bhsk", weights, v, precision=precision, preferred_element_type=jnp.float32)
    return attended.astype(to)


def cached_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, source: jax.Array | None, end: jax.Array | int
) -> jax.Array:
    """The kernel reads what each row reads; XLA all places that are written, rounded up."""
    if source is None:
        return attention(q, k, v) if _attends_by_kernel(k, q.shape[2]) else attention(q, *operands(q, k, v))
    group, size = len(source) // len(q), source.shape[1]
    n = q.shape[2] // group
    if n == 1 and _attends_by_kernel(k):
        queries = (q * q.shape[-1] ** -0.5).astype(jnp.float32)
        return kernels.cached_attention(queries, k, v, source, jnp.asarray(end)).astype(q.dtype)
    spans = [*(span for span in _SPANS if span < size), size]

    def attend(span: int, q: jax.Array, k: jax.Array, v: jax.Array, source: jax.Array, end: jax.Array) -> jax.Array:
        keys, values = (x[:, :, : span * group] for x in (k, v))
        return attention(q, keys, values, cache_mask(source[:, :span], end, n, group, size))

    ways = [partial(attend, span) for span in spans]
    return jax.lax.switch(jnp.searchsorted(jnp.array(spans), jnp.minimum(end, size)), ways, q, k, v, source, end)


def _attends_by_kernel(k: jax.Array, queries: int = 1) -> bool:
    if not (kernels.can_attend(k) and kernels_usable()):
        return False
    return queries <= _FEW_QUERIES or k.dtype == jnp.float32 or kernels.multiplies_bfloat16()


def _attention_by_kernel(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
    """lengths [B]: how many of the keys and values of each row count."""
    queries = (q * q.shape[-1] ** -0.5).astype(jnp.float32)
    flat = (x.reshape(-1, *x.shape[2:]) for x in (queries, k, v))
    return kernels.attention(*flat, jnp.repeat(lengths, q.shape[1])).reshape(q.shape).astype(q.dtype)


def _in_pieces(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """One float32 window, head by head, in halves where S is even, so that scores stay in a core's cache."""
    _, heads, n, width = q.shape
    pieces = 2 - n % 2

    def attend(piece: jax.Array) -> jax.Array:
        """Attention of one piece [n/2,K]; dividing by the sums last takes fewer divisions."""
        head = piece // pieces
        scores = attention_scores(queries[piece][None, None], k[:, head][None])[0, 0]
        weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        attended = jnp.matmul(weights, v[0, head], precision=jax.lax.Precision.HIGHEST)
        return attended / weights.sum(axis=-1, keepdims=True)

    queries = q.reshape(heads * pieces, n // pieces, width)
    return jax.lax.map(attend, jnp.arange(heads * pieces)).reshape(q.shape).astype(q.dtype)


def cache_dtypes(dtype: Dtype) -> tuple[Dtype, Dtype]:
    """XLA reads float32 fastest; the kernel reads the audio's keys and values in bfloat16 twice as fast."""
    return jnp.float32, dtype if jnp.dtype(dtype) == jnp.bfloat16 and kernels_usable() else jnp.float32


# The rest.


def argmax(logits: jax.Array) -> jax.Array:
    """As two plain reductions: XLA compiles argmax to a slow loop."""
    positions, last = jnp.arange(logits.shape[-1]), logits.shape[-1] - 1
    return jnp.where(logits == logits.max(axis=-1, keepdims=True), positions, last).min(axis=-1)


def first_positions(cost: jax.Array, n: jax.Array, m: jax.Array) -> jax.Array:
    counts = jnp.stack([jnp.asarray(n, jnp.int32), jnp.asarray(m, jnp.int32)])
    return (kernels.first_positions if kernels_usable() else warp_by_diagonals)(cost, counts)


def create() -> Implementation:
    return Implementation(
        name="cpu",
        linear=linear,
        embed=embed,
        unembed=unembed,
        unembedding=unembedding,
        attention=attention,
        cached_attention=cached_attention,
        pack=reference.pack,
        pack_audio=reference.pack_audio,
        unpack=reference.unpack,
        heads_axis=1,
        argmax=argmax,
        first_positions=first_positions,
        cache_dtypes=cache_dtypes,
        key=key,
        window_by_window=jax.device_count() == 1,
    )
