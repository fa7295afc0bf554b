"""The start of a command: XLA's threads and log, memory, caches and the device, set once and before JAX is used."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING

from whisper_nnx.runtime.allocator import keep_memory
from whisper_nnx.runtime.console import interrupts_wait

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

OPERATIONS_VARIABLE = "WHISPER_NNX_OPS"
OPERATIONS = ("reference", "cpu", "accelerator")  # the implementations in `whisper_nnx.ops`

# Set unless the user has set them.
ENVIRONMENT = {
    # On some processors XLA reports an error for each program from the compilation cache, which then runs all the same
    # (openxla/xla#44565). Only fatal errors are shown; the others are exceptions.
    "TF_CPP_MIN_LOG_LEVEL": "3",
    # The process that cleans up after grain's warns of each batch that was read ahead and is not needed.
    "PYTHONWARNINGS": "ignore:resource_tracker:UserWarning",
}


def start(
    threads: int | None = None,
    compilation_cache: bool | str = True,
    device: tuple[str, int] | None = None,
) -> jax.Device:
    """Prepares this process for JAX, which must not have been used in it before; returns the device to compute on.

    Programs are kept with the compilation cache, and freed memory stays with the process (`keep_memory`).

    Args:
      threads: of the CPU; None and 0: one per core.
      compilation_cache: False for none, True for the user's, or a folder.
      device: platform and index; None: JAX's default.

    Raises:
      ValueError: this machine has no such device, or $WHISPER_NNX_OPS names no implementation.
    """
    chosen_operations()
    if threads:
        os.environ["PJRT_NPROC"] = str(threads)  # read once, when XLA starts
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with interrupts_wait():  # JAX crashes where its import is interrupted
        keep_memory()
        from whisper_nnx.runtime.compilation_cache import choose_compilation_cache
        from whisper_nnx.runtime.programs import keep_programs

    try:
        keep_programs(choose_compilation_cache(compilation_cache))
    except (OSError, RuntimeError) as error:  # a folder of JAX's own setting, which nothing has checked; no home
        warnings.warn(f"programs are not kept: {error}; choose another --compilation_cache", stacklevel=2)
    return find_device(device)


def chosen_operations() -> str | None:
    """The implementation that $WHISPER_NNX_OPS names; None where it is not set. Raises ValueError for another name."""
    name = os.environ.get(OPERATIONS_VARIABLE)
    if name and name not in OPERATIONS:
        raise ValueError(f"{OPERATIONS_VARIABLE}={name!r} is unknown; choose one of {', '.join(OPERATIONS)}")
    return name or None


def find_device(wanted: tuple[str, int] | None) -> jax.Device:
    """Raises ValueError where this machine has no such device."""
    import jax

    if wanted is None:
        return jax.devices()[0]
    platform, index = wanted
    if platform == "cpu":  # else JAX would take hold of the GPU's memory too
        jax.config.update("jax_platforms", "cpu")
    try:
        return jax.devices(platform)[index]
    except (RuntimeError, IndexError):
        found = ", ".join(f"{device.platform}:{i}" for i, device in enumerate(jax.devices()))
        raise ValueError(f"there is no device {platform}:{index}, but {found}; choose one with --device") from None


def find_mesh(wanted: int | str | dict[str, int] | None, device: jax.Device) -> Mesh | None:
    """The mesh of so many devices, "all", or {axis: size}, of this device's kind; None for one device.

    Raises ValueError where there are not so many.
    """
    import jax

    from whisper_nnx.runtime.devices import as_mesh, make_mesh

    if wanted is None:
        return None
    among = jax.local_devices(backend=device.platform)
    return make_mesh(**wanted, devices=among) if isinstance(wanted, dict) else as_mesh(wanted, among)
