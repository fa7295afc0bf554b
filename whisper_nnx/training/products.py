"""Matmuls and attention with custom gradients that are fast on a single CPU.

Operands may be rounded to bfloat16, for processors that multiply it faster (Intel AMX, AMD since Zen 4).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from whisper_nnx import ops
from whisper_nnx.ops.reference import precision_of, scale_and_shift

_ROW_BY_ROW = Layout(major_to_minor=(0, 1))
_barrier = jax.lax.optimization_barrier  # keeps XLA from repeating the rounding inside each matmul


@cache
def training_ops(base: ops.Implementation, dtype: str, rounds: bool) -> ops.Implementation:
    """Returns the operations of a training step: those of `base`, with custom gradients.

    rounds: linear layers round their operands to bfloat16. If `base` splits work to fit a core's cache, unmasked
    attention processes one head at a time, with operands of `dtype`: only one head's scores exist at a time, and none
    are stored for the gradient.
    """
    if rounds:
        base = replace(base, name=f"{base.name}, rounded", linear=_linear)
    if base.window_by_window:
        base = replace(base, name=f"{base.name}, by head", attention=partial(_attend, base, dtype))
    return base


def _linear(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, scale: jax.Array | None) -> jax.Array:
    flat = product(x.reshape(-1, x.shape[-1]), kernel)
    return scale_and_shift(flat.reshape(*x.shape[:-1], kernel.shape[-1]), bias, scale)


@jax.custom_vjp
def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiplies x [N,I] by w [I,O] in x's dtype, with bfloat16 operands and float32 sums, also in the gradient.

    XLA's CPU compiler uses the matrix units only for row-major operands and a float32 result. Its own gradient of such
    a matmul has neither, hence the explicit transposes. Does not support `jax.jvp`.
    """
    return _forward(x, w)[0]


def _forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    rounded = _barrier((x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)))
    kinds = jnp.zeros((0,), x.dtype), jnp.zeros((0,), w.dtype)
    return dot(*rounded).astype(x.dtype), (*rounded, *kinds)


def _backward(residuals: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w, of_x, of_w = residuals
    g = _barrier(gradient.astype(jnp.bfloat16))
    # Transposes the narrower of the two long operands; XLA would undo a transpose inside the matmul.
    dw = dot(transposed(x), g) if x.shape[1] <= g.shape[1] else _barrier(_rows(dot(transposed(g), x))).T
    return dot(g, transposed(w)).astype(of_x.dtype), dw.astype(of_w.dtype)


product.defvjp(_forward, _backward)


def _attend(
    base: ops.Implementation, dtype: str, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """Computes `ops.attention` one head at a time."""
    if mask is not None:
        return base.attention(q, k, v, mask)
    heads = (x.reshape(-1, *x.shape[2:]) for x in (q * q.shape[-1] ** -0.5, k, v))
    return jax.lax.map(lambda head: attend(*head, dtype), tuple(heads)).reshape(q.shape)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend(q: jax.Array, k: jax.Array, v: jax.Array, dtype: str) -> jax.Array:
    """Attends from q [S,K], scaled, to k and v [T,K]; returns [S,K]. Operands of `dtype`, sums and softmax in float32.

    The gradient recomputes the scores instead of storing them (Dao et al. 2022, without blocks).
    """
    return _attend_forward(q, k, v, dtype)[0]


def _attend_forward(q: jax.Array, k: jax.Array, v: jax.Array, dtype: str) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    factors = qr, kr, vr = _barrier(tuple(x.astype(dtype) for x in (q, k, v)))
    scores = dot(qr, transposed(kr))
    top = scores.max(axis=-1, keepdims=True)
    parts = jnp.exp(scores - top)
    total = parts.sum(axis=-1, keepdims=True)
    attended = (dot(parts.astype(dtype), vr) / total).astype(q.dtype)
    return attended, (*factors, top + jnp.log(total), attended, *(jnp.zeros((0,), x.dtype) for x in (k, v)))


def _attend_backward(dtype: str, residuals: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, ...]:
    q, k, v, log_total, attended, of_k, of_v = residuals
    g = gradient.astype(dtype)
    weights = jnp.exp(dot(q, transposed(k)) - log_total)
    mean = (gradient.astype(jnp.float32) * attended).sum(axis=-1, keepdims=True)
    of_scores = weights * (dot(g, transposed(v)) - mean)
    weights, of_scores = _barrier((weights.astype(dtype), of_scores.astype(dtype)))
    # [K,T], so that the narrow operand is transposed.
    dk, dv = _barrier((_rows(dot(transposed(q), of_scores)), _rows(dot(transposed(g), weights))))
    return dot(of_scores, k).astype(attended.dtype), dk.T.astype(of_k.dtype), dv.T.astype(of_v.dtype)


attend.defvjp(_attend_forward, _attend_backward)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiplies a [M,K] by b [K,N]; returns [M,N], float32."""
    return jnp.dot(a, b, precision=precision_of(a.dtype), preferred_element_type=jnp.float32)


def _rows(x: jax.Array) -> jax.Array:
    """Forces a row-major layout on CPU; elsewhere the compiler chooses."""
    return with_layout_constraint(x, _ROW_BY_ROW) if jax.default_backend() == "cpu" else x


def transposed(x: jax.Array) -> jax.Array:
    """Transposes x [M,N] for `dot`: row-major, except float32, which is multiplied in any layout."""
    return x.T if x.dtype == jnp.float32 else _rows(x.T)
