"""The threads on which the audio of requests is read, each with a process that decodes for it, or by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue
from typing import Any

from whisper_nnx.audio.background import Background
from whisper_nnx.audio.reader_process import ReaderProcess

_THREADS = 2  # without processes


class Readers:
    """Args: processes: that decode, for a thread each; 0: threads decode by themselves."""

    def __init__(self, processes: int):
        self.processes = [ReaderProcess() for _ in range(processes)]
        self._free: SimpleQueue[ReaderProcess | None] = SimpleQueue()
        for process in self.processes or (None,) * _THREADS:
            self._free.put(process)
        self._threads = ThreadPoolExecutor(self._free.qsize(), "read")

    def submit(self, work: Callable[..., None], *args: Any) -> None:
        """Has `work(*args)` done on a thread."""
        self._threads.submit(work, *args)

    @contextmanager
    def reading(self, warn: Callable[[str], None]) -> Iterator[None]:
        """Context of a thread that reads a recording, whose warnings go to `warn`."""
        background = Background()
        background.process = process = self._free.get()
        try:
            with background:
                yield
        finally:
            self._free.put(process)
            for message in background.warnings:
                warn(message)

    def close(self) -> None:
        """Ends the processes at once, and the threads when they have read what they are reading."""
        with ExitStack() as ending:
            for process in self.processes:
                ending.enter_context(process).close()
            self._threads.shutdown(cancel_futures=True)
