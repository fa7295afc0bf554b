"""`reopen_failed`: each recording that failed is tried once more for each cause."""

import json
from pathlib import Path

import pytest

from tests.jobs.echo import transcribe_all
from tests.jobs.test_jobs import failures, files, planned, sounds, undisturbed  # noqa: F401
from whisper_nnx.jobs.job import Job
from whisper_nnx.jobs.journal import reopen_failed
from whisper_nnx.jobs.worker import work


class Failing:
    """Transcribes, but for what fails, and notes the names that were asked for."""

    def __init__(self, **reasons: str):
        self.reasons, self.asked = reasons, list[str]()

    def __call__(self, paths):
        for number, path in enumerate(paths):
            self.asked.append(name := Path(path).stem)
            reason = self.reasons.get(f"n{name}")
            yield number, OSError(reason) if reason else dict(transcribe_all(iter([path])))[0]

    def names_of(self, job: Job) -> list[str]:
        work(job, self)
        found, self.asked = self.asked, []
        return found


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_what_failed_is_tried_once_more_for_each_cause(sounds, tmp_path, undisturbed, is_interrupted):  # noqa: F811
    (sounds / "bad.wav").unlink()
    job, transcribe = planned(sounds, tmp_path / "job"), Failing(n003="away", n004="away")
    if is_interrupted:
        job.path("work", 0, "dead").write_text(
            "".join(f'{{"id": "{one.id}", "error": "OSError", "reason": "away"}}\n' for one in job.shard(0)[3:5])
        )
    assert len(transcribe.names_of(job)) == 60 - 2 * is_interrupted
    assert reopen_failed(job) == 0
    transcribe.reasons = {"n003": "away", "n004": "damaged"}
    assert transcribe.names_of(job) == ["003", "004"]
    assert reopen_failed(job) == 1
    assert transcribe.names_of(job) == ["004"]
    assert reopen_failed(job) == 2
    assert transcribe.names_of(job) == []
    assert [row["reason"] for row in failures(job)] == ["away", "damaged"]
    transcribe.reasons = {}
    assert reopen_failed(job, again=True) == 0
    assert transcribe.names_of(job) == ["003", "004"]
    assert reopen_failed(job, again=True) == 0
    assert transcribe.names_of(job) == []


def test_a_failure_of_which_the_row_was_lost_is_tried_again(sounds, tmp_path):  # noqa: F811
    work(job := planned(sounds, tmp_path / "job"), transcribe_all)
    job.path("failed", job.shards - 1).unlink()
    assert reopen_failed(job) == 0
    assert Failing(nbad="broken").names_of(job) == ["bad"]
    assert len(failures(job)) == 1


def test_a_failure_in_work_is_tried_once_more_too(sounds, tmp_path):  # noqa: F811
    job = planned(sounds, tmp_path / "job")
    line = json.dumps({"id": job.shard(0)[3].id, "error": "OSError", "reason": "away"}) + "\n"
    for name, left in (("a", 0), ("b", 1)):
        job.path("work", 0, name).write_text(line)
        assert reopen_failed(job) == left
        assert (line in job.path("work", 0, name).read_text()) == bool(left)
