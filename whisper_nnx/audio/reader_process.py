"""Reads files in another process: decoding is in part Python, for which the threads of one process wait in turn."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

from whisper_nnx.audio.background import Background, Stopped, warn
from whisper_nnx.audio.files import read_file
from whisper_nnx.audio.loading import open_binary
from whisper_nnx.audio.rules import AudioError

_ATTEMPTS = 2  # the system may end a process for reasons that are not the recording's
_ENDS_S = 0.5  # in which a process that has closed its pipes ends
_ROOT = str(Path(__file__).parents[2])  # where this package is, also if the path or the folder was changed since
_START = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; this process ends when its parent does
sys.path[:] = sys.argv[1:]
from whisper_nnx.audio.reader_process import serve
serve()
"""
_READY = b"\1"


class _Answer(NamedTuple):
    """What `files.read_file` returned, warned of, or raised."""

    arrays: tuple[np.ndarray | None, ...]
    warnings: list[str]
    error: Exception | None


class ReaderProcess:
    """Reads files for one thread in a process of its own.

    A context of that thread; the process ends with it, with `close`, or with this process.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = self._is_broken = False

    def start(self) -> bool:
        """Starts the process if it does not run -> whether it does; warns the first time that it cannot be started.

        Raises Stopped after `close`.
        """
        with self._lock:
            if self._is_closed:
                raise Stopped
            if self._process is not None or self._is_broken:
                return not self._is_broken
            try:
                self._process = process = _started()
            except Exception as error:  # no executable, an embedded Python, no memory
                self._is_broken, reason = True, str(error)
        if not self._is_broken:
            if cast(BinaryIO, process.stdout).read(1) == _READY:
                return True
            reason, self._is_broken = self._end(), not self._is_closed
        if self._is_closed:
            raise Stopped
        warn(f"files are decoded in this process: no other one could be started ({reason})")
        return False

    def read(self, source: str | bytes, name: str, *options: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """`files.read_file` of a path, or of the content of a file, once `start` was True.

        Raises AudioError if it ends two processes, and Stopped after `close`.
        """
        folder = None if isinstance(source, bytes) or os.path.isabs(source) else os.getcwd()
        ended = ""
        for _ in range(_ATTEMPTS):
            if not self.start():
                break
            try:
                found = _answered(cast("subprocess.Popen[bytes]", self._process), (folder, source, name, *options))
            except (EOFError, BrokenPipeError, pickle.UnpicklingError):
                ended = self._end()
                continue
            except BaseException:  # a part of the answer is still in the pipe
                self._end()
                raise
            for message in found.warnings:
                warn(message)
            if found.error is not None:
                raise found.error
            samples, channels = found.arrays
            return cast(np.ndarray, samples), channels
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

    def _end(self) -> str:
        """Ends the process -> how it has ended."""
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return ""
        if not self._is_closed:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_ENDS_S)
        process.kill()
        with suppress(BrokenPipeError), process:  # closes the pipes, and waits
            pass
        status = process.returncode
        return f"signal {-status}" if status < 0 else f"exit status {status}"


def _started() -> subprocess.Popen[bytes]:
    paths = [os.path.abspath(path) for path in sys.path if isinstance(path, str)]
    paths = paths if _ROOT in paths else [_ROOT, *paths]
    return subprocess.Popen([sys.executable, "-c", _START, *paths], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _answered(process: subprocess.Popen[bytes], request: tuple[Any, ...]) -> _Answer:
    requests, answers = cast("tuple[BinaryIO, BinaryIO]", (process.stdin, process.stdout))
    pickle.dump(request, requests)
    requests.flush()
    shapes, warnings, error = pickle.load(answers)
    return _Answer(tuple(None if shape is None else _received(answers, shape) for shape in shapes), warnings, error)


def _received(answers: BinaryIO, shape: tuple[int, ...]) -> np.ndarray:
    array = np.empty(shape, np.float32)
    if cast(Any, answers).readinto(array.reshape(-1).view(np.uint8)) < array.nbytes:
        raise EOFError
    return array


def serve() -> None:
    """What the process does: answers requests from standard input on standard output, until there are no more."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # for libraries that print
    with suppress(EOFError, BrokenPipeError), answers:
        answers.write(_READY)
        answers.flush()
        while True:
            _send(answers, _read(*pickle.load(sys.stdin.buffer)))  # and keep nothing of it


def _read(folder: str | None, source: str | bytes, name: str, *options: Any) -> _Answer:
    background = Background()
    try:
        if folder is not None:
            os.chdir(folder)
        with background, open_binary(source) as (file, _):
            return _Answer(read_file(file, name, *options), background.warnings, None)
    except Exception as error:
        return _Answer((), background.warnings, _picklable(error))


def _send(answers: BinaryIO, found: _Answer) -> None:
    shapes = [None if array is None else array.shape for array in found.arrays]
    pickle.dump((shapes, found.warnings, found.error), answers)
    for array in found.arrays:
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
