"""Runs workers as processes, and starts another for one that dies."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence

from whisper_nnx.jobs.job import Job
from whisper_nnx.jobs.leases import release_all
from whisper_nnx.jobs.worker import worker_name

_MOST_IDLE_DEATHS = 3  # of workers one after the other that had not begun a recording
_POLL_S = 0.2


def supervise(
    job: Job,
    command: Callable[[str], Sequence[str]],
    workers: int,
    say: Callable[[str], None],
    environment: Callable[[int], dict[str, str]] = lambda place: {},
) -> int:
    """Runs workers until the job is done -> exit status: 0, or that of a worker that ended with an error of its own.

    Args:
      job: what is to be done.
      command: the command of a worker, from its name.
      workers: how many run at once.
      say: called with a line about each worker that died.
      environment: what is added to the environment of a worker, by its place from 0.
    """
    running: dict[int, tuple[str, subprocess.Popen[bytes]]] = {}
    if all(map(job.is_done, range(job.shards))):
        return 0
    status, idle, before = 0, 0, _written(job)

    def start(place: int) -> None:
        name = worker_name()
        running[place] = name, subprocess.Popen(command(name), env=os.environ | environment(place))

    try:
        for place in range(workers):
            start(place)
        while running:
            time.sleep(_POLL_S)
            for place, (name, process) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[place]
                release_all(job, name)
                if process.returncode > 0:  # it has reported why
                    status = status or process.returncode
                elif process.returncode < 0:
                    now = _written(job)
                    idle, before = (idle + 1 if now == before else 0), now
                    if idle < _MOST_IDLE_DEATHS:
                        say(f"a worker was ended by signal {-process.returncode}; another one continues")
                        start(place)
                    else:
                        say(f"{idle} workers were ended by signals before they began: not enough memory?")
                        status = status or 1
    finally:
        for _, process in running.values():
            process.terminate()
        for name, process in running.values():
            process.wait()
            release_all(job, name)
    return status


def _written(job: Job) -> tuple[int, int]:
    """How much the workers have written: it changes as soon as one begins a recording."""
    journals = (path.stat().st_size for path in (job.folder / "work").glob("*.jsonl"))
    return sum(1 for _ in (job.folder / "results").glob("*.jsonl")), sum(journals)
