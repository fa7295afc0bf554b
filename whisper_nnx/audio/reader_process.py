"""Reads files in another process: decoding is in part Python, for which the threads of one process wait in turn."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any, BinaryIO, cast

import numpy as np

from whisper_nnx.audio.background import Background, Stopped, warn
from whisper_nnx.audio.rules import AudioError

_ATTEMPTS = 2  # the system may end a process for reasons that are not the recording's
_START = "import sys; sys.path[:] = sys.argv[1:]; from whisper_nnx.audio.reader_process import serve; serve()"

Read = tuple["np.ndarray", "np.ndarray | None"]  # see `files.read_file`


class ReaderProcess:
    """Reads files for one thread in a process of its own, which the first file starts.

    A context of that thread; the process ends with it, with `close`, or with this process.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = False

    def read(self, source: str | bytes, name: str, *options: Any) -> Read:
        """`files.read_file` of a path, or of the content of a file.

        Raises AudioError if it ends two processes, and Stopped after `close`.
        """
        ended = ""
        for _ in range(_ATTEMPTS):
            process = self._started()
            try:
                return _answer(process, (source, name, *options))
            except (EOFError, BrokenPipeError, pickle.UnpicklingError):
                ended = self._end()
        raise AudioError(f"{name}: decoding it ended {_ATTEMPTS} processes ({ended}); is it damaged, or memory short?")

    def close(self) -> None:
        """Ends the process, whose thread then raises Stopped; any thread may call it."""
        with self._lock:
            self._is_closed = True
            if self._process is not None:
                self._process.kill()

    def __enter__(self) -> ReaderProcess:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
        self._end()

    def _started(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._is_closed:
                raise Stopped
            if self._process is None:
                command = [sys.executable, "-c", _START, *sys.path]
                self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            return self._process

    def _end(self) -> str:
        """Ends the process -> how it has ended."""
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return ""
        process.kill()
        with suppress(BrokenPipeError), process:  # closes the pipes, and waits
            pass
        status = process.returncode
        return f"signal {-status}" if status < 0 else f"exit status {status}"


def _answer(process: subprocess.Popen[bytes], request: tuple[Any, ...]) -> Read:
    requests, answers = cast("tuple[BinaryIO, BinaryIO]", (process.stdin, process.stdout))
    pickle.dump(request, requests)
    requests.flush()
    shapes, warnings, error = pickle.load(answers)
    for message in warnings:
        warn(message)
    if error is not None:
        raise error
    samples, channels = (None if shape is None else _received(answers, shape) for shape in shapes)
    assert samples is not None
    return samples, channels


def _received(answers: BinaryIO, shape: tuple[int, ...]) -> np.ndarray:
    array = np.empty(shape, np.float32)
    if cast(Any, answers).readinto(array.reshape(-1).view(np.uint8)) < array.nbytes:
        raise EOFError
    return array


def serve() -> None:
    """What the process does: answers requests from standard input on standard output, until there are no more."""
    import os

    from whisper_nnx.audio.files import read_file
    from whisper_nnx.audio.loading import open_binary

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; this process ends when its parent does
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # for libraries that print
    with suppress(EOFError, BrokenPipeError), answers:
        while True:
            source, name, *options = pickle.load(sys.stdin.buffer)
            arrays: tuple[np.ndarray | None, ...] = ()
            error, background = None, Background()
            try:
                with background, open_binary(source) as (file, _):
                    arrays = read_file(file, name, *options)
            except Exception as raised:
                error = _picklable(raised)
            shapes = [None if array is None else array.shape for array in arrays]
            pickle.dump((shapes, background.warnings, error), answers)
            for array in arrays:
                if array is not None:
                    answers.write(np.ascontiguousarray(array, np.float32).reshape(-1).view(np.uint8).data)
            answers.flush()


def _picklable(error: Exception) -> Exception:
    """The error, or one of its text: errors of libraries may need more arguments than they keep."""
    try:
        if type(copy := pickle.loads(pickle.dumps(error))) is type(error) and str(copy) == str(error):
            return error
    except Exception:
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")
