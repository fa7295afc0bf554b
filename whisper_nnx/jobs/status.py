"""How far a job is, and what its transcripts are like."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from whisper_nnx.jobs.job import Job, count_lines
from whisper_nnx.jobs.journal import Progress, speeds
from whisper_nnx.jobs.leases import holders

# Of speech, in characters a second: fewer are long pauses or missing text, more are loops. Chinese and Japanese have
# few characters a second, German has many.
_LEAST_RATE, _MOST_RATE = 1.0, 35.0
_LOW_LOGPROB = -1.0
_HIGH_RATIO = 2.4
_LOW_LANGUAGE = 0.5
_RECENT = 16  # shards of a worker, by which its present speed is known


@dataclass(frozen=True)
class Status:
    """How far a job is.

    Attributes:
      recordings, done, failed: how many there are, have a transcript, have none.
      shards, shards_done: how many there are, and are written.
      workers: how many have a shard.
      speed: seconds of audio a second, of these workers together; None before one of them has finished a shard.
      left_s: about how long they will take for the rest; None if the speed is not known.
    """

    recordings: int
    done: int
    failed: int
    shards: int
    shards_done: int
    workers: int
    speed: float | None = None
    left_s: float | None = None


def status(job: Job) -> Status:
    """Counts what is done, also of shards that are in work."""
    done = job.written("results")
    transcripts = sum(count_lines(job.path("results", shard)) for shard in done)
    failed = sum(count_lines(job.path("plan", shard)) for shard in done) - transcripts
    for row in _in_work(job):
        failed, transcripts = failed + ("error" in row), transcripts + ("error" not in row)
    workers = holders(job)
    pace = _pace(job, workers, job.shards - len(done))
    return Status(job.recordings, transcripts, failed, job.shards, len(done), len(workers), *pace)


def _pace(job: Job, workers: set[str], shards_left: int) -> tuple[float, float] | tuple[None, None]:
    """The speed of workers and the time left, if known. Clocks of machines are not compared."""
    notes = speeds(job)
    known = [_sums(notes[name][-_RECENT:]) for name in workers & notes.keys()]
    own = [audio_s / seconds for audio_s, seconds in known if audio_s > 0 and seconds > 0]
    if not own:
        return None, None
    speed = sum(own) / len(own) * len(workers)
    shards = [audio_s for notes in notes.values() for audio_s, _ in notes]
    return speed, shards_left * sum(shards) / len(shards) / speed


def _sums(notes: Iterable[tuple[float, float]]) -> tuple[float, float]:
    audio_s, seconds = zip(*notes, strict=True) if notes else ((), ())
    return sum(audio_s), sum(seconds)


def results(job: Job) -> Iterator[dict[str, Any]]:
    """The rows of all shards that are done, in the order of the plan."""
    for shard in job.written("results"):
        yield from _rows(job, "results", shard)


def _failures(job: Job) -> Iterator[dict[str, Any]]:
    """The rows of recordings without a transcript, of all shards that are done."""
    for shard in filter(job.is_done, job.written("failed")):
        done = {row["id"] for row in _rows(job, "results", shard)}
        yield from (row for row in _rows(job, "failed", shard) if row["id"] not in done)


def _rows(job: Job, kind: str, shard: int) -> Iterator[dict[str, Any]]:
    with job.path(kind, shard).open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _in_work(job: Job) -> Iterator[dict[str, Any]]:
    """The rows of the shards that are in work."""
    for shard in sorted({int(path.name.partition(".")[0]) for path in (job.folder / "work").glob("*.jsonl")}):
        if not job.is_done(shard):
            yield from Progress.read(job, shard).rows.values()


def report(job: Job) -> dict[str, Any]:
    """What the transcripts are like, and which are suspicious: {reason: ids}, see `suspicions`.

    The real-time factor is the time of all workers, each by its own clock, for a second of audio; None if not known.
    """
    seconds, languages, temperatures = 0.0, Counter[str](), Counter[str]()
    retries, suspicious = Counter[str](), dict[str, list[str]]()
    for row in results(job):
        seconds += row.get("duration", 0.0)
        languages[row["language"]] += 1
        temperatures.update(f"{t:g}" for _, t in {(s["seek"], s["temperature"]) for s in row["segments"]})
        retries.update(row.get("retries", {}))
        for reason in suspicions(row):
            suspicious.setdefault(reason, []).append(row["id"])
    failed = Counter(row["error"] for row in chain(_failures(job), _in_work(job)) if "error" in row)
    audio_s, worked_s = _sums([note for notes in speeds(job).values() for note in notes])
    return {
        "hours": round(seconds / 3600, 4),
        "languages": dict(sorted(languages.items())),
        "real_time_factor": round(worked_s / audio_s, 6) if audio_s else None,
        "windows_by_temperature": dict(sorted(temperatures.items())),
        "retries_by_threshold": dict(sorted(retries.items())),
        "failed": dict(sorted(failed.items())),
        "suspicious": suspicious,
    }


def suspicions(row: dict[str, Any]) -> list[str]:
    """Why a transcript may be wrong; none if nothing is unusual.

    "repetitive" and "low probability" are those of a window, as they are retried by default; "unsure language" is one
    that was detected with less than half of the probability; "unlikely rate of speech" is text that is too long or too
    short for its duration.
    """
    found = []
    if any(segment["compression_ratio"] > _HIGH_RATIO for segment in row["segments"]):
        found.append("repetitive")
    if any(segment["avg_logprob"] < _LOW_LOGPROB for segment in row["segments"]):
        found.append("low probability")
    if row.get("language_probability", 1.0) < _LOW_LANGUAGE:
        found.append("unsure language")
    speech = sum(segment["end"] - segment["start"] for segment in row["segments"])
    if speech > 0 and not _LEAST_RATE <= len(row["text"]) / speech <= _MOST_RATE:
        found.append("unlikely rate of speech")
    return found
