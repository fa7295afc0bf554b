"""How far a job is, and what its transcripts are like."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whisper_nnx.jobs.job import Job

# Of speech, in characters a second: fewer are long pauses or missing text, more are loops. Chinese and Japanese have
# few characters a second, German has many.
_LEAST_RATE, _MOST_RATE = 1.0, 35.0
_LOW_LOGPROB = -1.0
_HIGH_RATIO = 2.4


@dataclass(frozen=True)
class Status:
    """Numbers of recordings, of shards, and of workers that have a shard."""

    recordings: int
    done: int
    failed: int
    shards: int
    shards_done: int
    workers: int


def status(job: Job) -> Status:
    """Counts what is done."""
    done = sorted((job.folder / "results").glob("*.jsonl"))
    failed = sum(_count(path) for path in (job.folder / "failed").glob("*.jsonl"))
    workers = {path.read_text(encoding="utf-8").partition(" ")[0] for path in (job.folder / "leases").iterdir()}
    return Status(job.recordings, sum(map(_count, done)), failed, job.shards, len(done), len(workers - {""}))


def _count(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def results(job: Job) -> Iterator[dict[str, Any]]:
    """The rows of all shards that are done, in the order of the plan."""
    for path in sorted((job.folder / "results").glob("*.jsonl")):
        with path.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def report(job: Job) -> dict[str, Any]:
    """What the transcripts are like: hours, recordings by language, windows by temperature, and suspicious ones.

    A transcript is suspicious where a window compresses like a loop, has a low log-probability, or where its text is
    unlikely long or short for its duration: {reason: ids}.
    """
    seconds, languages, temperatures = 0.0, Counter[str](), Counter[str]()
    suspicious: dict[str, list[str]] = {}
    for row in results(job):
        seconds += row.get("duration", 0.0)
        languages[row["language"]] += 1
        temperatures.update(f"{t:g}" for _, t in {(s["seek"], s["temperature"]) for s in row["segments"]})
        for reason in suspicions(row):
            suspicious.setdefault(reason, []).append(row["id"])
    return {
        "hours": round(seconds / 3600, 4),
        "languages": dict(sorted(languages.items())),
        "windows_by_temperature": dict(sorted(temperatures.items())),
        "suspicious": suspicious,
    }


def suspicions(row: dict[str, Any]) -> list[str]:
    """Why a transcript may be wrong; none if nothing is unusual."""
    found = []
    if any(segment["compression_ratio"] > _HIGH_RATIO for segment in row["segments"]):
        found.append("repetitive")
    if any(segment["avg_logprob"] < _LOW_LOGPROB for segment in row["segments"]):
        found.append("low probability")
    speech = sum(segment["end"] - segment["start"] for segment in row["segments"])
    if speech > 0 and not _LEAST_RATE <= len(row["text"]) / speech <= _MOST_RATE:
        found.append("unlikely rate of speech")
    return found
