"""`Leases`: which worker has which shard, in files that any number of machines share."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

from whisper_nnx.jobs.job import Job, naming


class LeaseLostError(Exception):
    """Another worker has taken the shard."""


class Leases:
    """The leases of one worker, which a thread renews.

    Another worker's lease has expired when its file has not changed for `expires_s`, by the clock of the one who waits
    for it: clocks of machines are not compared. A lease that is taken from a worker that is alive costs double work,
    nothing else: it writes nothing any more, see `require`.

    Args:
      job: whose shards are leased.
      worker: its name; no other has it.
      expires_s: how long a worker may be silent.
    """

    def __init__(self, job: Job, worker: str, expires_s: float):
        self._job, self._worker, self._expires_s = job, worker, expires_s
        self._seen: dict[int, tuple[str, float]] = {}  # others' leases: their content, and since when it has been so
        self._held: set[int] = set()
        self._count = 0
        self._ended, self._lock = threading.Event(), threading.Lock()
        threading.Thread(target=self._renew, daemon=True).start()

    def take(self, shard: int) -> bool:
        """Takes a shard if no one has it, or no one renews its lease any more."""
        if self._create(shard):
            return True
        content, now = _read(self._job.path("leases", shard)), time.monotonic()
        before, since = self._seen.get(shard, (None, now))
        if content != before:
            self._seen[shard] = content, now
            return False
        if now - since < self._expires_s:
            return False
        expired = self._job.path("leases", shard).with_name(f"{shard:06d}.{self._worker}.expired")
        with suppress(FileNotFoundError):  # another worker was faster
            os.rename(self._job.path("leases", shard), expired)
            expired.unlink()
        return self._create(shard)

    def require(self, shard: int) -> None:
        """Raises LeaseLostError if this worker does not have the shard any more; OSError if that cannot be known."""
        with self._lock:  # else it may be half renewed
            try:
                content = self._job.path("leases", shard).read_text(encoding="utf-8")
            except FileNotFoundError:
                content = ""
            if not content.startswith(f"{self._worker} "):
                self._held.discard(shard)
                raise LeaseLostError

    def release(self, shard: int) -> None:
        """Gives up a shard."""
        with self._lock:
            self._held.discard(shard)
            if _read(path := self._job.path("leases", shard)).startswith(f"{self._worker} "):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Gives up all shards; leases that cannot be removed will expire."""
        self._ended.set()
        for shard in list(self._held):
            with suppress(OSError):
                self.release(shard)

    def _create(self, shard: int) -> bool:
        with self._lock:
            try:
                with naming(path := self._job.path("leases", shard)), path.open("x", encoding="utf-8") as file:
                    file.write(f"{self._worker} {self._count}")
            except FileExistsError:
                return False
            self._held.add(shard)
            return True

    def _renew(self) -> None:
        while not self._ended.wait(self._expires_s / 5):
            with self._lock:
                self._count += 1
                for shard in list(self._held):
                    path = self._job.path("leases", shard)
                    with suppress(OSError):  # a mount that is away for a while
                        if not path.exists() or not path.read_text(encoding="utf-8").startswith(f"{self._worker} "):
                            self._held.discard(shard)  # it was taken
                            continue
                        path.write_text(f"{self._worker} {self._count}", encoding="utf-8")


def holders(job: Job) -> set[str]:
    """The workers that have a shard."""
    leases = (path for path in (job.folder / "leases").iterdir() if path.suffix != ".expired")
    return {_read(path).partition(" ")[0] for path in leases} - {""}


def release_all(job: Job, worker: str) -> None:
    """Releases the leases of a worker that is known to have ended; those that cannot be removed will expire."""
    with suppress(OSError):
        for path in (job.folder / "leases").iterdir():
            if _read(path).startswith(f"{worker} "):
                path.unlink(missing_ok=True)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
