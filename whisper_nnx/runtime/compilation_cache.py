"""JAX's persistent compilation cache: what one run has compiled, the next one loads.

An entry of the cache is machine code that JAX runs without a question, so only the user may be able to write one.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from whisper_nnx.runtime.user_cache import make_private_folder, user_cache_folder

_MAX_SIZE_BYTES = 2**30  # the least recently used entries go first; those of an older jaxlib are never read again


def enable_compilation_cache(folder: str | os.PathLike[str] | None = None) -> Path | None:
    """Keeps compiled programs in `folder`, by default `whisper_nnx/jax` in the user's cache folder; returns the folder.

    The folder is created, or made, private to the user. Where others can write to it, or exchange it for their own,
    or where it cannot be used at all, a warning says so, JAX goes on without, and None is returned. Without `folder`, a
    folder that JAX was given already (JAX_COMPILATION_CACHE_DIR) is left as it is. Call it before anything is compiled.
    """
    import jax

    if folder is None and (chosen := jax.config.values["jax_compilation_cache_dir"]):
        return Path(chosen)
    # XLA splits loops by the number of threads at hand when it compiles, but the name of an entry does not tell: a
    # program compiled for one thread would keep to one thread for ever.
    try:
        base = Path(folder or user_cache_folder() / "whisper_nnx" / "jax").expanduser().resolve()
        path = base / f"{_thread_count()}_threads"
        make_private_folder(base)
        make_private_folder(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder, or links lead round in a circle
        problem = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror else error
        warnings.warn(f"no compilation cache: {problem}; give another folder, or switch the cache off", stacklevel=2)
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_compilation_cache_max_size", _MAX_SIZE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path


def choose_compilation_cache(wanted: bool | str) -> Path | None:
    """What a command's --compilation_cache asks for: none (False), the user's (True) or one in a folder."""
    import jax

    if wanted is False:
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    return enable_compilation_cache(None if wanted is True else wanted)


def _thread_count() -> int:
    """The number of threads that XLA will use on the CPU."""
    for name in ("PJRT_NPROC", "NPROC"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    affinity = getattr(os, "sched_getaffinity", None)  # Linux: the cores that this process may run on
    return len(affinity(0)) if affinity else os.cpu_count() or 1
