"""Cross-entropy fused with the output projection, in blocks of labels, so that all logits never exist at once."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from whisper_nnx.training.loss import Mean
from whisper_nnx.training.products import dot, transposed

_Sums = tuple[jax.Array, jax.Array, jax.Array]
_ROWS = 512  # labels per block; each block adds to the table's gradient of V * D numbers


def projected_cross_entropy(
    hidden: jax.Array, table: jax.Array, labels: jax.Array, weights: jax.Array, smoothing: float, dtype: str
) -> tuple[Mean, Mean]:
    """`loss.cross_entropy` of logits = hidden [B,S,D] table [D,V], operands of `dtype`. Does not support `jax.jvp`."""
    total, right = _losses(hidden, table, labels, weights, smoothing, dtype)
    return Mean(total, weights.sum()), Mean(right, weights.sum())


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _losses(
    hidden: jax.Array, table: jax.Array, labels: jax.Array, weights: jax.Array, smoothing: float, dtype: str
) -> tuple[jax.Array, jax.Array]:
    """Returns (sum of losses, sum of the weights of labels that are the most likely token)."""
    return _forward(hidden, table, labels, weights, smoothing, dtype)[0]


def _forward(
    hidden: jax.Array, table: jax.Array, labels: jax.Array, weights: jax.Array, smoothing: float, dtype: str
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Returns both sums, and the gradient of the first, computed while its logits exist."""
    narrow, count = table.astype(dtype), table.shape[1]
    turned = transposed(narrow)

    def piece(carry: _Sums, of: tuple[jax.Array, ...]) -> tuple[_Sums, jax.Array]:
        total, right, of_table = carry
        h, label, weight = of
        logits = dot(h, narrow)
        top = logits.max(axis=-1, keepdims=True)
        normalizer = top + jnp.log(jnp.exp(logits - top).sum(axis=-1, keepdims=True))
        hit = jnp.arange(count) == label[:, None]
        chosen = jnp.where(hit, logits, 0).sum(axis=-1)
        loss = normalizer[:, 0] - (1 - smoothing) * chosen
        if smoothing:
            loss -= smoothing * logits.mean(axis=-1)
        target = jnp.where(hit, 1 - smoothing, 0) + smoothing / count
        gradient = ((jnp.exp(logits - normalizer) - target) * weight[:, None]).astype(dtype)
        carry = (
            total + (loss * weight).sum(),
            right + ((top[:, 0] <= chosen) * weight).sum(),
            of_table + dot(transposed(h), gradient),
        )
        return carry, dot(gradient, turned)

    n = labels.size
    pieces = -(-n // _ROWS)

    def cut(x: jax.Array) -> jax.Array:
        """Splits [N,...] into [pieces,N / pieces,...]; padding has weight 0."""
        x = x.reshape(n, *x.shape[2:])
        size = -(-n // pieces)
        return jnp.pad(x, ((0, pieces * size - n), *[(0, 0)] * (x.ndim - 1))).reshape(pieces, size, *x.shape[1:])

    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero, jnp.zeros(table.shape, jnp.float32))
    parts = tuple(map(cut, (hidden.astype(dtype), labels, weights)))
    (total, right, of_table), of_hidden = jax.lax.scan(piece, start, parts)
    of_hidden = of_hidden.reshape(-1, hidden.shape[-1])[:n].reshape(hidden.shape)
    return (total, right), (of_hidden.astype(hidden.dtype), of_table.astype(table.dtype))


def _backward(
    smoothing: float, dtype: str, gradients: tuple[jax.Array, ...], of_sums: tuple[jax.Array, ...]
) -> tuple[jax.Array | None, ...]:
    of_hidden, of_table = gradients
    of_total, _ = of_sums  # the accuracy has no gradient
    return of_hidden * of_total.astype(of_hidden.dtype), of_table * of_total.astype(of_table.dtype), None, None


_losses.defvjp(_forward, _backward)
