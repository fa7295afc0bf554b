"""Attention that holds few scores in memory, on GPUs and TPUs: by fused kernels, or in blocks of queries.

The kernels, in bfloat16 and float16: cuDNN's on NVIDIA's GPUs, for whole texts and windows and for the token loop; on
TPUs one in Pallas, whose blocks are whole windows of two heads. They are used where one small trial on the device at
hand gives the result of the formula.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from whisper_nnx.ops import int8_attention as int8
from whisper_nnx.ops import reference
from whisper_nnx.ops.trial import most_apart, working
from whisper_nnx.runtime.programs import register_custom_calls

Kernel = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
CacheKernel = Callable[..., jax.Array]  # arguments of `cudnn_cached`

_LEAST = 128  # queries and keys; below this, scores are small
_MOST_KEYS = 2048  # of the kernel for TPUs, which holds all keys of two heads in its fast memory
_QUERIES = 256  # of a block of that kernel
_LANES = 128  # of a TPU's registers: two heads of Whisper
_SCORES_BYTES = 2**28  # of a block of queries
_ALIGNED = 64  # number of queries that a block is a multiple of

register_custom_calls(["__cudnn$fmhaSoftmax", "__cudnn$fmhaScaleBiasSoftmax"])


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """`ops.attention` by the kernel of the platform that this is lowered for, or in blocks."""
    kernels = {platform: KERNELS[platform] for platform in usable() if mask is None and _takes(platform, q, k, v)}
    if not kernels:
        return in_blocks(q, k, v, mask)
    return _by_platform(q, k, v, tuple(kernels.items()))


@partial(jax.jit, static_argnames="kernels")  # traced once for all layers
def _by_platform(q: jax.Array, k: jax.Array, v: jax.Array, kernels: tuple[tuple[str, Kernel], ...]) -> jax.Array:
    return jax.lax.platform_dependent(q, k, v, default=in_blocks, **dict(kernels))


def _takes(platform: str, q: jax.Array, k: jax.Array, v: jax.Array) -> bool:
    (_, heads, n, width), keys = q.shape, k.shape[2]
    if not q.dtype == k.dtype == v.dtype or min(n, keys) < _LEAST:
        return False
    if platform == "cuda":
        return _fits_cudnn(q)
    return q.dtype == jnp.bfloat16 and _fills_lanes(heads, width) and keys <= _MOST_KEYS


def _fits_cudnn(q: jax.Array) -> bool:
    return is_half(q.dtype) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


def is_half(dtype: Any) -> bool:
    return dtype in (jnp.bfloat16, jnp.float16)


def _fills_lanes(heads: int, width: int) -> bool:
    return _LANES % width == 0 and heads * width % _LANES == 0


def in_blocks(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """The formula, a block of queries after the other where there are many scores; its gradient computes them again."""
    (*rows, n, width), keys = q.shape, k.shape[2]
    scores = 4 * q.size // width * keys  # bytes
    block = max(_ALIGNED, n * _SCORES_BYTES // scores // _ALIGNED * _ALIGNED)
    if scores <= _SCORES_BYTES or block >= n:
        return reference.attention(q, k, v, mask)
    blocks = -(-n // block)

    def cut(x: jax.Array) -> jax.Array:
        """[..., n, X] -> [blocks, ..., block, X], filled up with zeros, and a mask with True, lest it allow nothing."""
        more = [(0, 0)] * (x.ndim - 2) + [(0, blocks * block - n), (0, 0)]
        x = jnp.pad(x, more, constant_values=x.dtype == bool)
        return jnp.moveaxis(x.reshape(*x.shape[:-2], blocks, block, x.shape[-1]), -3, 0)

    if mask is None:
        attended = jax.lax.map(jax.checkpoint(lambda q: reference.attention(q, k, v)), cut(q))
    else:
        masks = cut(jnp.broadcast_to(mask, (*mask.shape[:-2], n, keys)))
        attended = jax.lax.map(jax.checkpoint(lambda x: reference.attention(x[0], k, v, x[1])), (cut(q), masks))
    return jnp.moveaxis(attended, 0, -3).reshape(*rows, blocks * block, width)[..., :n, :]


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`attention` without mask by cuDNN, which takes [B,S,H,K] and has its own gradient."""
    by_position = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.nn.dot_product_attention(*by_position, implementation="cudnn").swapaxes(1, 2)


def cached_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    length: jax.Array | int,
    default: CacheKernel,
) -> jax.Array:
    """q [B,H,Q,K] to the first `length` of k and v [B,T,D], where mask [B,1,Q,T] allows -> [B,H,Q,K].

    By the kernel of the platform that this is lowered for, which reads no others, or by `default` of the same inputs.
    """
    kernels: dict[str, CacheKernel] = {}
    if q.dtype == k.dtype and _fits_cudnn(q) and not is_split(q):
        kernels = {name: partial(CACHE_KERNELS[name], mask=mask, length=length) for name in usable_for_cache()}
    elif k.dtype == jnp.int8 and mask is None and isinstance(length, int) and int8.takes(q) and not is_split(q):
        kernels = {name: partial(int8.KERNELS[name], positions=length) for name in int8.usable()}
    way = partial(default, mask=mask, length=length)
    return jax.lax.platform_dependent(q, k, v, **kernels, default=way) if kernels else way(q, k, v)


def is_split(q: jax.Array) -> bool:
    """Whether a mesh may divide the heads, of which cuDNN's partitioning takes whole ones only."""
    mesh = jax.typeof(q).sharding.mesh
    return "model" in mesh.axis_names and mesh.shape["model"] > 1


def cudnn_cached(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, length: jax.Array | int
) -> jax.Array:
    """`cached_attention` by cuDNN."""
    windows, heads, queries, width = q.shape
    k, v = (x.reshape(windows, -1, heads, width) for x in (k, v))
    attended = jax.nn.dot_product_attention(
        q.swapaxes(1, 2),
        k,
        v,
        mask=mask,
        query_seq_lengths=jnp.full(windows, queries, jnp.int32),
        key_value_seq_lengths=jnp.full(windows, length, jnp.int32),
        implementation="cudnn",
    )
    return attended.swapaxes(1, 2)


def pallas(q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool = False) -> jax.Array:
    """`attention` without mask by a kernel for TPUs. `interpret`: runs it on any platform, slowly."""
    from jax.experimental import pallas as pl

    batch, heads, n, width = q.shape
    q, k, v = (x.swapaxes(1, 2).reshape(batch, -1, heads * width) for x in (q, k, v))  # as the projections leave them
    queries = pl.BlockSpec((1, _QUERIES, _LANES), lambda row, pair, block: (row, block, pair))
    keys = pl.BlockSpec((1, k.shape[1], _LANES), lambda row, pair, block: (row, 0, pair))
    attended = pl.pallas_call(
        partial(_attend, width=width),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(batch, heads * width // _LANES, pl.cdiv(n, _QUERIES)),
        in_specs=[queries, keys, keys],
        out_specs=queries,
        cost_estimate=pl.CostEstimate(
            flops=4 * q.size * k.shape[1],
            transcendentals=q.size // width * k.shape[1],
            bytes_accessed=2 * q.nbytes + k.nbytes + v.nbytes,
        ),
        interpret=interpret,
    )(q, k, v)
    return attended.reshape(batch, n, heads, width).swapaxes(1, 2)


def _attend(q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any, *, width: int) -> None:
    """One block of queries [1,S,L] to all keys [1,T,L], of the heads that lie side by side in L lanes."""
    for at in range(0, _LANES, width):
        head = (0, slice(None), slice(at, at + width))
        q = q_ref[head] * width**-0.5
        scores = jax.lax.dot_general(q, k_ref[head], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        attended = jnp.dot(weights.astype(v_ref.dtype), v_ref[head], preferred_element_type=jnp.float32)
        out_ref[head] = (attended / weights.sum(axis=-1, keepdims=True)).astype(out_ref.dtype)


def split(kernel: Kernel) -> Kernel:
    """A kernel that computes on each device of a mesh the rows (axis `data`) and the heads (`model`) that are there."""

    def call(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        (rows, heads, _, width), mesh = q.shape, jax.typeof(q).sharding.mesh
        axes = set(mesh.axis_names) - set(mesh.manual_axes)  # those that no `shard_map` around this has divided
        if not axes or mesh.size == 1:
            return kernel(q, k, v)
        data, model = (mesh.shape[name] if name in axes else 1 for name in ("data", "model"))
        over_data = "data" if data > 1 and rows % data == 0 else None
        over_model = "model" if model > 1 and heads % model == 0 and _fills_lanes(heads // model, width) else None
        spec = PartitionSpec(over_data, over_model)
        specs = {"in_specs": (spec,) * 3, "out_specs": spec}
        return jax.shard_map(kernel, mesh=mesh, axis_names=axes, check_vma=False, **specs)(q, k, v)

    return call


def with_gradient(kernel: Kernel) -> Kernel:
    """A kernel whose gradient is that of `in_blocks`."""
    differentiable = jax.custom_vjp(kernel)
    differentiable.defvjp(
        lambda q, k, v: (kernel(q, k, v), (q, k, v)), lambda inputs, slope: jax.vjp(in_blocks, *inputs)[1](slope)
    )
    return differentiable


# By the platform that they are for.
KERNELS: dict[str, Kernel] = {"cuda": cudnn, "tpu": with_gradient(split(pallas))}
CACHE_KERNELS: dict[str, CacheKernel] = {"cuda": cudnn_cached}


@cache
def usable() -> tuple[str, ...]:
    """Platforms whose kernels may be used: that of this machine's devices if a trial succeeds; on a CPU, all.

    What is traced on a CPU may be lowered for another platform, whose kernels cannot be tried here.
    """
    return working(KERNELS, _error)


@cache
def usable_for_cache() -> tuple[str, ...]:
    """The same for `cached_attention`."""
    return working(CACHE_KERNELS, _error_with_cache)


def _error(kernel: Kernel) -> jax.Array:
    """How much a kernel's result and gradients differ from those of the formula, at most."""
    inputs = _random((1, 2, 2 * _LEAST, 64), (1, 2, 2 * _LEAST, 64), (1, 2, 2 * _LEAST, 64))
    return most_apart(*(_with_slopes(way, *inputs) for way in (kernel, reference.attention)))


def _with_slopes(kernel: Kernel, *inputs: jax.Array) -> tuple[jax.Array, ...]:
    attended, back = jax.vjp(kernel, *inputs)
    return attended, *back(attended)


def _error_with_cache(kernel: CacheKernel) -> jax.Array:
    """The same for `cached_attention`: a query to the audio, and 1, 5 and 32 to a text that is half written."""
    errors = []
    for dtype, queries in itertools.product((jnp.bfloat16, jnp.float16), (1, 5, 32)):
        q, k, v = (x.astype(dtype) for x in _random((2, 2, queries, 64), (2, 160, 128), (2, 160, 128)))
        keys, values = (x.reshape(2, 160, 2, 64).swapaxes(1, 2) for x in (k, v))
        place = jnp.arange(160)
        mask = jnp.broadcast_to((place % 5 == jnp.arange(queries)[:, None] % 5) & (place < 80), (2, 1, queries, 160))
        found = kernel(q, k, v, None, 160), kernel(q, k, v, mask, jnp.int32(80))
        expected = reference.attention(q, keys, values), reference.attention(q, keys, values, mask)
        errors.append(most_apart(found, expected))
    return jnp.stack(errors).max()


def _random(*shapes: tuple[int, ...]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]
