"""What the workers of a shard have begun and finished, kept line by line, so that little is lost when one dies."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whisper_nnx.jobs.job import Job, naming
from whisper_nnx.output.writers import write_whole

MOST_DEATHS = 3  # of workers by the same recording


@dataclass
class Progress:
    """Of a shard, from the journals of all its workers.

    Attributes:
      rows: by id, the finished row; one with `error` has failed.
      deaths: by id, how many workers have ended while it was being transcribed.
      deaths_alone: by id, how many of these did nothing else.
    """

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    deaths: Counter[str] = field(default_factory=Counter)
    deaths_alone: Counter[str] = field(default_factory=Counter)

    @classmethod
    def read(cls, job: Job, shard: int) -> Progress:
        """Reads the journals of a shard. Workers that have not finished what they began count as ended."""
        found = cls()
        for path in sorted((job.folder / "work").glob(f"{shard:06d}.*.jsonl")):
            begun = dict[str, bool]()  # id -> whether alone
            for line in _lines(path):
                if "begun" in line:
                    begun[line["begun"]] = line["alone"]
                elif "released" in line:
                    begun.pop(line["released"], None)
                else:
                    begun.pop(line["id"], None)
                    found.rows.setdefault(line["id"], line)
            found.deaths.update(begun.keys())
            found.deaths_alone.update(id_ for id_, alone in begun.items() if alone)
        return found

    def is_suspect(self, id_: str) -> bool:
        """Whether a worker ended while it was being transcribed: it is to be transcribed alone."""
        return self.deaths[id_] > 0

    def is_quarantined(self, id_: str) -> bool:
        """Whether it has ended enough workers, all but one of which did nothing else."""
        return self.deaths[id_] >= MOST_DEATHS and self.deaths_alone[id_] >= MOST_DEATHS - 1


class Journal:
    """Of one worker, for one shard. A line is written at once, and lost only with the machine."""

    def __init__(self, job: Job, shard: int, worker: str):
        self._path = job.path("work", shard, worker)
        self._file = self._path.open("a", encoding="utf-8")
        self._begun = set[str]()

    def begin(self, id_: str, alone: bool) -> None:
        self._write({"begun": id_, "alone": alone})
        self._begun.add(id_)

    def finish(self, row: dict[str, Any]) -> None:
        self._write(row)
        self._begun.discard(row["id"])

    def release(self) -> None:
        """Notes that what was begun and is not finished has not ended the worker."""
        with suppress(OSError):
            for id_ in sorted(self._begun):
                self._write({"released": id_})

    def _write(self, line: dict[str, Any]) -> None:
        with naming(self._path):
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        with suppress(OSError):  # of what was reported already
            self._file.close()


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that were written as a whole; none if the file is gone, as its shard is done."""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                try:
                    yield json.loads(line)
                except ValueError:  # two halves: the disk was full in between
                    continue


def note_speed(job: Job, worker: str, audio_s: float, seconds: float) -> None:
    """Adds how much audio a worker has transcribed since its last note, and in how many seconds by its own clock."""
    path = job.folder / "speed" / f"{worker}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"audio_s": round(audio_s, 3), "seconds": round(seconds, 3)}) + "\n")


def speeds(job: Job) -> dict[str, list[tuple[float, float]]]:
    """The notes of all workers, by name: (s of audio, seconds)."""
    paths = sorted((job.folder / "speed").glob("*.jsonl"))
    return {path.stem: [(line["audio_s"], line["seconds"]) for line in _lines(path)] for path in paths}


def reopen_failed(job: Job) -> None:
    """Makes the shards with failed recordings unfinished again: these recordings are missing, the others are kept.

    Several processes may do so at once.
    """
    for shard in range(job.shards):
        if not job.is_done(shard):
            _drop_failures(job, shard)
            continue
        with suppress(FileNotFoundError):  # another process was faster
            if job.n_failed(shard):
                kept = (done := job.path("results", shard)).read_bytes()
                forget(job, shard)
                write_whole(job.path("work", shard, "kept"), kept)
                done.unlink()
                job.path("failed", shard).unlink(missing_ok=True)


def _drop_failures(job: Job, shard: int) -> None:
    failed = {id_ for id_, row in Progress.read(job, shard).rows.items() if "error" in row}
    for path in (job.folder / "work").glob(f"{shard:06d}.*.jsonl") if failed else ():
        about = ((line, line.get("id") or line.get("begun") or line.get("released")) for line in _lines(path))
        kept = (json.dumps(line, ensure_ascii=False) for line, id_ in about if id_ not in failed)
        write_whole(path, "".join(f"{line}\n" for line in kept))


def forget_done(job: Job) -> None:
    """Removes the journals of workers that were killed between writing results and removing these."""
    begun = {path.name.partition(".")[0] for path in (job.folder / "work").glob("*.jsonl")}
    for shard in filter(job.is_done, map(int, begun)):
        forget(job, shard)


def forget(job: Job, shard: int) -> None:
    """Removes the journals of a shard whose results are written."""
    for path in (job.folder / "work").glob(f"{shard:06d}.*.jsonl"):
        try:
            os.unlink(path)
        except OSError:  # on some systems, another worker has it open
            continue
