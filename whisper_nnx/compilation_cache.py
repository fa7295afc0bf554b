"""JAX's persistent compilation cache: what one run has compiled, the next one loads.

An entry of the cache is machine code that JAX runs without a question, so only the user may be able to write one.
"""

from __future__ import annotations

import os
import stat
import sys
import warnings
from pathlib import Path

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


def user_cache_folder() -> Path:
    """Where this system keeps a user's caches; $XDG_CACHE_HOME, if it is absolute, goes before ~/.cache."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    return Path(chosen) if os.path.isabs(chosen) else Path.home() / ".cache"


def make_private_folder(folder: Path) -> None:
    """Makes `folder`, an absolute path without links, one that the user alone can enter.

    Raises PermissionError where others may have written to it, or can put another in its place; OSError where it
    cannot be made or written to.
    """
    for part in reversed([folder, *folder.parents]):
        part.mkdir(mode=0o700, exist_ok=True)
    if sys.platform == "win32":  # profiles are private there, and modes say nothing
        return
    _refuse_if_others_can_write(folder)
    os.chmod(folder, 0o700)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} is on a file system that cannot be written to")


def _refuse_if_others_can_write(folder: Path) -> None:
    """The folder must be the user's own; so must all above it, or the system's, up to the user's home."""
    home = Path.home().resolve()
    for part in (folder, *folder.parents):
        status = part.stat()
        if status.st_uid != os.getuid() and (part == folder or status.st_uid != 0):
            raise PermissionError(f"{part} belongs to another user")
        # In a sticky folder, as /tmp is one, others may add files but not move or remove ours.
        sticky = status.st_mode & stat.S_ISVTX and part != folder
        if _others_may_write(status) and not sticky:
            raise PermissionError(f"others may write to {part}")
        if part == home:
            return


def _others_may_write(status: os.stat_result) -> bool:
    by_group = status.st_mode & stat.S_IWGRP and not _is_own_group(status.st_gid)
    return bool(status.st_mode & stat.S_IWOTH or by_group)


def _is_own_group(gid: int) -> bool:
    """Many systems give each user a group of the same name, and let it write to all that the user creates."""
    import grp
    import pwd

    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return False
    return group.gr_name == user and set(group.gr_mem) <= {user}


def _thread_count() -> int:
    """The number of threads that XLA will use on the CPU."""
    for name in ("PJRT_NPROC", "NPROC"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    affinity = getattr(os, "sched_getaffinity", None)  # Linux: the cores that this process may run on
    return len(affinity(0)) if affinity else os.cpu_count() or 1
