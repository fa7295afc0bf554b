"""Audio that is read on another thread: its warnings wait for the caller's thread, and reading can be stopped."""

from __future__ import annotations

import warnings
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whisper_nnx.audio.reader_process import ReaderProcess


class Stopped(Exception):
    """The audio is no longer needed."""


class Background:
    """Context of a thread while it reads a recording.

    Attributes:
      warnings: texts of the warnings so far. Filters of warnings belong to the process, or to the caller's thread.
      stopped: set it from any thread, and reading ends soon, by `Stopped`.
      process: in which the thread has files read; None: in this one.
    """

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.stopped = False
        self.process: ReaderProcess | None = None

    def __enter__(self) -> Background:
        self._token = _current.set(self)
        return self

    def __exit__(self, *_: Any) -> None:
        _current.reset(self._token)


_current: ContextVar[Background | None] = ContextVar("background", default=None)


def warn(message: str, stacklevel: int = 1) -> None:
    """Warns as `warnings.warn` does, or keeps the warning where the audio is read in the background."""
    if (background := _current.get()) is None:
        warnings.warn(message, stacklevel=stacklevel + 1)
    else:
        background.warnings.append(message)


def reader_process() -> ReaderProcess | None:
    """The process in which this thread has files read, if there is one."""
    return None if (background := _current.get()) is None else background.process


def check_stopped() -> None:
    """Raises Stopped if the audio is read in the background and is not needed any more."""
    if (background := _current.get()) is not None and background.stopped:
        raise Stopped
