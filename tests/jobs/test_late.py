"""Workers whose lease has expired: they write nothing any more."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs.echo import transcribe_all
from tests.jobs.test_jobs import failures, files, planned, sounds, undisturbed  # noqa: F401
from whisper_nnx.jobs import job as job_module
from whisper_nnx.jobs.job import Job
from whisper_nnx.jobs.journal import reopen_failed
from whisper_nnx.jobs.status import report, status
from whisper_nnx.jobs.worker import work


def away(paths: Iterator[str]) -> Iterator[tuple[int, Exception]]:
    for number, _ in enumerate(paths):
        yield number, OSError("away")


def expire(job: Job) -> None:
    for path in (job.folder / "leases").iterdir():
        path.unlink()


@pytest.mark.parametrize("before", ["failed", "export", "results"])
def test_a_worker_that_stands_still_before_it_publishes_writes_nothing_beside_newer_files(
    sounds,  # noqa: F811
    tmp_path,
    undisturbed,  # noqa: F811
    monkeypatch,
    before,
):
    """It stands still while its file is written to the disk; meanwhile others do the whole job."""
    job, real, stood = planned(sounds, tmp_path / "job"), job_module._sync, list[Path]()
    late = (lambda paths: transcribe_all(p + "x" for p in paths)) if before == "export" else away

    def sync(path: Path) -> None:
        real(path)
        if not stood and before in path.parts:
            stood.append(path)
            expire(job)
            work(job, transcribe_all, batched=True)
            monkeypatch.setattr(job_module, "_sync", real)

    monkeypatch.setattr(job_module, "_sync", sync)
    work(job, late, batched=True)
    assert stood
    assert files(job) == undisturbed


def test_results_of_a_late_worker_do_not_end_a_shard_that_is_tried_again(sounds, tmp_path, undisturbed, monkeypatch):  # noqa: F811
    """Others do the job, and open it again, while a worker writes its results to the disk."""
    job, real, stood = planned(sounds, tmp_path / "job"), job_module._sync, list[Path]()

    def sync(path: Path) -> None:
        real(path)
        if not stood and "results" in path.parts:
            stood.append(path)
            expire(job)
            work(job, away, batched=True)
            reopen_failed(job)

    monkeypatch.setattr(job_module, "_sync", sync)
    work(job, lambda paths: transcribe_all(paths) if stood else away(paths), batched=True)
    assert stood
    assert files(job) == undisturbed


def test_a_stale_row_of_failures_is_not_counted(sounds, tmp_path):  # noqa: F811
    work(job := planned(sounds, tmp_path / "job"), transcribe_all)
    done = job.shard(0)[0]
    job.path("failed", 0).write_text(f'{{"id": "{done.id}", "error": "OSError", "reason": "away"}}\n')
    assert report(job)["failed"] == {"ValueError": 1}
    assert status(job).failed == 1
