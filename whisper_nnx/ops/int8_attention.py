"""Attention of the token loop to the audio's keys and values in 8 bits, on GPUs: a kernel that reads them once.

XLA has two products there, and writes all scores between them to the memory of the device. The kernel is used where a
trial on the device at hand gives the result of the formula.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from whisper_nnx.ops import reference
from whisper_nnx.ops.trial import most_apart, working
from whisper_nnx.runtime.programs import register_custom_calls

_QUERIES = 16, 64  # of a block: as few as the matrix units take, as many as registers hold the sums of
_KEYS = 128  # read at once

register_custom_calls(["__gpu$xla.gpu.triton"])


def triton(q: jax.Array, k: jax.Array, v: jax.Array, positions: int, interpret: bool = False) -> jax.Array:
    """q [B,H,Q,K] to the first `positions` of k and v [B,T,D], which are int8 -> [B,H,Q,K].

    `interpret`: runs it on any platform, slowly.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as gpu

    windows, heads, queries, width = q.shape
    least, most = _QUERIES
    rows = min(max(pl.next_power_of_2(queries), least), most)
    own = pl.BlockSpec((None, None, queries, width), lambda window, head, _: (window, head, 0, 0))
    of_head = pl.BlockSpec((None, k.shape[1], width), lambda window, head, _: (window, 0, head))
    attended: jax.Array = pl.pallas_call(
        partial(_attend, rows=rows, positions=positions),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(windows, heads, pl.cdiv(queries, rows)),
        in_specs=[own, of_head, of_head],
        out_specs=own,
        compiler_params=gpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
    )(q * width**-0.5, k, v)
    return attended


def _attend(q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any, *, rows: int, positions: int) -> None:
    """`rows` of the queries [Q,K] of a head to its keys [T,K], which are read some at a time.

    Weights are relative to the largest score so far.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as gpu

    queries, width = q_ref.shape
    first = pl.program_id(2) * rows
    own = pl.ds(first, rows), slice(None)
    is_query = (first + jnp.arange(rows) < queries)[:, None]
    q = gpu.load(q_ref.at[own], mask=is_query, other=0)

    def read(i: jax.Array, so_far: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        attended, top, total = so_far
        at = pl.ds(pl.multiple_of(i * _KEYS, _KEYS), _KEYS)
        is_key = i * _KEYS + jnp.arange(_KEYS) < positions
        k, v = (gpu.load(ref.at[at, :], mask=is_key[:, None], other=0).astype(q.dtype) for ref in (k_ref, v_ref))
        scores = jnp.where(is_key, gpu.dot(q, k, trans_b=True), -jnp.inf)
        higher = jnp.maximum(top, scores.max(axis=1))
        weights, kept = jnp.exp(scores - higher[:, None]), jnp.exp(top - higher)
        more = gpu.dot(weights.astype(q.dtype), v)
        return attended * kept[:, None] + more, higher, total * kept + weights.sum(axis=1)

    nothing = jnp.zeros((rows, width)), jnp.full(rows, -jnp.inf), jnp.zeros(rows)
    attended, _, total = jax.lax.fori_loop(0, pl.cdiv(positions, _KEYS), read, nothing)
    gpu.store(out_ref.at[own], (attended / total[:, None]).astype(out_ref.dtype), mask=is_query)


# By the platform that they are for.
KERNELS: dict[str, Callable[..., jax.Array]] = {"cuda": triton}


@cache
def usable() -> tuple[str, ...]:
    """Platforms whose kernels may be used, as `fused.usable`."""
    return working(KERNELS, error)


def takes(q: jax.Array) -> bool:
    """Whether the kernels take such queries: those of all Whispers in half precision."""
    return q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] == 64


def error(kernel: Callable[..., jax.Array]) -> jax.Array:
    """How much a kernel's result for 5 and 40 queries differs from that of the formula, at most."""
    errors = []
    for dtype, queries in ((jnp.bfloat16, 5), (jnp.float16, 40)):
        keys = jax.random.split(jax.random.key(queries), 3)
        q = jax.random.normal(keys[0], (2, 2, queries, 64), dtype)
        k, v = (jax.random.randint(key, (2, 300, 128), -127, 128, jnp.int8) for key in keys[1:])
        # The values are divided afterwards, as their scales are applied: they are to be about 1.
        found = kernel(q / 32, k, v, 290) / 64
        k, v = (x.reshape(2, 300, 2, 64).swapaxes(1, 2)[:, :, :290].astype(dtype) for x in (k, v))
        errors.append(most_apart([found], [reference.attention(q / 32, k, v) / 64]))
    return jnp.stack(errors).max()
