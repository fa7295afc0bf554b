"""The operations on GPUs and TPUs: what differs from `reference.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from whisper_nnx.ops import reference
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


def create() -> Implementation:
    plain = reference.create()
    return replace(plain, name="accelerator", linear=linear, unembed=unembed, unembedding=unembedding)
