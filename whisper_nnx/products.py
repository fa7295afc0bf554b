"""Matrix products and attention, computed in the way that the processor at hand does best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

Dtype = Any
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]

_FEW_ROWS = 4  # with fewer, XLA's CPU compiler leaves bfloat16 to a loop of its own, 10 times slower
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


def cache_dtype(dtype: Dtype) -> Dtype:
    """Of keys and values that are read once for each token: CPUs read bfloat16 slower than float32, others do not."""
    return jnp.float32 if on_cpu() else dtype


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


def is_narrow_row(x: jax.Array, table: jax.Array) -> bool:
    """Whether `narrow_row` is the fastest way to multiply x [...,K] and a table [N,K]."""
    return on_cpu() and x.size == x.shape[-1] and table.dtype.itemsize < 4


def narrow_row(x: jax.Array, table: jax.Array) -> jax.Array:
    """x [...,K] of a single row, table [N,K] of 8 or 16 bits -> [...,N], float32: as fast as the table can be read.

    XLA's CPU compiler widens numbers as it multiplies them, if they lie along K. The barrier keeps it from widening all
    of the table before a loop, whose steps then would read two or four times as much.
    """
    row, table = jax.lax.optimization_barrier((x.reshape(1, -1).astype(jnp.float32), table))
    product = jnp.matmul(row, table.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST)
    return product.reshape(*x.shape[:-1], len(table))


def prepared(table: jax.Array, rows: int) -> jax.Array | None:
    """The right factor of a loop's products, laid out for the CPU's matrix units; None where nothing is to prepare."""
    units = table.dtype == jnp.bfloat16 and on_cpu() and rows >= _FEW_ROWS
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


def within(span: jax.Array, attend: Attend) -> Attend:
    """`attend` to the first `span` of the keys and values at most: on CPUs what lies behind is not even read.

    On accelerators, which read fast and decide slowly, all are read; the mask decides what counts in either case.
    """

    def attend_within(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
        assert mask is not None
        sizes = [*(n for n in _SPANS if n < k.shape[2]), k.shape[2]]
        ways = [lambda q, k, v, mask, n=n: attend(q, k[:, :, :n], v[:, :, :n], mask[..., :n]) for n in sizes]
        return jax.lax.switch(jnp.searchsorted(jnp.array(sizes), span), ways, q, k, v, mask)

    return attend_within if on_cpu() else attend
