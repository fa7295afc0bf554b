"""8-bit numbers: integers from -127 to 127, with a scale for each channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from whisper_nnx.runtime.programs import exportable


@exportable
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Array:
    """An array of `dtype` as int8 `values` times `scale`, which has that dtype and broadcasts to them."""

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> Any:
        return self.scale.dtype


def quantize(x: jax.Array, axis: int, dtype: Any = jnp.float32) -> Int8Array:
    """Rounds x to 8 bits, with a scale of `dtype` for each channel: for all that differs only along `axis`.

    The largest magnitude of a channel becomes 127, so the error is at most half a scale.
    """
    x = x.astype(jnp.float32)
    least = 127 * float(jnp.finfo(dtype).tiny)
    scale = (jnp.maximum(jnp.abs(x).max(axis=axis, keepdims=True), least) / 127).astype(dtype)
    return Int8Array(jnp.round(x / scale.astype(jnp.float32)).astype(jnp.int8), scale)


def times(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x times a scale that broadcasts to it, of x's dtype."""
    return (x.astype(jnp.float32) * scale.astype(jnp.float32)).astype(x.dtype)
