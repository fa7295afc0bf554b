"""Sets up JAX's persistent compilation cache in a private folder.

JAX executes the machine code in the cache without checks, so the folder must not be writable by other users.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from whisper_nnx.runtime.cores import usable_cores
from whisper_nnx.runtime.user_cache import make_private_folder, user_cache_folder

_MAX_SIZE_BYTES = 2**30  # evicts the least recently used entries, such as those of an older jaxlib


def enable_compilation_cache(folder: str | os.PathLike[str] | None = None) -> Path | None:
    """Caches compiled programs in `folder`, by default `whisper_nnx/jax` in the user's cache folder; returns it.

    The folder is created if needed and made private to the user. If other users can write to it or replace it, or if it
    cannot be used, this warns and returns None, and JAX runs without cache. Without `folder`, JAX's own setting
    (JAX_COMPILATION_CACHE_DIR) takes precedence. Call it before anything is compiled.
    """
    import jax

    if folder is None and (chosen := jax.config.values["jax_compilation_cache_dir"]):
        return Path(chosen)
    # XLA splits loops by the number of threads at compile time, which is not part of an entry's key: a program compiled
    # for one thread would always use one thread.
    try:
        base = Path(folder or user_cache_folder() / "whisper_nnx" / "jax").expanduser().resolve()
        path = base / f"{_thread_count()}_threads"
        make_private_folder(base)
        make_private_folder(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder, or a cycle of links
        problem = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror else error
        warnings.warn(f"no compilation cache: {problem}; give another folder or disable the cache", stacklevel=2)
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_compilation_cache_max_size", _MAX_SIZE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path


def choose_compilation_cache(wanted: bool | str) -> Path | None:
    """Applies --compilation_cache: none (False), the user's (True) or a folder."""
    import jax

    if wanted is False:
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    return enable_compilation_cache(None if wanted is True else wanted)


def _thread_count() -> int:
    """Returns the number of threads that XLA will use on the CPU."""
    for name in ("PJRT_NPROC", "NPROC"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return usable_cores()
