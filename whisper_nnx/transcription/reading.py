"""Reads recordings on other threads, or in other processes, while those before them are transcribed."""

from __future__ import annotations

import atexit
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import numpy as np

from whisper_nnx.audio.arrays import Later
from whisper_nnx.audio.background import Background
from whisper_nnx.audio.constants import SAMPLE_RATE
from whisper_nnx.audio.reader_process import ReaderProcess
from whisper_nnx.audio.remote import is_remote
from whisper_nnx.output.progress import stated_duration_s, unwrapped
from whisper_nnx.runtime.cores import usable_cores
from whisper_nnx.runtime.forking import refuse_after_fork

if TYPE_CHECKING:
    from whisper_nnx.transcription.opening import Samples
    from whisper_nnx.transcription.options import TranscribeOptions

Source = tuple[Any, "TranscribeOptions"]  # a recording and its options
Read = Callable[[Any, "TranscribeOptions"], "Samples"]

MAX_BYTES = 1 << 30  # of samples that are read ahead: about 4.5 hours
_MOST_THREADS = 8  # by default
_CLOSE_S = 1.0  # wait for threads, which check between two frames of audio


@dataclass(eq=False)
class Reading:
    """A recording whose turn comes.

    Attributes:
      number: among those of one call.
      source: the recording and its options, or the error in them.
      background: of the thread that reads it; None: it is read on the caller's thread.
      n_bytes: of its samples; before they are read, as its header states; 0 before it may be read.
      result: its samples, or why there are none; None until it was read.
    """

    number: int
    source: Source | Exception
    background: Background | None = None
    n_bytes: int = 0
    result: Samples | Exception | None = None
    warnings: list[str] = field(default_factory=list)


_open: WeakSet[ReadAhead] = WeakSet()


@atexit.register
def _close_all() -> None:
    """While modules are there: what an unfinished iterator refers to is collected later."""
    for ahead in list(_open):
        ahead.close()


class ReadAhead(Iterator[Reading]):
    """Reads recordings in their order, and the next ones in the background: see `_may_be_read_ahead`.

    Threads and their processes end with `close`, or with this process; a single recording takes none.

    Args:
      sources: drawn on the caller's thread, `depth` ahead.
      read: `read_samples`.
      depth: the most recordings that are read ahead.
      threads: by default at most half of the cores.
      processes: in which files are read, each for a thread of its own; 0: by the threads.
      max_bytes: of the samples that are read ahead, by their stated lengths; one recording may have more.
    """

    def __init__(
        self,
        sources: Iterator[Source | Exception],
        read: Read,
        depth: int,
        *,
        threads: int | None = None,
        processes: int = 0,
        max_bytes: int = MAX_BYTES,
    ):
        self._sources, self._read, self._depth, self._max_bytes = enumerate(sources), read, depth, max_bytes
        if threads is None:
            threads = min(depth, processes or max(1, min(usable_cores() // 2, _MOST_THREADS)))
        self._most_threads = threads
        self._processes = [ReaderProcess() for _ in range(min(self._most_threads, processes))]
        self._process = os.getpid()
        self._threads: list[threading.Thread] = []
        self._changed = threading.Condition()  # for all below
        self._queue: deque[Reading] = deque()
        self._waiting: deque[Reading] = deque()  # those of the queue that no thread has taken
        self._closed = False
        _open.add(self)

    def __next__(self) -> Reading:
        if os.getpid() != self._process:
            refuse_after_fork()  # the threads are not in this process
        self._draw()
        if not self._queue:
            raise StopIteration
        reading = self._queue[0]
        if reading.background is None:
            reading.result = self._result(reading)
        with self._changed:
            self._changed.wait_for(lambda: reading.result is not None or self._closed)
            if self._closed:
                raise StopIteration
            self._queue.popleft()
            self._changed.notify_all()  # its memory is the caller's
        if reading.background is not None:
            reading.warnings = reading.background.warnings
        return reading

    def close(self) -> None:
        """Ends the threads; what they read is discarded."""
        if self._closed or os.getpid() != self._process:
            return  # in a fork, a thread may have held the lock
        with self._changed:
            self._closed = True
            for reading in self._queue:
                if reading.background is not None:
                    reading.background.stopped = True
            for process in self._processes:
                process.close()
            self._queue.clear()
            self._waiting.clear()
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():  # which may collect garbage
                thread.join(_CLOSE_S)

    def _draw(self) -> None:
        while len(self._queue) <= self._depth and not self._closed:
            if (drawn := next(self._sources, None)) is None:
                return
            reading = Reading(*drawn)
            if self._depth and not isinstance(reading.source, Exception) and _may_be_read_ahead(reading.source[0]):
                reading.background = Background()
            with self._changed:
                self._queue.append(reading)
                if reading.background is not None:
                    self._waiting.append(reading)
                    self._changed.notify_all()
            if self._waiting and len(self._threads) < self._most_threads:
                process = self._processes[len(self._threads)] if self._processes else None
                work = partial(self._work, process)
                self._threads.append(threading.Thread(target=work, name="read ahead", daemon=True))
                self._threads[-1].start()

    def _result(self, reading: Reading) -> Samples | Exception:
        try:
            if isinstance(reading.source, Exception):
                raise reading.source
            return self._read(*reading.source)
        except Exception as error:
            return error

    # On other threads.

    def _work(self, process: ReaderProcess | None) -> None:
        with process or nullcontext():
            self._read_waiting(process)

    def _read_waiting(self, process: ReaderProcess | None) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                reading = self._waiting.popleft()
            assert reading.background is not None
            reading.background.process = process
            with reading.background:
                if not self._reserve(reading, min(_stated_bytes(reading.source) or self._max_bytes, self._max_bytes)):
                    return
                result = self._result(reading)
            with self._changed:
                reading.result, reading.n_bytes = result, _bytes(result)
                self._changed.notify_all()

    def _reserve(self, reading: Reading, n_bytes: int) -> bool:
        """Waits until a recording may take memory, after those before it; False: closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._fits(reading, n_bytes))
            reading.n_bytes = n_bytes
            return not self._closed

    def _fits(self, reading: Reading, n_bytes: int) -> bool:
        held = 0
        for other in self._queue:
            if other is reading:
                break
            if other.background is not None and not other.n_bytes:
                return False
            held += other.n_bytes
        return not held or held + n_bytes <= self._max_bytes


def _may_be_read_ahead(source: Any) -> bool:
    """Whether a recording is the same at any time and on any thread: a file, a URL, bytes, numpy's array, or `Later`.

    Not so a file object or standard input, whose position the recording before it may move, and a pipe.
    """
    source, _ = unwrapped(source)
    if is_remote(source):
        return True
    if isinstance(source, str | os.PathLike) and source != "-":
        try:
            return stat.S_ISREG(os.stat(source).st_mode)
        except (OSError, ValueError):  # reading it reports the error
            return False
    return isinstance(source, bytes | np.ndarray | Later)


def _stated_bytes(source: Source | Exception) -> int | None:
    """What the samples of a recording will take, by its header; None where it does not state its length."""
    assert not isinstance(source, Exception)
    audio, options = source
    try:
        seconds = stated_duration_s(audio, options.sampling_rate, options.audio_track, remote=True)
    except Exception:  # of an array, say: reading it reports the error
        return None
    per_sample = 4 * (3 if options.diarize else 1)  # float32; speakers need both channels too
    return None if seconds is None else max(1, int(seconds * SAMPLE_RATE) * per_sample)


def _bytes(result: Samples | Exception) -> int:
    if isinstance(result, Exception):
        return 1
    return max(1, result.samples.nbytes + (0 if result.channels is None else result.channels.nbytes))
