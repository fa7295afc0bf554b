"""A worker process whose transcripts are made up: `python -m tests.jobs.echo FOLDER NAME [POISON] [batched]`.

Of two recordings that were asked for, the second is finished first. The recording named POISON ends the process.
"""

import os
import signal
import sys
import time
import zlib
from collections.abc import Iterator
from typing import Any

from whisper_nnx.jobs.job import Job
from whisper_nnx.jobs.worker import work


def transcript(path: str) -> dict[str, Any]:
    name = os.path.basename(path)
    segment = {"seek": 0, "start": 0.0, "end": 1.0, "temperature": 0.0, "avg_logprob": -0.1, "compression_ratio": 1.0}
    return {"text": f" {name} déjà vu", "segments": [segment], "language": "en", "duration": 2.0}


def transcribe_all(paths: Iterator[str], poison: str = "", seconds: float = 0.0) -> Iterator[tuple[int, Any]]:
    held: list[tuple[int, Any]] = []
    for number, path in enumerate(paths):
        if os.path.basename(path) == poison:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(seconds)
        held.append((number, ValueError(f"{path}: broken") if path.endswith("bad.wav") else transcript(path)))
        if len(held) == 2:
            yield held.pop()
    yield from held


def transcribe_together(paths: Iterator[str], poison: str = "", seconds: float = 0.0) -> Iterator[tuple[int, Any]]:
    """Each transcript depends on the recordings that were asked for before, as its last digits do in a batch."""
    company = 0

    def noted() -> Iterator[str]:
        nonlocal company
        for path in paths:
            company = zlib.crc32(os.path.basename(path).encode(), company)
            yield path

    for number, result in transcribe_all(noted(), poison, seconds):
        if isinstance(result, dict):
            result["segments"][0]["avg_logprob"] = -company / 1e10
        yield number, result


def echo(folder: str, name: str, poison: str = "", seconds: float = 0.01, batched: bool = False) -> int:
    transcribe = transcribe_together if batched else transcribe_all
    work(Job.open(folder), lambda paths: transcribe(paths, poison, seconds), name=name, expires_s=1, batched=batched)
    return 0


def echo_and_tell(folder: str, poison: str, pids: str, name: str) -> int:
    """Writes the number of this process into the folder `pids`, too."""
    with open(os.path.join(pids, name), "w") as file:
        file.write(str(os.getpid()))
    return echo(folder, name, poison, seconds=0.1)


def tell_gpu(folder: str, workers: int, name: str) -> int:
    """Writes which GPU this process sees, and its share of the memory; then waits for the others."""
    with open(os.path.join(folder, name), "w") as file:
        file.write(f"{os.environ['CUDA_VISIBLE_DEVICES']} {os.environ.get('XLA_PYTHON_CLIENT_MEM_FRACTION')}")
    while len(os.listdir(folder)) < workers:
        time.sleep(0.05)
    return 0


if __name__ == "__main__":
    sys.exit(echo(*sys.argv[1:4], batched=sys.argv[4:] == ["batched"]))
