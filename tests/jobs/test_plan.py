"""How a small job is divided among several workers."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.echo import transcribe_all
from tests.jobs.test_jobs import files, recordings
from whisper_nnx.jobs.inputs import read_input
from whisper_nnx.jobs.job import Job, plan
from whisper_nnx.jobs.journal import speeds
from whisper_nnx.jobs.worker import work


def rows(folder: Path, count: int, seconds: float | None, name: str = "{:03d}.wav") -> str:
    """A list of recordings of that duration, or of an unknown one."""
    about = {} if seconds is None else {"duration": seconds}
    lines = [json.dumps({"audio": name.format(number)} | about) for number in range(count)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return str(folder / "rows.jsonl")


def sizes(folder: Path, source: str, batch_size: int = 1, **options: Any) -> list[int]:
    job = plan(folder / f"job{len(list(folder.iterdir()))}", read_input(source), {"batch_size": batch_size}, **options)
    return [len(job.shard(number)) for number in range(job.shards)]


def test_each_of_several_workers_gets_several_shards_of_a_small_job(tmp_path):
    source = rows(tmp_path, 60, 10.0)
    assert sizes(tmp_path, source) == [60]
    assert sizes(tmp_path, source, workers=2) == [8] * 7 + [4]
    assert sizes(tmp_path, source, workers=20) == [6] * 10  # a minute each
    assert sizes(tmp_path, source, workers=2, shard_s=250) == [25, 25, 10]
    assert sizes(tmp_path, source, batch_size=2, workers=2) == [8] * 7 + [4]
    assert sizes(tmp_path, source, batch_size=8, workers=2) == [24, 24, 12]  # three windows for each row of a batch
    assert sizes(tmp_path, rows(tmp_path, 20, 60.0), batch_size=8, workers=2) == [8, 8, 4]  # a recording for each
    assert sizes(tmp_path, source, batch_size=64, workers=2) == [20]


def test_shards_of_a_large_job_are_those_of_one_worker(tmp_path, monkeypatch):
    source = rows(tmp_path, 400, 600.0)
    assert sizes(tmp_path, source, workers=3) == sizes(tmp_path, source) == [6] * 66 + [4]
    assert sizes(tmp_path, source, workers=3, batch_size=4) == sizes(tmp_path, source, batch_size=4) == [16] * 25
    monkeypatch.setattr("whisper_nnx.jobs.job._AHEAD", 100)
    assert sizes(tmp_path, source, workers=4) == sizes(tmp_path, source)


def test_recordings_of_which_not_even_the_size_is_known_are_divided_by_their_number(tmp_path):
    assert sizes(tmp_path, rows(tmp_path, 60, None, "memory://nowhere/{}.wav"), workers=2) == [8] * 7 + [4]
    recordings(tmp_path, [f"{number:03d}.wav" for number in range(4)])
    for path in tmp_path.glob("*.wav"):
        path.write_bytes(b"x" * 16_000 * 200)  # 200 s each, as far as is known
    assert sizes(tmp_path, rows(tmp_path, 4, None), workers=2) == [1] * 4


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Ten minutes."""
    recordings(tmp_path, [f"{number:03d}.wav" for number in range(60)])
    return rows(tmp_path, 60, 10.0)


def test_two_workers_both_have_a_share_of_ten_minutes(source, tmp_path):
    job, both = plan(tmp_path / "job", read_input(source), {}, workers=2), threading.Barrier(2)
    begun = set[int]()

    def transcribe(paths):
        first = next(paths, None)
        if (worker := threading.get_ident()) not in begun:
            begun.add(worker)
            both.wait(timeout=20)  # each has a shard
        yield from transcribe_all(path for path in [first, *paths] if path)

    workers = [threading.Thread(target=work, args=(job, transcribe), kwargs={"name": name}) for name in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert speeds(job).keys() == {"a", "b"}
    work(expected := plan(tmp_path / "expected", read_input(source), {}, workers=2), transcribe_all)
    assert files(job) == files(expected)


def test_a_job_that_goes_on_with_other_workers_keeps_its_plan(source, tmp_path):
    job = plan(tmp_path / "job", read_input(source), {}, workers=2)

    def interrupted(paths):
        for count, found in enumerate(transcribe_all(paths)):
            if count == 25:
                raise KeyboardInterrupt
            yield found

    with pytest.raises(KeyboardInterrupt):
        work(job, interrupted)
    assert plan(tmp_path / "job", read_input(source), {}, workers=16) == job == Job.open(tmp_path / "job")
    work(job, transcribe_all)
    work(expected := plan(tmp_path / "expected", read_input(source), {}, workers=2), transcribe_all)
    assert files(job) == files(expected)
