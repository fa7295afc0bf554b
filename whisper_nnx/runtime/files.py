"""Reads untrusted files within a size limit and without blocking."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def read_regular(path: Path, most: int) -> bytes:
    """Reads a regular file of at most `most` bytes, following links.

    Raises FileNotFoundError if it does not exist; ValueError, naming the file, for a larger file and for a pipe,
    device or folder, which could block or be endless.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is not a regular file; replace it with one")
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb") as stream:
        content = stream.read(most + 1) if os.fstat(stream.fileno()).st_size <= most else None
    if content is None or len(content) > most:
        raise ValueError(f"{path} is larger than the limit of {most} bytes; it may be corrupt or malicious")
    return content
