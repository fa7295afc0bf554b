"""How a small job is divided among several workers, and what differs from the plan of a job that goes on."""

import json
import os
import shutil
import tarfile
import threading
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.jobs.echo import transcribe_all
from tests.jobs.test_jobs import files, recordings
from whisper_nnx.jobs.changes import warn_of_changes
from whisper_nnx.jobs.in_process import planned
from whisper_nnx.jobs.inputs import read_input
from whisper_nnx.jobs.job import Job, plan
from whisper_nnx.jobs.journal import speeds
from whisper_nnx.jobs.status import results
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
            both.wait(timeout=120)  # each has a shard
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


def test_a_plan_outlasts_a_loss_of_power(source, tmp_path, monkeypatch):
    """All its files are on the disk before its folder has its name, and then that is."""
    synced, real = list[str](), (os.fsync, os.rename)

    def fsync(descriptor):
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        real[0](descriptor)

    def rename(old, new):
        synced.append(f"{len(os.listdir(old))} files are the plan")
        real[1](old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    job = plan(tmp_path / "job", read_input(source), {}, shard_s=300)
    shards, others = sorted(synced[: job.shards]), synced[job.shards :]
    assert shards == [f"{n:06d}.jsonl" for n in range(job.shards)]
    assert [os.path.splitext(name)[1] for name in others[:2]] == [".tmp", ".partial"]
    assert others[2:] == [f"{job.shards + 1} files are the plan", "job"]


# What has changed since.


def changes(job: Job, source: Path | str) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_changes(job, str(source))
    return [str(one.message) for one in caught]


def test_a_folder_with_other_recordings_than_the_plan_is_told_in_a_line(tmp_path, monkeypatch):
    sounds = recordings(tmp_path / "sounds", ["a.wav", "b.wav", "deep/c.wav"])
    job = plan(tmp_path / "job", read_input(str(sounds)), {})
    monkeypatch.setattr("whisper_nnx.jobs.inputs.file_state", None)  # no file is looked at
    (sounds / "a.wav").write_bytes(b"changed: the worker reports it")
    (sounds / "notes.txt").write_text("")
    monkeypatch.chdir(sounds.parent)
    assert changes(job, "sounds") == changes(job, sounds / "**" / "*.wav") == []
    (sounds / "b.wav").unlink()
    recordings(sounds, ["d.wav", "deep/e.wav"])
    [line] = changes(job, sounds)
    assert line == (
        f"{sounds} has changed since the job was planned: 2 recordings are new, such as {sounds}/d.wav, "
        f"and 1 recording is gone, such as {sounds}/b.wav; "
        f"{job.folder} goes on as it was planned; what is new needs a new job"
    )
    assert len(changes(job, sounds / "**" / "*.wav")) == 1
    shutil.rmtree(sounds)
    [line] = changes(job, sounds)
    assert line.startswith(
        f"{job.folder} goes on as it was planned, as its input cannot be read: {sounds}: no such file"
    )


def test_rows_of_lists_are_compared_by_what_they_name_and_tars_by_their_names(tmp_path):
    recordings(tmp_path, ["a.wav", "b.wav"])
    rows = [{"audio": "a.wav", "offset": start, "duration": 1} for start in (0, 2)] + [{"audio": "memory://x.wav"}] * 2
    (listed := tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        tar.add(tmp_path / "a.wav", "a.wav")
    jobs = [plan(tmp_path / str(n), read_input(str(one)), {}) for n, one in enumerate((listed, tmp_path / "*.tar"))]
    assert changes(jobs[0], listed) == changes(jobs[1], tmp_path / "*.tar") == []
    shutil.copy(tmp_path / "1.tar", tmp_path / "2.tar")
    [line] = changes(jobs[1], tmp_path / "*.tar")
    assert f"1 recording is new, such as {tmp_path}/2.tar;" in line
    with listed.open("a") as file:
        file.write(json.dumps({"audio": "a.wav", "offset": 3.5, "duration": 1}))
    [line] = changes(jobs[0], listed)
    assert f"1 recording is new, such as {tmp_path}/a.wav from 3.5 s for 1 s;" in line


def test_servers_are_not_asked_what_has_changed(tmp_path, monkeypatch):
    fsspec.filesystem("memory").pipe("/new/a.wav", b"x")
    job = plan(tmp_path / "job", read_input("memory://new"), {})
    monkeypatch.setattr("whisper_nnx.jobs.inputs._remote", None)
    assert changes(job, "memory://new") == []


def test_a_job_that_goes_on_warns_of_changes_and_a_new_one_does_not(tmp_path, recwarn):
    sounds = recordings(tmp_path / "sounds", ["a.wav"])
    again = partial(planned, sounds, tmp_path / "job", None, {"beam_size": 2}, {})
    again()
    recordings(sounds, ["b.wav"])
    assert not recwarn
    with pytest.warns(UserWarning, match=r"1 recording is new, such as .*b\.wav"):
        assert again().recordings == 1


def test_more_than_a_million_shards_are_in_the_order_of_their_numbers(tmp_path):
    job = Job(tmp_path, {}, 1_000_001, 1_000_001)
    (tmp_path / "results").mkdir()
    for shard in (1_000_000, 999_999, 7):
        job.path("results", shard).write_text(json.dumps({"id": shard}))
    assert [row["id"] for row in results(job)] == [7, 999_999, 1_000_000]


@pytest.mark.parametrize("kind", ["list.txt", "rows.jsonl", "rows.parquet"])
def test_equal_relative_names_in_several_lists_are_different_recordings(tmp_path, kind):
    for name in "ab":
        recordings(tmp_path / "in" / name, ["talk.wav"])
        path = tmp_path / "in" / name / kind
        if kind == "rows.parquet":
            pq.write_table(pa.table({"audio": ["talk.wav"]}), path)
        else:
            path.write_text("talk.wav" if kind == "list.txt" else '{"audio": "talk.wav"}')
    job = plan(tmp_path / "job", read_input(str(tmp_path / "in" / "*" / kind)), {"output_format": "json"})
    work(job, transcribe_all)
    assert sorted(Path(row["audio"]).parent.name for row in results(job)) == ["a", "b"]
    assert len(list((job.folder / "export").rglob("talk.*.json"))) == 2
    [alone] = read_input(str(tmp_path / "in" / "a" / kind))  # its id does not depend on where the list is
    shutil.copytree(tmp_path / "in", tmp_path / "copy", copy_function=shutil.copy2)
    assert next(read_input(str(tmp_path / "copy" / "b" / kind))).id == alone.id


def test_equal_ids_in_rows_are_refused_with_what_to_do(tmp_path):
    recordings(tmp_path, ["a.wav", "b.wav"])
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(f'{{"audio": "{name}.wav", "id": 7}}')
    message = "id '7' of .*b.wav is that of another recording, too; make the ids of rows differ, or leave them out"
    with pytest.raises(ValueError, match=message):
        plan(tmp_path / "job", read_input(str(tmp_path / "*.jsonl")), {})
