"""`warn_of_changes`: what an input names now that was not planned, and the reverse."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from whisper_nnx.audio.remote import is_remote
from whisper_nnx.jobs.inputs import place, read_places
from whisper_nnx.jobs.job import Job
from whisper_nnx.runtime.console import one_line

_Places = Callable[[], Iterator[str]]


def warn_of_changes(job: Job, source: str) -> None:
    """Warns where an input has other recordings than the job that goes on with it. No recording is looked at.

    The members of a tar are not compared, and nothing of an input that is a URL: a server takes long to list it.
    """
    if is_remote(source):
        return
    try:
        found = _differences(partial(read_places, source), partial(_planned, job))
    except (OSError, ValueError, ImportError) as error:
        warnings.warn(
            f"{job.folder} goes on as it was planned, as its input cannot be read: {one_line(error)}", stacklevel=2
        )
        return
    if found:
        warnings.warn(
            f"{source} has changed since the job was planned: {', and '.join(found)}; {job.folder} goes on as it was "
            "planned; what is new needs a new job",
            stacklevel=2,
        )


def _planned(job: Job) -> Iterator[str]:
    for shard in range(job.shards):
        with job.path("plan", shard).open(encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                yield place(row["audio"], row["part"])


def _differences(now: _Places, then: _Places) -> list[str]:
    """What is new and what is gone, if anything."""
    own, planned = _hashes(now()), _hashes(then())
    found = [("new", now, np.setdiff1d(own, planned)), ("gone", then, np.setdiff1d(planned, own))]
    return [_described(what, places, hashes) for what, places, hashes in found if len(hashes)]


def _described(what: str, places: _Places, hashes: np.ndarray) -> str:
    chosen, many = set(hashes.tolist()), len(hashes) > 1
    example = next((one for one in places() if hash(one) in chosen), "")
    return f"{len(hashes)} {'recordings are' if many else 'recording is'} {what}, such as {example}"


def _hashes(places: Iterator[str]) -> np.ndarray:
    return np.unique(np.fromiter(map(hash, places), np.int64))  # paths would take more memory
