"""Runs a system in a separate process that reads one request per line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.checkpoints import FIXED
from benchmarks.memory import peak_memory_mb, reset_peak_memory
from benchmarks.systems import SYSTEMS, Work


class Worker:
    """Client of a system's process."""

    def __init__(self, name: str, checkpoint: Path, keep_compiled: bool = True):
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
        self.name, self.about = name, self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} stopped with exit code {self.process.wait()}")
        return json.loads(line)

    def run(self, audio: Path, work: Work | None, warm_up: bool = False) -> dict[str, Any]:
        """Returns seconds, megabytes, texts and tokens for the recordings in an npz file; work None: encoder only."""
        request = {"audio": str(audio), "work": work and asdict(work), "warm_up": warm_up}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()


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
    if request["warm_up"] and hasattr(system, "warm_up"):
        system.warm_up(work)
    written = run()
    seconds = time.perf_counter() - start
    texts, tokens = ([w.text for w in written], sum(w.tokens for w in written)) if work else ([], None)
    return {"s": seconds, "mb": peak_memory_mb(), "texts": texts, "tokens": tokens}


def main() -> None:
    name, checkpoint = sys.argv[1], Path(sys.argv[2])
    answers, sys.stdout = sys.stdout, sys.stderr
    warnings.simplefilter("ignore")
    fixed = checkpoint / FIXED
    start = time.perf_counter()
    system = SYSTEMS[name](checkpoint, int(fixed.read_text()) if fixed.exists() else None)
    loaded_s = time.perf_counter() - start
    print(json.dumps({"version": system.version(), "load_s": loaded_s}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(system, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
