"""Files elsewhere, by fsspec: https://, s3:// (with s3fs), gs:// (with gcsfs), hf:// and what else it knows."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

_PROTOCOL = re.compile(r"[a-z][a-z0-9+.-]*://")


def is_remote(path: Any) -> bool:
    """Whether a path begins with a protocol: https://..."""
    return isinstance(path, str) and _PROTOCOL.match(path) is not None


@contextmanager
def remote_errors(url: str) -> Iterator[None]:
    """Errors of a file system as one OSError or AudioError, in one line."""
    from whisper_nnx.audio.rules import AudioError  # with numpy, which --help does not need

    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{url}: not found; check the address") from None
    except (ImportError, ValueError) as error:  # no package for this protocol, or no such protocol
        raise AudioError(f"{url} cannot be opened: {' '.join(str(error).split())}") from None
    except AudioError:
        raise
    except Exception as error:  # whatever a package raises for a network
        raise OSError(f"{url} cannot be read: {type(error).__name__}: {' '.join(str(error).split())}") from None


@contextmanager
def open_remote(url: str) -> Iterator[BinaryIO]:
    """Opens a file, of which only what is read is transferred if its server permits. Raises OSError or AudioError."""
    with remote_errors(url):
        import fsspec

        opened = fsspec.open(url, "rb")  # kept: it holds the archive open that tar:// reads
        file = opened.open()
    with file:
        yield file


def name_of(url: str) -> str:
    """The file's name, without folder and query."""
    return os.path.basename(url.partition("?")[0].partition("#")[0].rstrip("/"))
