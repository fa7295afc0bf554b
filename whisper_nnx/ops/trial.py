"""Tries kernels on the device at hand, so that one that does not work there costs speed only."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

Error = Callable[[Any], jax.Array]
_MOST_WRONG = 0.05


def working(kernels: Mapping[str, Any], error: Error) -> tuple[str, ...]:
    """Platforms whose kernels may be used: that of this machine's devices if a trial succeeds; on a CPU, all.

    What is traced on a CPU may be lowered for another platform, whose kernels cannot be tried here.

    Args:
      kernels: by platform.
      error: how much the result of a kernel differs from what is expected, at most.
    """
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return tuple(platform for platform, kernel in kernels.items() if problem(kernel, error, None) is None)
    platform = "cuda" if "cuda" in device.client.platform_version else device.platform
    if platform not in kernels:
        return ()
    if (found := problem(kernels[platform], error, device)) is None:
        return (platform,)
    name = getattr(kernels[platform], "__name__", "fused")
    warnings.warn(
        f"the attention kernel {name!r} for {device.device_kind} is not used, and XLA's is slower: {found}",
        stacklevel=3,
    )
    return ()


def problem(kernel: Any, error: Error, device: jax.Device | None) -> str | None:
    """What is wrong with a kernel: tried on a device, or only traced; None if it works."""
    try:
        if device is None:
            jax.eval_shape(partial(error, kernel))
            return None
        with ThreadPoolExecutor(1) as outside:  # of the program that this thread may be tracing
            found = outside.submit(_on, device, partial(error, kernel)).result()
            return None if found < _MOST_WRONG else f"its result is wrong by {found:g}"
    except Exception as reason:  # whatever a library or a driver raises: without it, everything still works
        return f"{type(reason).__name__}: {str(reason).strip().splitlines()[0] if str(reason).strip() else ''}"


def most_apart(found: Sequence[jax.Array], expected: Sequence[jax.Array]) -> jax.Array:
    """The largest difference between arrays of two lists, in float32."""
    apart = [jnp.abs(a.astype(jnp.float32) - b).max() for a, b in zip(found, expected, strict=True)]
    return jnp.stack(apart).max()


def _on(device: jax.Device, function: Callable[[], jax.Array]) -> float:
    with jax.default_device(device):
        return float(jax.jit(function)())
