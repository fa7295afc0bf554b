"""What processes that were killed leave in the folder of a job: hidden files, unfinished plans, expired leases."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Event

from whisper_nnx.jobs.job import Job
from whisper_nnx.output.writers import UNFINISHED

_FOLDERS = ("", "results/", "failed/", "work/", "export/", "export/*/")
_PATTERNS = ("plan.*.partial", "leases/*.expired", *(f"{folder}{UNFINISHED}*.tmp" for folder in _FOLDERS))


def remove_leftovers(job: Job, expires_s: float, ended: Event) -> None:
    """Removes what does not change for `expires_s` by the own clock, as leases expire; `ended`: nothing any more."""
    with suppress(OSError):  # a mount that is away: the next worker does it
        before = {path: _state(path) for path in _found(job.folder)}
        if not before or ended.wait(expires_s):
            return
        for path, state in before.items():
            if _state(path) != state:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _found(folder: Path) -> Iterator[Path]:
    for pattern in _PATTERNS:
        yield from folder.glob(pattern)


def _state(path: Path) -> tuple[int, int] | None:
    """Changes when the file, or what is in the folder, does; None: it is gone."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size
