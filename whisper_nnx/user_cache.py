"""The user's cache folder, and folders in it that nobody else can write to: what lies there is run."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path


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
