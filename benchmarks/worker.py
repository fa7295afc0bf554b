"""Runs a system in a separate process that reads one request per line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.checkpoints import FIXED
from benchmarks.memory import peak_memory_mb, reset_peak_memory
from benchmarks.systems import SYSTEMS, Work

_CLOSING_S = 20.0  # after which a process that does not end is killed


class Stopped(SystemExit):
    """A system that could not be loaded, failed at a task, ended by itself, or took too long."""


class Worker:
    """Client of a system's process. Its methods raise `Stopped`; after an error in a task, it takes others.

    limit_s: after so many seconds of loading, or of a task, the process is killed.
    """

    def __init__(self, name: str, checkpoint: Path, keep_compiled: bool = True, limit_s: float | None = None):
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # all systems share a GPU
        if not keep_compiled:
            environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, name, str(checkpoint)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.name = name
        try:
            self.about = self._answer(limit_s)
        except Stopped:
            self.close()
            raise

    def _answer(self, limit_s: float | None) -> dict[str, Any]:
        killer = threading.Timer(limit_s or 0, self.process.kill)
        if limit_s is not None:
            killer.start()
        line = self.process.stdout.readline()
        in_time = limit_s is None or killer.is_alive()
        killer.cancel()
        if not in_time:
            self.process.wait()
            raise Stopped(f"{self.name} was stopped after {limit_s:.0f} s")
        if not line:
            raise Stopped(f"{self.name} stopped with exit code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Stopped(f"{self.name}: {answer['error']}")
        return answer

    def run(
        self, audio: Path, work: Work | None, warm_up: bool = False, limit_s: float | None = None
    ) -> dict[str, Any]:
        """Returns seconds, megabytes, texts and tokens for the recordings in an npz file; work None: encoder only.

        warm_up: compiles what the recordings do not use too.
        """
        request = {"audio": str(audio), "work": work and asdict(work), "warm_up": warm_up}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer(limit_s)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(_CLOSING_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def save(path: Path, recordings: list[np.ndarray]) -> Path:
    """Saves recordings for a worker, in order."""
    np.savez(path, **{f"{i:06}": audio for i, audio in enumerate(recordings)})
    return path


def answer(system: Any, request: dict[str, Any]) -> dict[str, Any]:
    with np.load(request["audio"]) as file:
        recordings = [file[name] for name in sorted(file.files)]
    work = request["work"] and Work(**request["work"])
    run = (lambda: system.transcribe(recordings, work)) if work else system.encode(recordings[0])
    reset_peak_memory()
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", message="out of memory")
        if request["warm_up"] and hasattr(system, "warm_up"):
            system.warm_up(work)
        written = run()
    found: dict[str, Any] = {"s": time.perf_counter() - start, "mb": peak_memory_mb()}
    if (device_mb := getattr(system, "device_mb", lambda: None)()) is not None:
        found["device_mb"] = round(device_mb)
    if warned:
        found["warnings"] = sorted({str(warning.message) for warning in warned})
    texts, tokens = ([w.text for w in written], sum(w.tokens for w in written)) if work else ([], None)
    return found | {"texts": texts, "tokens": tokens}


def attempt(work: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """What `work` returns, or what to answer where it fails."""
    try:
        return work(), {}
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        return None, {"error": f"{type(error).__name__}: {lines[0][:300]}"}


def main() -> None:
    name, checkpoint = sys.argv[1], Path(sys.argv[2])
    answers, sys.stdout = sys.stdout, sys.stderr
    warnings.simplefilter("ignore")
    fixed = checkpoint / FIXED
    tokens = int(fixed.read_text()) if fixed.exists() else None
    start = time.perf_counter()
    system, failed = attempt(lambda: SYSTEMS[name](checkpoint, tokens))
    loaded = failed or {"version": system.version(), "load_s": time.perf_counter() - start}
    print(json.dumps(loaded), file=answers, flush=True)
    if failed:
        sys.exit(1)
    for line in sys.stdin:
        found, failed = attempt(lambda line=line: answer(system, json.loads(line)))
        print(json.dumps(failed or found), file=answers, flush=True)


if __name__ == "__main__":
    main()
