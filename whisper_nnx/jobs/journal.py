"""What the workers of a shard have begun and finished, kept line by line, so that little is lost when one dies."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from typing import Any

from whisper_nnx.jobs.job import Job, naming, put_lasting
from whisper_nnx.output.writers import ESCAPED, write_whole

_IDS = ("id", "begun", "freed", "released", "cleared")  # the id in a line
_BEGUN, _FREED = b'{"begun"', b'{"freed"'  # as long: the one replaces the other
MOST_DEATHS = 3  # of workers by the same recording
_MOST_ATTEMPTS = 10  # at a whole shard


@dataclass
class Progress:
    """Of a shard, from the journals of all its workers.

    Attributes:
      rows: by id, the finished row; one with `error` has failed.
      deaths: by id, how many workers have ended while it was being transcribed.
      deaths_alone: by id, how many of these did nothing else.
      cleared: ids that a worker has transcribed alone and survived, see `Journal.clear`.
      attempts: for each worker that has begun recordings beside others, those that it has not finished.
      given_up: whether a worker has noted that the shard is done one recording at a time.
    """

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    deaths: Counter[str] = field(default_factory=Counter)
    deaths_alone: Counter[str] = field(default_factory=Counter)
    cleared: set[str] = field(default_factory=set)
    attempts: list[set[str]] = field(default_factory=list)
    given_up: bool = False

    @classmethod
    def read(cls, job: Job, shard: int) -> Progress:
        """Reads the journals of a shard. Workers that have not finished what they began count as ended."""
        found = cls()
        for path in sorted((job.folder / "work").glob(f"{shard:06d}.*.jsonl")):
            begun, together = dict[str, bool](), False  # id -> whether alone
            for line in _lines(path):
                if "given_up" in line:
                    found.given_up = True
                elif "begun" in line:
                    begun[line["begun"]] = line["alone"]
                    together |= not line["alone"]
                elif "freed" in line:
                    together |= not line["alone"]
                elif "released" in line:
                    begun.pop(line["released"], None)
                elif "cleared" in line:
                    begun.pop(line["cleared"], None)
                    found.cleared.add(line["cleared"])
                else:
                    begun.pop(line["id"], None)
                    found.rows.setdefault(line["id"], line)
            found.deaths.update(begun.keys())
            found.deaths_alone.update(id_ for id_, alone in begun.items() if alone)
            if together:
                found.attempts.append({id_ for id_, alone in begun.items() if not alone})
        return found

    def is_suspect(self, id_: str) -> bool:
        """Whether a worker ended while it was being transcribed: it is to be transcribed alone."""
        return self.deaths[id_] > 0

    def is_quarantined(self, id_: str) -> bool:
        """Whether it has ended enough workers, all but one of which did nothing else."""
        return self.deaths[id_] >= MOST_DEATHS and self.deaths_alone[id_] >= MOST_DEATHS - 1

    def to_search(self) -> set[str]:
        """Of a shard that is only done as a whole: those of which one may have ended the workers, again and again."""
        deaths = Counter(id_ for attempt in self._unexplained() for id_ in attempt)
        return {id_ for id_, count in deaths.items() if count >= MOST_DEATHS} - self.cleared

    def is_given_up(self) -> bool:
        """Whether a shard cannot be done as a whole: workers have ended or were interrupted too often."""
        return self.given_up or len(self._unexplained()) >= _MOST_ATTEMPTS

    def _unexplained(self) -> list[set[str]]:
        """The attempts that no quarantined recording has ended."""
        return [attempt for attempt in self.attempts if not any(map(self.is_quarantined, attempt))]


class Journal:
    """Of one worker, for one shard. A line is written at once, and lost only with the machine.

    Attributes:
      keeps_rows: whether it keeps what is finished, or only notes that it is.
    """

    def __init__(self, job: Job, shard: int, worker: str, keeps_rows: bool = True):
        self.keeps_rows = keeps_rows
        self._path = job.path("work", shard, worker)
        self._file = self._path.open("ab", buffering=0)  # what could not be written is not tried again on closing

    def begin(self, id_: str, alone: bool) -> None:
        self._write({"begun": id_, "alone": alone})

    def finish(self, row: dict[str, Any]) -> None:
        self._write(row if self.keeps_rows else {"released": row["id"]})

    def give_up(self) -> None:
        """Notes that the shard is done one recording at a time from now on, whatever is found to have ended workers."""
        self._write({"given_up": True})

    def clear(self, id_: str) -> None:
        """Notes that a recording, transcribed alone, ends no worker."""
        self._write({"cleared": id_})

    def release(self) -> None:
        """Notes that what was begun and is not finished has not ended the worker."""
        _free(self._path)

    def _write(self, line: dict[str, Any]) -> None:
        left = _encoded([line])
        with naming(self._path):
            while left:  # of a nearly full disk, less may be written than was asked for
                left = left[self._file.write(left) :]

    def close(self) -> None:
        with suppress(OSError):  # of what was reported already
            self._file.close()


def release_begun(job: Job, worker: str) -> None:
    """Notes that what a worker had in work has not ended it: it was ended with the command that had started it."""
    for path in (job.folder / "work").glob(f"*.{escape(worker)}.jsonl"):
        _free(path)


def _free(path: Path) -> None:
    """Notes in place, as a full disk has no room for more, that what was begun has not ended its worker."""
    with suppress(OSError), path.open("r+b") as file:
        at = 0
        for line in file.readlines():
            if line.startswith(_BEGUN):
                file.seek(at)
                file.write(_FREED)
            at += len(line)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that were written as a whole; none if the file is gone, as its shard is done."""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                try:
                    yield json.loads(line)
                except ValueError:  # half of one: its worker was killed, or the disk was full
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


def reopen_failed(job: Job, again: bool = False) -> int:
    """Makes the shards with failed recordings unfinished again: these recordings are missing, the others are kept.

    Several processes may do so at once.

    Args:
      job: whose failures are tried once more.
      again: also those that were tried once more for the same cause before.

    Returns:
      How many recordings stay failed, because they were.
    """
    left = 0
    for shard in range(job.shards):
        tried = set() if again else {_cause(row) for row in _lines(job.path("retried", shard))}
        try:
            retried, kept = (_reopen if job.is_done(shard) else _drop_failures)(job, shard, tried)
        except FileNotFoundError:  # another process was faster
            continue
        left += len(kept)
        if retried:
            (path := job.path("retried", shard)).parent.mkdir(exist_ok=True)
            about = (dict(zip(("id", "error", "reason"), _cause(row), strict=True)) for row in retried)
            with naming(path), path.open("a", encoding="utf-8", errors=ESCAPED) as file:
                file.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in about)
    return left


_Rows = list[dict[str, Any]]


def _cause(row: dict[str, Any]) -> tuple[str, ...]:
    return row["id"], row["error"], row.get("reason", "")


def _split(rows: Iterable[dict[str, Any]], tried: set[tuple[str, ...]]) -> tuple[_Rows, _Rows]:
    """Failures that are to be tried once more, and the others."""
    rows = list(rows)
    return [row for row in rows if _cause(row) not in tried], [row for row in rows if _cause(row) in tried]


def _reopen(job: Job, shard: int, tried: set[tuple[str, ...]]) -> tuple[_Rows, _Rows]:
    """Of a shard that is done. A failure of which there is no row is tried once more, too."""
    if not (count := job.n_failed(shard)):
        return [], []
    done = job.path("results", shard)
    content = done.read_bytes()
    ids = {json.loads(line)["id"] for line in content.splitlines()}
    retried, kept = _split((row for row in _lines(job.path("failed", shard)) if row["id"] not in ids), tried)
    if len(kept) < count:
        forget(job, shard)
        write_whole(job.path("work", shard, "kept"), content + _encoded(kept), put_lasting)
        done.unlink()
        job.path("failed", shard).unlink(missing_ok=True)
    return retried, kept


def _drop_failures(job: Job, shard: int, tried: set[tuple[str, ...]]) -> tuple[_Rows, _Rows]:
    """Of a shard that is in work."""
    retried, kept = _split((row for row in Progress.read(job, shard).rows.values() if "error" in row), tried)
    dropped = {row["id"] for row in retried}
    for path in (job.folder / "work").glob(f"{shard:06d}.*.jsonl") if dropped else ():
        about = ((line, next((line[key] for key in _IDS if key in line), None)) for line in _lines(path))
        write_whole(path, _encoded(line for line, id_ in about if id_ not in dropped))
    return retried, kept


def _encoded(rows: Iterable[dict[str, Any]]) -> bytes:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode(errors=ESCAPED)


def forget_done(job: Job) -> None:
    """Removes the journals and leases of workers that ended between writing results and removing these."""
    begun = {path.name.partition(".")[0] for path in (job.folder / "work").glob("*.jsonl")}
    for shard in filter(job.is_done, map(int, begun)):
        forget(job, shard)
    for path in (job.folder / "leases").glob("[0-9]*[0-9]"):
        if job.is_done(int(path.name)):
            path.unlink(missing_ok=True)


def forget(job: Job, shard: int) -> None:
    """Removes the journals of a shard whose results are written."""
    for path in (job.folder / "work").glob(f"{shard:06d}.*.jsonl"):
        try:
            os.unlink(path)
        except OSError:  # on some systems, another worker has it open
            continue
