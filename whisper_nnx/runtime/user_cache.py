"""The user's cache folder, for files that are executed and must therefore be writable only by the user."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def user_cache_folder() -> Path:
    """Returns the system's folder for user caches; an absolute $XDG_CACHE_HOME takes precedence over ~/.cache."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    return Path(chosen) if os.path.isabs(chosen) else Path.home() / ".cache"


def make_private_folder(folder: Path) -> None:
    """Creates `folder`, an absolute path without links, and makes it private to the user.

    Raises PermissionError if other users may have written to it or can replace it; OSError if it cannot be created or
    written to.
    """
    for part in reversed([folder, *folder.parents]):
        part.mkdir(mode=0o700, exist_ok=True)
    refuse_if_others_can_write(folder)
    if sys.platform == "win32":
        return
    os.chmod(folder, 0o700)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} is on a read-only file system")


def refuse_if_others_can_write(folder: Path, of_root: bool = False) -> None:
    """Raises PermissionError unless only the user can write to `folder`, an absolute path without links.

    It must belong to the user (or to root with `of_root`), and its parents up to the home folder to the user or root.
    """
    if sys.platform == "win32":  # profiles are private there, and modes are meaningless
        return
    home = Path.home().resolve()
    for part in (folder, *folder.parents):
        status = part.stat()
        if status.st_uid != os.getuid() and (status.st_uid != 0 or (part == folder and not of_root)):
            raise PermissionError(f"{part} belongs to another user")
        # In a sticky folder, such as /tmp, others may add files but not move or remove ours.
        sticky = status.st_mode & stat.S_ISVTX and part != folder
        if _others_may_write(status) and not sticky:
            raise PermissionError(f"other users can write to {part}")
        if part == home:
            return


def read_own(file: Path) -> bytes | None:
    """Reads a regular file that only the user or root can have written; None if it is another or missing."""
    flags = (getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
    try:
        descriptor = os.open(file, os.O_RDONLY | sum(flags))
    except OSError:
        return None
    with open(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        own = sys.platform == "win32" or (status.st_uid in (os.getuid(), 0) and not _others_may_write(status))
        return stream.read() if own and stat.S_ISREG(status.st_mode) else None


def write_whole(file: Path, data: bytes) -> None:
    """Writes a file atomically, private to the user whatever the umask; see `read_own`. Raises OSError."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as stream:
            stream.write(data)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def locked(file: Path, longest_s: float) -> Iterator[None]:
    """Locks out other processes that lock the same path, waiting at most longest_s; no-op if files cannot be locked.

    The lock ends with the process. It only avoids duplicate work: the guarded code must be correct without it.
    """
    import filelock

    lock = filelock.FileLock(file, timeout=longest_s)
    with suppress(OSError, NotImplementedError):  # timed out, or the folder is read-only
        lock.acquire()
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):
                file.unlink(missing_ok=True)
            lock.release()


def _others_may_write(status: os.stat_result) -> bool:
    by_group = status.st_mode & stat.S_IWGRP and not _is_own_group(status.st_gid)
    return bool(status.st_mode & stat.S_IWOTH or by_group)


def _is_own_group(gid: int) -> bool:
    """Whether a group is the user's private one: many systems create one, writable by default, for each user."""
    import grp
    import pwd

    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return False
    return group.gr_name == user and set(group.gr_mem) <= {user}
