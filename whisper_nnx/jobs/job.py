"""`Job`: the folder of a job, its plan, and what is done."""

from __future__ import annotations

import itertools
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whisper_nnx import __version__
from whisper_nnx.jobs.inputs import Recording
from whisper_nnx.output.writers import make_output_folder, write_whole

SHARD_S = 3600.0  # audio in a shard
_MOST_RECORDINGS = 2000  # in a shard
PER_ROW = 4  # recordings in a shard for each row of a batch, which ends with the shard
PER_WORKER = 4  # shards of a small job for each of several workers
_LEAST_S, _WINDOW_S = 60.0, 30.0  # of audio in such a shard; for each row of a batch
_AHEAD = 50_000  # recordings that are read before the length of shards is chosen
_SYNCED_AT_ONCE = 16  # shards
_FORMAT = 1
_ABOUT = "job.json"
_ENCODE = json.JSONEncoder(ensure_ascii=False).encode  # made once: a plan has millions of lines


@dataclass(frozen=True)
class Job:
    """A job that is planned.

    Attributes:
      folder: where it is.
      settings: what its results depend on.
      shards: how many there are.
      recordings: how many there are.
    """

    folder: Path
    settings: dict[str, Any]
    shards: int
    recordings: int

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Job:
        """The job in a folder. Raises FileNotFoundError if none is planned there, ValueError for another format."""
        path = Path(folder) / "plan" / _ABOUT
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(f"{folder} holds no planned job; start one with its input") from None
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); choose another folder") from None
        if not isinstance(found, dict) or found.get("format") != _FORMAT:
            own = found.get("format") if isinstance(found, dict) else None
            raise ValueError(f"{path} has format {own}, this version reads {_FORMAT}; use that of the job")
        return cls(Path(folder), found["settings"], found["shards"], found["recordings"])

    def shard(self, number: int) -> list[Recording]:
        """The recordings of a shard, in order."""
        with self.path("plan", number).open(encoding="utf-8") as lines:
            return [Recording(**json.loads(line)) for line in lines]

    def is_done(self, number: int) -> bool:
        return self.path("results", number).exists()

    def written(self, kind: str) -> list[int]:
        """The shards of which there is a file in the folder `kind`, in the order of the plan."""
        return sorted(int(path.stem) for path in (self.folder / kind).glob("*.jsonl"))

    def n_failed(self, number: int) -> int:
        """How many recordings of a shard that is done have no transcript."""
        return count_lines(self.path("plan", number)) - count_lines(self.path("results", number))

    def path(self, kind: str, number: int, worker: str = "") -> Path:
        """Of a shard: the file in the folder `kind`."""
        ending = "" if kind == "leases" else f"{worker and f'.{worker}'}.jsonl"
        return self.folder / kind / f"{number:06d}{ending}"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within this context, errors of writing to a file name it: those of a full disk do not."""
    try:
        yield
    except OSError as error:
        raise error if error.filename else OSError(error.errno, error.strerror, str(path)) from None


def count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def write_once(path: Path, content: str, check: Callable[[], None] = lambda: None) -> bool:
    """Writes a file that outlasts a loss of power -> whether this process did; False if there is one, which stays.

    check: called just before the file appears; what it raises prevents that.

    Raises OSError with the path and what to do.
    """
    is_new = True

    def put(unfinished: Path, path: Path) -> None:
        nonlocal is_new
        _sync(unfinished)
        check()
        try:
            os.link(unfinished, path)
        except FileExistsError:
            is_new = False
        except OSError:  # this file system has no hard links
            is_new = not path.exists()
            if is_new:
                os.replace(unfinished, path)
        _sync_folder(path.parent)

    write_whole(path, content, put)
    return is_new


def put_lasting(unfinished: Path, path: Path, check: Callable[[], None] = lambda: None) -> None:
    """For `write_whole`: the file outlasts a loss of power; check: see `write_once`."""
    _sync(unfinished)
    check()
    os.replace(unfinished, path)
    _sync_folder(path.parent)


def _sync(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # Windows, and some network file systems, cannot
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def plan(
    folder: str | os.PathLike[str],
    recordings: Iterable[Recording],
    settings: dict[str, Any],
    shard_s: float | None = None,
    workers: int = 1,
) -> Job:
    """Plans a job, or opens the one that is planned there with the same settings.

    Shards hold recordings that follow each other, about as much audio each. Several processes may plan the same job.

    Args:
      folder: of the job; created if needed.
      recordings: all of them; not read where a job is planned already. One that is named twice is planned once.
      settings: what results depend on, as JSON; the version is added.
      shard_s: audio in a shard, in s; recordings of unknown duration are taken for 16,000 bytes a second. Default:
        an hour, and with a `batch_size` above 1 in the settings at least that many recordings four times; less where
        that would be fewer than four shards for each of several workers.
      workers: how many are known to work on the job; matters only where it is not planned already.

    Raises:
      ValueError: another job is planned there, with what differs; or there are no recordings, or two with one id.
    """
    if shard_s is not None and not shard_s > 0:
        raise ValueError(f"shard_s={shard_s} must be above 0")
    settings = {**settings, "version": __version__} | ({} if shard_s is None else {"shard_s": shard_s})
    root, settings = Path(folder), json.loads(json.dumps(settings, sort_keys=True))
    created = [one for one in (root, *root.parents) if not one.exists()]
    make_output_folder(root)
    if (root / "plan").exists():
        return _same(Job.open(root), settings)
    unfinished = root / f"plan.{secrets.token_hex(8)}.partial"
    unfinished.mkdir()
    try:
        size, found = _sized(recordings, shard_s, settings.get("batch_size", 1), workers)
        shards = _shards(found, size)
        counts = [_write_shard(unfinished, n, rows) for n, rows in enumerate(shards)]
        if not counts:
            raise ValueError("the input holds no recordings; check the path, and the extensions in a folder")
        about = {"format": _FORMAT, "settings": settings, "shards": len(counts), "recordings": sum(counts)}
        write_whole(unfinished / _ABOUT, json.dumps(about, indent=1, sort_keys=True), _put_plan)
        for kind in ("leases", "work", "results", "failed"):
            (root / kind).mkdir(exist_ok=True)
        with suppress(OSError):  # another process was faster
            os.rename(unfinished, root / "plan")
            _sync_folder(root)
    except OSError:
        if not (root / "plan").exists():  # else what is unfinished may have been removed, see `leftovers`
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        for one in created:
            with suppress(OSError):  # it is not empty: the job is planned
                one.rmdir()
    return _same(Job.open(root), settings)


def _same(job: Job, settings: dict[str, Any]) -> Job:
    """The job, if these are its settings."""
    for name in sorted({*job.settings, *settings}):
        own, other = (repr(all_[name]) if name in all_ else "the default" for all_ in (job.settings, settings))
        if own != other:
            raise ValueError(
                f"{job.folder} holds a job with {name}={own}, not {other}; choose another folder, or delete this one"
            )
    return job


@dataclass(frozen=True)
class _Size:
    """A shard ends with so many seconds of audio in at least so many recordings, or with the most recordings."""

    seconds: float
    least: int = 1
    most: int = _MOST_RECORDINGS


def _sized(
    recordings: Iterable[Recording], shard_s: float | None, rows: int, workers: int
) -> tuple[_Size, Iterable[Recording]]:
    """The size of shards, and all the recordings; rows: of a batch."""
    if shard_s is not None:
        return _Size(shard_s), recordings
    least = PER_ROW * rows if rows > 1 else 1
    if workers == 1:
        return _Size(SHARD_S, least), recordings
    recordings = iter(recordings)
    first = list(itertools.islice(recordings, _AHEAD))
    seconds, shards = sum(one.about_s for one in first), PER_WORKER * workers
    shard_s = min(SHARD_S, max(seconds / shards, _LEAST_S, _WINDOW_S * rows))
    least = min(least, max(rows, len(first) // shards))
    most = _MOST_RECORDINGS if seconds else min(_MOST_RECORDINGS, math.ceil(len(first) / shards))  # sizes are unknown
    return _Size(shard_s, least, most), itertools.chain(first, recordings)


def _shards(recordings: Iterable[Recording], size: _Size) -> Iterator[list[Recording]]:
    known, count, rows, seconds = dict[str, int](), 0, list[Recording](), 0.0
    for one in recordings:
        place = hash((one.name, str(one.part)))  # paths would take more memory
        if known.setdefault(one.id, place) != place:
            raise ValueError(
                f"id {one.id!r} of {one.name} is that of another recording, too; make the ids of rows differ, or leave "
                "them out"
            )
        if len(known) == count:
            continue  # the same recording once more
        count = len(known)
        rows.append(one)
        seconds += one.about_s
        if (seconds >= size.seconds and len(rows) >= size.least) or len(rows) == max(size.least, size.most):
            yield rows
            rows, seconds = [], 0.0
    if rows:
        yield rows


def _put_plan(unfinished: Path, path: Path) -> None:
    """As `put_lasting`, after the shards beside it: a file system commits together what is waited for together."""
    with ThreadPoolExecutor(_SYNCED_AT_ONCE) as threads:
        list(threads.map(_sync, path.parent.glob("*.jsonl")))
    put_lasting(unfinished, path)


def _write_shard(folder: Path, number: int, rows: list[Recording]) -> int:
    lines = (_ENCODE(vars(row)) for row in rows)
    write_whole(folder / f"{number:06d}.jsonl", "".join(f"{line}\n" for line in lines))
    return len(rows)
