"""Files that others have made: reading takes no more time and memory than a limit, whatever is at the path."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def read_regular(path: Path, most: int) -> bytes:
    """The content of a regular file of at most so many bytes.

    Links are followed. Raises FileNotFoundError where there is none; ValueError, naming the file, for a pipe, device or
    folder (which could block, or never end) and for a larger file.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is not a regular file; replace it by one")
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb") as stream:
        content = stream.read(most + 1) if os.fstat(stream.fileno()).st_size <= most else None
    if content is None or len(content) > most:
        raise ValueError(f"{path} is larger than {most} bytes, the most that is read; it may be corrupt or malicious")
    return content
