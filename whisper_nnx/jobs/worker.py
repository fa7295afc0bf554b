"""A worker: takes shard after shard, transcribes what is missing, and writes each shard's results when all is there."""

from __future__ import annotations

import itertools
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from whisper_nnx.audio.arrays import Later
from whisper_nnx.audio.remote import is_remote
from whisper_nnx.jobs.export import export_planned, origin, split_formats
from whisper_nnx.jobs.inputs import Recording, file_state
from whisper_nnx.jobs.job import Job, put_lasting, write_once
from whisper_nnx.jobs.journal import MOST_DEATHS, Journal, Progress, forget, forget_done, note_speed
from whisper_nnx.jobs.leases import LeaseLostError, Leases
from whisper_nnx.jobs.leftovers import remove_leftovers
from whisper_nnx.output.writers import write_whole

# Recordings (paths, or parts of files as bytes or samples), as they are asked for -> (number, transcript or exception),
# as they finish: `iter_transcripts` with a model.
TranscribeAll = Callable[[Iterator[Any]], Iterable[tuple[int, Any]]]
EXPIRES_S = 60.0
# Options of a job that decide how a recording is read -> arguments of `load_audio`.
_READING = {
    "sampling_rate": "sampling_rate",
    "audio_track": "stream",
    "follow_timestamps": "follow_timestamps",
    "max_hours": "max_hours",
}


class DeviceError(RuntimeError):
    """The device failed. The worker stops, and what it had in work counts as where a worker died."""


def reading_options(job: Job) -> dict[str, Any]:
    """The arguments of `load_audio` with which the recordings of a job are read."""
    return {key: job.settings[name] for name, key in _READING.items() if name in job.settings}


def worker_name() -> str:
    """A name that no other worker has."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


def work(
    job: Job,
    transcribe_all: TranscribeAll,
    *,
    batched: bool = False,
    name: str | None = None,
    expires_s: float = EXPIRES_S,
    report: Callable[[int], None] = lambda shard: None,
) -> None:
    """Works on a job until all its shards are done, by this or other workers.

    Args:
      job: what is to be done.
      transcribe_all: transcribes recordings from an iterator, and yields their numbers with transcripts or exceptions.
      batched: whether a transcript depends on which recordings share a batch with it, if only in the last digits. A
        shard is then done by one worker from its beginning to its end, and begun again if that ends before.
      name: of the worker; default: a new one.
      expires_s: after how many seconds of silence another worker's shard is taken over.
      report: called with the number of each shard that is done.

    Raises:
      OSError: a file of the job cannot be written, or what recordings are on is away. What was finished is kept.
      ImportError: a format of the job or of its input needs a package that is not installed.
    """
    if "output_format" in job.settings:
        split_formats(job.settings["output_format"])
    name = name or worker_name()
    leases, ended = Leases(job, name, expires_s), threading.Event()
    threading.Thread(target=remove_leftovers, args=(job, expires_s, ended), daemon=True).start()
    try:
        forget_done(job)
        left = [n for n in range(job.shards) if not job.is_done(n)]
        while left:
            _Worker(job, leases, name, report, batched).run(left, transcribe_all)
            left = [n for n in left if not job.is_done(n)]
            if left:
                time.sleep(expires_s / 20)
    finally:
        ended.set()
        leases.close()


@dataclass
class _Shard:
    """A shard that this worker has. missing: ids that have no row yet; alone: those to be transcribed by themselves."""

    number: int
    recordings: list[Recording]
    progress: Progress
    journal: Journal
    missing: set[str] = field(default_factory=set)
    alone: list[Recording] = field(default_factory=list)


class _Worker:
    """One pass over the shards that are left: those that can be leased."""

    def __init__(self, job: Job, leases: Leases, name: str, report: Callable[[int], None], batched: bool):
        self._job, self._leases, self._name, self._report, self._batched = job, leases, name, report, batched
        self._origin = origin(job)
        self._reading = reading_options(job)
        # What chose a track or a rate while a part was read is not to do so again.
        self._was_read_by = dict.fromkeys({"audio_track", "sampling_rate"} & job.settings.keys())
        self._begun: dict[int, tuple[_Shard, Recording]] = {}  # by their numbers
        self._held: list[_Shard] = []
        self._audio_s, self._since = 0.0, time.monotonic()  # transcribed since then

    def run(self, left: list[int], transcribe_all: TranscribeAll) -> None:
        """One pass over these shards; first, one by one, over those that have suspects, which would keep the others."""
        if self._batched:
            for number in left:
                self._pass([number], transcribe_all)
            return
        begun = {int(path.name.partition(".")[0]) for path in (self._job.folder / "work").glob("*.jsonl")}
        suspected = [n for n in left if n in begun and Progress.read(self._job, n).deaths]
        for numbers in (*([n] for n in suspected), left):
            self._pass(numbers, transcribe_all)

    def _pass(self, left: list[int], transcribe_all: TranscribeAll) -> None:
        try:
            shards: Iterable[_Shard] = filter(None, map(self._leased, left))
            if self._batched:
                shards = list(shards)
                if not shards:
                    return
                self._search(shards[0], transcribe_all)
            for number, result in transcribe_all(self._sources(shards)):
                self._finish(*self._begun.pop(number), result)
            for shard in list(self._held):
                for one in shard.alone:
                    shard.journal.begin(one.id, alone=True)
                    if (source := self._read(shard, one)) is not None:
                        for _, result in transcribe_all(iter([source])):
                            self._finish(shard, one, result)
        except (KeyboardInterrupt, OSError, ImportError):
            for shard in self._held:
                shard.journal.release()
            raise
        finally:
            for shard in self._held:
                shard.journal.close()

    def _leased(self, number: int) -> _Shard | None:
        """A shard, if no one else has it or it is done."""
        if self._job.is_done(number) or not self._leases.take(number):
            return None
        if self._job.is_done(number):  # by the one whose lease has just ended
            self._leases.release(number)
            return None
        return self._opened(number)

    def _search(self, shard: _Shard, transcribe_all: TranscribeAll) -> None:
        """Transcribes those that may have ended the workers of a shard alone, to find the one that ends this, too."""
        if shard.journal.keeps_rows:
            return
        suspects = shard.progress.to_search() & shard.missing
        for one in shard.recordings:
            if one.id in suspects:
                shard.journal.begin(one.id, alone=True)
                try:
                    for _ in transcribe_all(iter([self._source(one)])):
                        pass  # alone, it may differ in the last digits
                except DeviceError:
                    raise
                except Exception:  # reading it once more reports the error
                    pass
                shard.journal.clear(one.id)

    def _sources(self, shards: Iterable[_Shard]) -> Iterator[Any]:
        """The recordings to transcribe, shard after shard: a shard is leased when its first recording is asked for.

        Where a batch ends with its shard, the longest come first, so that its last rows are not empty for long; but
        cuts of one recording one after the other, so that it is decoded once.
        """
        count = itertools.count()
        for shard in shards:
            alone = {one.id for one in shard.alone}
            order = sorted(shard.recordings, key=_batch_order) if self._batched else shard.recordings
            for one in order:
                if one.id not in shard.missing or one.id in alone:
                    continue
                shard.journal.begin(one.id, alone=False)
                if (source := self._read(shard, one)) is not None:
                    self._begun[next(count)] = shard, one
                    yield source

    def _read(self, shard: _Shard, one: Recording) -> Any:
        """A recording as `transcribe` takes it; None if it is not the planned one."""
        if (problem := _problem(one)) is not None:
            self._finish(shard, one, problem)
            return None
        return self._source(one)

    def _source(self, one: Recording) -> Any:
        """A recording as `transcribe` takes it; a part is fetched ahead."""
        if one.part is None:
            return one.audio
        later = Later(partial(one.read, **self._reading), one.duration)
        return {"audio": later, **self._was_read_by} if one.is_cut else later

    def _opened(self, number: int) -> _Shard:
        job, recordings = self._job, self._job.shard(number)
        progress = Progress.read(job, number)
        keeps_rows = not self._batched or progress.is_given_up()
        shard = _Shard(number, recordings, progress, Journal(job, number, self._name, keeps_rows))
        self._held.append(shard)
        if self._batched and keeps_rows and not progress.given_up:
            shard.journal.give_up()
        shard.missing = {one.id for one in recordings} - progress.rows.keys()
        for one in [one for one in recordings if one.id in shard.missing]:
            if progress.is_quarantined(one.id):
                why = f"{MOST_DEATHS} or more workers ended while they transcribed it"
                self._finish(shard, one, ValueError(f"{one.name}: {why}"))
            elif keeps_rows and (self._batched or progress.is_suspect(one.id)):
                shard.alone.append(one)
        self._complete(shard)
        return shard

    def _finish(self, shard: _Shard, one: Recording, result: Any) -> None:
        about: dict[str, Any] = {"id": one.id, "audio": one.name}
        if one.part is not None and one.is_cut:  # its times count from there
            about["offset"] = one.part["start"]
            about |= {"channels": one.part["channels"]} if "channels" in one.part else {}
        if not isinstance(result, Exception) and not is_remote(one.audio):
            problem = _problem(one)  # it may have changed while it was read; one that has vanished since was read
            result = problem if isinstance(problem, ValueError) else result
        if isinstance(result, Exception):
            if (outside := _outside(self._job, one, result)) is not None:
                raise outside
            row = about | {"error": type(result).__name__, "reason": _reason(result)}
        else:
            row = about | ({} if one.duration is None else {"duration": one.duration}) | result | self._origin
            self._audio_s += row.get("duration", 0.0)
        shard.journal.finish(row)
        shard.progress.rows[one.id] = row
        shard.missing.discard(one.id)
        self._complete(shard)

    def _complete(self, shard: _Shard) -> None:
        """Writes a shard of which nothing is missing, unless another worker did. The results come last: they end it."""
        if shard.missing or shard not in self._held:
            return
        with suppress(LeaseLostError):  # the one who has taken it writes its results
            if not self._job.is_done(shard.number):
                self._write(shard)
        self._held.remove(shard)
        shard.journal.close()
        if not self._job.is_done(shard.number):
            return
        forget(self._job, shard.number)
        self._leases.release(shard.number)
        now = time.monotonic()
        note_speed(self._job, self._name, self._audio_s, now - self._since)
        self._audio_s, self._since = 0.0, now
        self._report(shard.number)

    def _write(self, shard: _Shard) -> None:
        rows = [shard.progress.rows[one.id] for one in shard.recordings]
        done, failed = ([row for row in rows if ("error" in row) == is_error] for is_error in (False, True))
        check, path = partial(self._leases.require, shard.number), self._job.path("failed", shard.number)
        put = partial(put_lasting, check=check)
        export_planned(self._job, shard.number, done, put)
        if failed:
            write_whole(path, _lines(failed), put)
        else:
            check()
            path.unlink(missing_ok=True)
        write_once(self._job.path("results", shard.number), _lines(done), check)


def _batch_order(one: Recording) -> tuple[str, float]:
    """Sorts the recordings of a shard that share batches."""
    return (one.audio, one.part["start"]) if one.part is not None and one.is_cut else ("", -one.about_s)


def _problem(one: Recording) -> Exception | None:
    """Why a recording is not the planned one."""
    size, modified = file_state(one.audio)
    if size < 0 and is_remote(one.audio):  # not stated; reading it reports the error
        return None
    if size < 0:
        return FileNotFoundError(f"{one.audio}: file not found")
    if one.size >= 0 and size != one.size:  # below: not known when it was planned
        return ValueError(f"{one.audio}: {size} bytes, but {one.size} when the job was planned; start a new job for it")
    if modified is None or one.modified in (None, modified):
        return None
    now, then = (time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at)) for at in (modified, one.modified))
    return ValueError(
        f"{one.audio}: modified at {now}, but at {then} when the job was planned; "
        "copies must keep times (rsync -a), and what has changed needs a new job"
    )


def _outside(job: Job, one: Recording, error: Exception) -> Exception | None:
    """Why the worker must stop: a recording failed for a reason that is not its own, but that of all beside it."""
    if isinstance(error, ImportError):
        return error
    if one.size < 0:
        return None
    if is_remote(one.audio):
        again = "other recordings are not reachable either; restore access, then give the same command again"
        return OSError(f"{_reason(error)}; {again}") if _is_away(job, one) else None
    try:
        os.stat(one.audio)
    except (FileNotFoundError, NotADirectoryError):
        return _gone(one.audio, job.settings.get("input", ""))
    except (OSError, ValueError) as reason:  # of a mount, say, whose server is away
        return reason if isinstance(reason, OSError) else None
    return None


def _is_away(job: Job, one: Recording) -> bool:
    """Whether no server states the size of a recording, nor of others from all over the plan, of which it was known."""
    first = [job.shard(number)[0] for number in {0, job.shards // 2, job.shards - 1}]
    others = [other for other in first if is_remote(other.audio) and other.size >= 0 and other.audio != one.audio]
    return bool(others) and all(file_state(each.audio)[0] < 0 for each in (one, *others))


def _gone(audio: str, source: str) -> OSError | None:
    """The error for a file that is gone with all around it, as where its disk is not mounted; None for any other.

    That is: the input is gone, or of the folders above the file, the lowest one that is left is empty or the root.
    """
    advice = "which it was not when the job was planned; mount it, then give the same command again"
    with suppress(ValueError):  # they have nothing in common
        if not os.path.exists(root := os.path.commonpath([audio, source])):
            return OSError(f"{root} is gone, {advice}")
    lowest = folder = os.path.dirname(audio)
    while True:
        try:
            with os.scandir(folder) as found:
                is_empty = next(found, None) is None
            break
        except (FileNotFoundError, NotADirectoryError):
            lowest, folder = folder, os.path.dirname(folder)
        except OSError as error:
            return error
    if is_empty:
        return OSError(f"{folder} is empty, {advice}")
    if folder == os.path.dirname(folder) and lowest != folder:
        return OSError(f"{lowest} is gone, {advice}")
    return None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or "no message"


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
