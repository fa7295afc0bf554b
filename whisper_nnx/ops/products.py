"""Matrix products and attention, computed in the way that the processor at hand does best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from whisper_nnx.ops.cpu import kernels

Dtype = Any
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]

_FEW_ROWS = 4  # with fewer, XLA's CPU compiler leaves bfloat16 to a loop of its own, 10 times slower
_KERNEL_ROWS = 32  # of a product with more, XLA's own is faster
_FEW_QUERIES = 32  # a step of the token loop, or a chunk of its prompt
_CACHED = 2**20  # scores of an attention that need not be cut to stay in a core's cache
_SPANS = (64, 128, 256)  # text positions that are read while there are no more


def precision_of(dtype: Dtype) -> jax.lax.Precision | None:
    """A float32 product is asked for as such: GPUs and TPUs would otherwise round its factors to 10 or 8 bits."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def on_cpu() -> bool:
    """Whether what is traced now is for a CPU."""
    return jax.default_backend() == "cpu"


def on_single_cpu() -> bool:
    """Whether one CPU does everything: then work may be cut into pieces that stay in its cache."""
    return on_cpu() and jax.device_count() == 1


def kernels_usable() -> bool:
    """Whether our kernels may do what is traced now."""
    return on_single_cpu() and kernels.usable()


def cache_dtype(dtype: Dtype) -> Dtype:
    """Of the text's keys and values, which are read once for each token: XLA's CPU compiler reads float32 fastest."""
    return jnp.float32 if on_cpu() else dtype


def cross_cache_dtype(dtype: Dtype) -> Dtype:
    """Of the sound's keys and values: our kernel reads bfloat16 twice as fast as float32."""
    return dtype if jnp.dtype(dtype) == jnp.bfloat16 and kernels_usable() else cache_dtype(dtype)


def flat_product(x: jax.Array, kernel: jax.Array, *_: Any, **options: Any) -> jax.Array:
    """x [...,n_in], kernel [n_in,n_out] -> [...,n_out]: one flat product, as `nnx.Linear` calls it.

    XLA computes its gradient without transposed copies. On CPUs the product of factors in bfloat16 is float32: only
    then are their matrix units used, and what comes next computes in float32 in any case.
    """
    rows = x.reshape(-1, x.shape[-1])
    if x.dtype == jnp.bfloat16 and on_cpu():
        options["preferred_element_type"] = jnp.float32
        if len(rows) < _FEW_ROWS:
            rows, kernel = rows.astype(jnp.float32), kernel.astype(jnp.float32)
    product = jnp.matmul(rows, kernel, **options)
    return product.reshape(*x.shape[:-1], kernel.shape[-1])


def rows_at(table: jax.Array, ids: jax.Array) -> jax.Array:
    """The rows [...,D] of a table [V,D] at ids [...], for which XLA's CPU compiler widens all of a bfloat16 table."""
    if table.dtype == jnp.bfloat16 and kernels.can_multiply_table(table) and kernels_usable():
        return kernels.table_rows(table, ids.reshape(-1)).reshape(*ids.shape, -1)
    return table[ids]


def multiplies_few(x: jax.Array, table: jax.Array) -> bool:
    """Whether `few_rows_product` is the fastest way to multiply x [...,K] and a table [N,K]."""
    return _takes_kernel(x, table) or (x.size == x.shape[-1] and on_cpu() and table.dtype.itemsize < 4)


def _has_few_rows(x: jax.Array) -> bool:
    return x.size <= _KERNEL_ROWS * x.shape[-1]


def _takes_kernel(x: jax.Array, table: jax.Array) -> bool:
    return _has_few_rows(x) and kernels.can_multiply_table(table) and kernels_usable()


def few_rows_product(x: jax.Array, table: jax.Array) -> jax.Array:
    """x [...,K] of a few rows, table [N,K] of 8, 16 or 32 bits -> [...,N], float32: as fast as the table can be read.

    Without kernels it is for a single row. XLA's CPU compiler widens numbers as it multiplies them, if they lie along
    K. The barrier keeps it from widening all of the table before a loop, whose steps then would read much more.
    """
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    if _takes_kernel(x, table):
        product = kernels.table_product(rows, table)
    else:
        rows, table = jax.lax.optimization_barrier((rows, table))
        product = jnp.matmul(rows, table.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST)
    return product.reshape(*x.shape[:-1], len(table))


def narrow_product(x: jax.Array, kernel: jax.Array) -> jax.Array | None:
    """x [...,n_in] of a few rows, kernel [n_in,n_out] of 8 bits -> [...,n_out], float32; None for more rows."""
    if not (_has_few_rows(x) and kernels.can_multiply_layer(kernel) and kernels_usable()):
        return None
    product = kernels.layer_product(x.reshape(-1, x.shape[-1]).astype(jnp.float32), kernel)
    return product.reshape(*x.shape[:-1], kernel.shape[-1])


def prepared(table: jax.Array, rows: int) -> jax.Array | None:
    """The right factor of a loop's products, laid out for the CPU's matrix units; None where nothing is to prepare."""
    least = _KERNEL_ROWS + 1 if kernels_usable() else _FEW_ROWS
    units = table.dtype == jnp.bfloat16 and on_cpu() and rows >= least
    return with_layout_constraint(table, Layout((0, 1))) if units else None


def attention_scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """q [B,H,S,K], k [B,H,T,K] -> [B,H,S,T], float32, before the softmax."""
    q = (q * q.shape[-1] ** -0.5).astype(k.dtype)
    return jnp.einsum("bhsk,bhtk->bhst", q, k, precision=precision_of(q.dtype), preferred_element_type=jnp.float32)


def dot_product_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """q [B,H,S,K], k and v [B,H,T,K], mask broadcastable to [B,H,S,T] (True: attend) -> [B,H,S,K] of q's dtype.

    The scores and their softmax are float32, whatever the inputs are; products are of factors of the keys' dtype.
    """
    to = q.dtype
    if mask is None and _attends_by_kernel(k, q.shape[2]):
        return _attention_by_kernel(q, k, v, jnp.full(len(q), k.shape[2], jnp.int32))
    if mask is None and k.dtype == jnp.float32 and on_cpu() and len(q) == 1 and q.shape[2] * k.shape[2] > _CACHED:
        return _in_pieces(q, k, v)
    if k.dtype == jnp.bfloat16 and on_cpu():  # laid out in order, or XLA does without the matrix units
        q, k, v = (with_layout_constraint(x, Layout((0, 1, 2, 3))) for x in (q.astype(k.dtype), k, v))
    scores = attention_scores(q, k)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    sums = jnp.float32 if on_cpu() else None
    precision = precision_of(v.dtype)
    return jnp.einsum("bhst,bhtk->bhsk", weights, v, precision=precision, preferred_element_type=sums).astype(to)


def _attends_by_kernel(k: jax.Array, queries: int = 1) -> bool:
    if not (kernels.can_attend(k) and kernels_usable()):
        return False
    return queries <= _FEW_QUERIES or k.dtype == jnp.float32 or kernels.multiplies_bfloat16()


def _attention_by_kernel(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
    """lengths [B]: of the keys and values of each row, so many count."""
    queries = (q * q.shape[-1] ** -0.5).astype(jnp.float32)
    flat = (x.reshape(-1, *x.shape[2:]) for x in (queries, k, v))
    return kernels.attention(*flat, jnp.repeat(lengths, q.shape[1])).reshape(q.shape).astype(q.dtype)


def _in_pieces(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Of one window, in float32: head by head, in halves where S is even, so that scores stay in a core's cache."""
    _, heads, n, width = q.shape
    pieces = 2 - n % 2

    def attend(piece: jax.Array) -> jax.Array:
        """[n/2,K]; divides by the sums last, when less is left to divide."""
        head = piece // pieces
        scores = attention_scores(queries[piece][None, None], k[:, head][None])[0, 0]
        weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        attended = jnp.matmul(weights, v[0, head], precision=jax.lax.Precision.HIGHEST)
        return attended / weights.sum(axis=-1, keepdims=True)

    queries = q.reshape(heads * pieces, n // pieces, width)
    return jax.lax.map(attend, jnp.arange(heads * pieces)).reshape(q.shape).astype(q.dtype)


def within(spans: jax.Array, attend: Attend) -> Attend:
    """`attend` to the first `spans` [B] of the keys and values at most: on CPUs what lies behind is not even read.

    On accelerators, which read fast and decide slowly, all are read; the mask decides what counts in either case, but
    a single query is allowed all of its row's span.
    """

    def attend_within(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
        assert mask is not None
        if q.shape[2] == 1 and _attends_by_kernel(k):
            return _attention_by_kernel(q, k, v, spans)
        sizes = [*(n for n in _SPANS if n < k.shape[2]), k.shape[2]]
        ways = [lambda q, k, v, mask, n=n: attend(q, k[:, :, :n], v[:, :, :n], mask[..., :n]) for n in sizes]
        return jax.lax.switch(jnp.searchsorted(jnp.array(sizes), spans.max()), ways, q, k, v, mask)

    return attend_within if on_cpu() else attend
