"""Runs workers, and starts another for one that dies."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from whisper_nnx.jobs.job import Job
from whisper_nnx.jobs.journal import forget_done, release_begun
from whisper_nnx.jobs.leases import release_all
from whisper_nnx.jobs.worker import worker_name

_MOST_IDLE_DEATHS = 3  # of workers in the same place, one after the other, while nothing was begun
_POLL_S = 0.2
_PARENT_S = 1.0
_WAITS_S, _AGAIN_S = 20.0, 600.0  # of workers without room: when that is reported, and when again
INTERRUPTED = (130, 143)  # exit status of a worker that has received SIGINT or SIGTERM; it reports nothing


class Worker(Protocol):
    """What runs a worker, as `subprocess.Popen` does: its status is None while it runs, and negative if it died."""

    @property
    def cause(self) -> str: ...  # of its death
    @property
    def waits_for(self) -> str: ...  # what it needs to begin; "" if it has that
    def poll(self) -> int | None: ...
    def terminate(self) -> None: ...
    def wait(self) -> int: ...


class Process(subprocess.Popen[bytes]):
    """A worker that is a process of this machine."""

    waits_for = ""

    @property
    def cause(self) -> str:
        return f"signal {-self.returncode}"


def supervise(job: Job, start: Callable[[str, int], Worker], workers: int, say: Callable[[str], None]) -> int:
    """Runs workers until the job is done -> exit status: 0, or that of a worker that ended with an error of its own.

    Args:
      job: what is to be done.
      start: starts a worker, from its name and its place: 0 to workers - 1.
      workers: how many run at once.
      say: called with a line about each worker that died, or if some cannot begin.
    """
    if all(map(job.is_done, range(job.shards))):
        forget_done(job)
        return 0
    status, idle, waiting = 0, Counter[int](), _Waiting(say)
    running: dict[int, tuple[str, Worker, tuple[int, int]]] = {}  # by place

    def fill(place: int) -> None:
        name, written = worker_name(), _written(job)
        running[place] = name, start(name, place), written

    try:
        for place in range(workers):
            fill(place)
        while running:
            time.sleep(_POLL_S)
            waiting.note([worker for _, worker, _ in running.values()])
            for place, (name, worker, before) in list(running.items()):
                if (ended := worker.poll()) is None:
                    continue
                del running[place]
                release_all(job, name)
                if ended >= 0:  # the worker has reported an error
                    if ended in INTERRUPTED:
                        say("a worker was interrupted")
                    status = status or ended
                    continue
                idle[place] = idle[place] + 1 if _written(job) == before else 0
                if idle[place] < _MOST_IDLE_DEATHS:
                    say(f"a worker died ({worker.cause}); another one continues")
                    fill(place)
                else:
                    say(f"{idle[place]} workers died before they began ({worker.cause}): not enough memory?")
                    status = status or 1
    finally:
        for _, worker, _ in running.values():
            worker.terminate()
        for name, worker, _ in running.values():
            worker.wait()
            release_all(job, name)
            release_begun(job, name)
    return status


class _Waiting:
    """Reports workers that have no room: after a while, and then at most now and then."""

    def __init__(self, say: Callable[[str], None]):
        self._say, self._reported = say, -math.inf
        self._since: float | None = None

    def note(self, workers: Sequence[Worker]) -> None:
        now, needs = time.monotonic(), list(filter(None, (worker.waits_for for worker in workers)))
        if not needs:
            self._since = None
            return
        if self._since is None:
            self._since = now
        if now - self._since >= _WAITS_S and now - self._reported >= _AGAIN_S:
            self._reported = now
            self._say(f"no room yet for {len(needs)} of {len(workers)} workers, which need {needs[0]} each")


def end_with(parent: int) -> None:
    """From now on, the end of the process that has started this one ends this one, too, as SIGTERM does."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _written(job: Job) -> tuple[int, int]:
    """How much the workers have written: it changes as soon as one begins a recording."""
    size = 0
    for path in (job.folder / "work").glob("*.jsonl"):
        with suppress(FileNotFoundError):  # its shard is done
            size += path.stat().st_size
    return sum(1 for _ in (job.folder / "results").glob("*.jsonl")), size
