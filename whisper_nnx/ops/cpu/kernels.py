"""Matmuls of a few rows and attention on the CPU: in C++ (`kernels.cc`), and the same in JAX.

The token loop reads all weights, keys and values for each token and computes little with them. XLA's CPU compiler
converts 8- and 16-bit numbers more slowly than it reads float32; these kernels run at memory speed. Self-attention over
a whole window stays in the cache, and dynamic time warping is a plain loop. The kernels are compiled once for the
machine at hand (`build.py`). If that fails, `usable()` is False; callers must check it.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp

from whisper_nnx.ops.cpu.build import load
from whisper_nnx.ops.reference import cache_mask
from whisper_nnx.ops.warping import warp_by_diagonals
from whisper_nnx.runtime.programs import register_custom_calls

_LANES = 16  # numbers that the kernels read at once
_HANDLERS = ("TableProduct", "LayerProduct", "TableRows", "Attention", "CachedAttention", "FirstPositions")
TARGETS = tuple(f"whisper_nnx.{name}" for name in _HANDLERS)  # their names in compiled programs
_KINDS = (jnp.float32, jnp.bfloat16, jnp.int8)
_HIGHEST = jax.lax.Precision.HIGHEST


_loading = threading.Lock()


def _library() -> ctypes.CDLL | None:
    with _loading:  # `cache` alone would let concurrent first calls load and register twice
        return _registered()


@cache
def _registered() -> ctypes.CDLL | None:
    library = load()
    for target, name in zip(TARGETS, _HANDLERS, strict=True) if library else ():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, f"{name}Handler")), platform="cpu")
    return library


def usable() -> bool:
    """Whether the kernels are there: they are compiled at the first call, which then takes some seconds."""
    return _library() is not None


register_custom_calls(TARGETS)


def multiplies_bfloat16() -> bool:
    """Whether `attention` of many queries to keys of bfloat16 is faster than to float32: not on every processor."""
    return (library := _library()) is not None and bool(library.MultipliesBFloat16())


def can_multiply_table(table: jax.Array) -> bool:
    """Whether `table_product` takes a table [N,K] like this."""
    return table.dtype in _KINDS and table.shape[1] % _LANES == 0


def can_multiply_layer(matrix: jax.Array) -> bool:
    """Whether `layer_product` takes a matrix [K,N] like this."""
    return matrix.dtype in _KINDS and matrix.shape[1] % (4 * _LANES) == 0


def can_attend(keys: jax.Array) -> bool:
    """Whether `attention` takes keys [...,K] like these."""
    return keys.dtype in _KINDS and keys.shape[-1] % (4 * _LANES) == 0


def kernel(name: str) -> Callable[[Callable[..., jax.Array]], Callable[..., jax.Array]]:
    """Decorates the JAX counterpart of a kernel, which also defines its derivative.

    A program that is lowered for another platform calls the counterpart itself.
    """

    def decorate(twin: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        @jax.custom_jvp
        def call(*operands: jax.Array) -> jax.Array:
            result = jax.eval_shape(twin, *operands)
            called = jax.ffi.ffi_call(f"whisper_nnx.{name}", result, vmap_method="sequential")
            return jax.lax.platform_dependent(*operands, cpu=called, default=twin)

        call.defjvp(lambda operands, tangents: jax.jvp(twin, operands, tangents))
        call.__doc__, call.twin = twin.__doc__, twin  # type: ignore[attr-defined]
        return call

    return decorate


@kernel("TableProduct")
def table_product(x: jax.Array, table: jax.Array) -> jax.Array:
    """x [R,K] float32, table [N,K] of 8, 16 or 32 bits -> x table^T [R,N], float32."""
    return jnp.matmul(x, table.astype(jnp.float32).T, precision=_HIGHEST)


@kernel("LayerProduct")
def layer_product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """x [R,K] float32, matrix [K,N] of 8, 16 or 32 bits -> [R,N], float32."""
    return jnp.matmul(x, matrix.astype(jnp.float32), precision=_HIGHEST)


@kernel("TableRows")
def table_rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of a table [N,K] of 8, 16 or 32 bits at ids [R] -> [R,K], float32; NaN for an id out of range."""
    return table.astype(jnp.float32).at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


@kernel("Attention")
def attention(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
    """q [H,S,K] float32, scaled, attends to the first `lengths` [H] (1 to T) of k and v [H,T,K] -> [H,S,K], float32.

    Where the processor `multiplies_bfloat16`, the kernel rounds more than 8 queries, and their weights, to k's dtype.
    """
    seen = jnp.arange(k.shape[1]) < lengths[:, None, None]
    scores = jnp.einsum("hsk,htk->hst", q, k.astype(jnp.float32), precision=_HIGHEST)
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    return jnp.einsum("hst,htk->hsk", weights, v.astype(jnp.float32), precision=_HIGHEST)


@kernel("CachedAttention")
def cached_attention(q: jax.Array, k: jax.Array, v: jax.Array, source: jax.Array, end: jax.Array) -> jax.Array:
    """q [B,H,G,K] float32, scaled, attends to k and v [B,H,S*G,K], as `ops.cached_attention` -> [B,H,G,K], float32.

    The kernel reads only the places that `source` [B*G,S] names, of the positions that are written.
    """
    reads = cache_mask(source, end, 1, q.shape[2], source.shape[1])
    scores = jnp.einsum("bhgk,bhtk->bhgt", q, k.astype(jnp.float32), precision=_HIGHEST)
    weights = jax.nn.softmax(jnp.where(reads, scores, -jnp.inf))
    return jnp.einsum("bhgt,bhtk->bhgk", weights, v.astype(jnp.float32), precision=_HIGHEST)


first_positions = kernel("FirstPositions")(warp_by_diagonals)  # row by row, with sums of 64 bits
