"""Jobs without a model: what is planned, and that dying workers change nothing."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.jobs.echo import transcribe_all, transcribe_together, transcript
from whisper_nnx.jobs.inputs import read_input
from whisper_nnx.jobs.job import Job, plan, write_once
from whisper_nnx.jobs.journal import Journal, Progress, note_speed, reopen_failed
from whisper_nnx.jobs.leases import Leases
from whisper_nnx.jobs.status import Status, report, results, status, suspicions
from whisper_nnx.jobs.supervise import Process, supervise
from whisper_nnx.jobs.worker import work
from whisper_nnx.output.writers import UNFINISHED


def recordings(folder: Path, names: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x" * 2000)  # an eighth of a second, by its size
    return folder


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    return recordings(tmp_path / "sounds", [f"{n:03d}.wav" for n in range(60)] + ["bad.wav"])


def planned(sounds: Path, folder: Path) -> Job:
    return plan(folder, read_input(str(sounds)), {"input": str(sounds), "output_format": "json"}, shard_s=1)


def files(job: Job) -> dict[str, bytes]:
    """What a job has written, by name, but speeds and retries: of `leases` and `work` nothing must be left."""
    left_out = ("speed", "retried")
    paths = [path for path in job.folder.rglob("*") if path.is_file() and path.parent.name not in left_out]
    whole = [path for path in paths if not path.name.startswith(UNFINISHED)]  # when it was killed
    return {str(path.relative_to(job.folder)): path.read_bytes() for path in whole}


@pytest.fixture
def undisturbed(sounds: Path, tmp_path: Path) -> dict[str, bytes]:
    job = planned(sounds, tmp_path / "undisturbed")
    work(job, transcribe_all)
    assert len(list((job.folder / "export").rglob("*.json"))) == 60
    return files(job)


def failures(job: Job) -> list[dict[str, Any]]:
    texts = [path.read_text(encoding="utf-8") for path in sorted((job.folder / "failed").iterdir())]
    return [json.loads(line) for line in "".join(texts).splitlines()]


def run(job: Job, workers: int = 2, poison: str = "", *more: str) -> tuple[int, list[str]]:
    lines: list[str] = []

    def start(name: str, place: int) -> Process:
        return Process([sys.executable, "-m", "tests.jobs.echo", str(job.folder), name, poison, *more])

    return supervise(job, start, workers, lines.append), lines


# Input and plan.


def test_a_folder_is_searched_to_any_depth_in_the_order_of_names(tmp_path):
    recordings(tmp_path, ["b/2.MP3", "b/1.wav", "a.flac", ".hidden.wav", "notes.txt"])
    found = list(read_input(str(tmp_path)))
    assert [os.path.relpath(one.audio, tmp_path) for one in found] == ["a.flac", "b/1.wav", "b/2.MP3"]
    assert {one.size for one in found} == {2000}


def test_ids_are_those_of_path_and_size_wherever_the_folder_is(tmp_path):
    recordings(tmp_path / "one", ["a.wav", "b.wav"])
    recordings(tmp_path / "two", ["a.wav", "b.wav"])
    (tmp_path / "two" / "b.wav").write_bytes(b"longer" * 2000)
    one, two = ({Path(r.audio).name: r.id for r in read_input(str(tmp_path / name))} for name in ("one", "two"))
    pattern = {Path(r.audio).name: r.id for r in read_input(str(tmp_path / "one" / "*.wav"))}
    assert one["a.wav"] == two["a.wav"] != one["b.wav"] != two["b.wav"]
    assert pattern == one


def test_lists_and_json_lines_are_relative_to_their_folder(tmp_path):
    recordings(tmp_path, ["a.wav"])
    (tmp_path / "list.txt").write_text("a.wav\n\nmissing.wav\n")
    rows = [{"id": "x1", "audio": "a.wav", "duration": 2}, {"audio_filepath": str(tmp_path / "a.wav")}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [(r.audio, r.size) for r in read_input(str(tmp_path / "list.txt"))] == [
        (str(tmp_path / "a.wav"), 2000),
        (str(tmp_path / "missing.wav"), -1),
    ]
    first, second = read_input(str(tmp_path / "rows.jsonl"))
    assert (first.id, first.duration, first.audio) == ("x1", 2.0, str(tmp_path / "a.wav"))
    assert second.audio == first.audio


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "rows.jsonl, line 2: not JSON"),
        ('{"text": "a"}', "rows.jsonl, line 2: no recording; name it by one of audio"),
        ('{"audio": "a.wav", "duration": "long"}', "line 2: duration='long' must be a number of seconds"),
    ],
)
def test_a_bad_row_is_named(tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_text(f'{{"audio": "a.wav"}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        list(read_input(str(tmp_path / "rows.jsonl")))


def test_an_input_that_does_not_exist_or_holds_nothing_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file, folder or pattern"):
        list(read_input(str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no recordings"):
        planned(tmp_path / "empty", tmp_path / "deep" / "job")
    (tmp_path / "made").mkdir()
    with pytest.raises(FileNotFoundError):
        planned(tmp_path / "nowhere", tmp_path / "made")
    assert {path.name for path in tmp_path.rglob("*")} == {"empty", "made"}  # what was there before


def test_shards_hold_about_as_much_audio_each_and_a_recording_once(sounds, tmp_path):
    listed = [*read_input(str(sounds))] * 2
    job = plan(tmp_path / "job", listed, {}, shard_s=1)
    assert [len(job.shard(n)) for n in range(job.shards)] == [8] * 7 + [5]
    assert job.recordings == 61
    assert [one for n in range(job.shards) for one in job.shard(n)] == listed[:61]


def test_two_recordings_with_one_id_are_refused(tmp_path):
    recordings(tmp_path, ["a.wav", "b.wav"])
    (tmp_path / "rows.jsonl").write_text('{"id": 1, "audio": "a.wav"}\n{"id": 1, "audio": "b.wav"}\n')
    with pytest.raises(ValueError, match=r"id '1' of .*b.wav is that of another recording, too"):
        plan(tmp_path / "job", read_input(str(tmp_path / "rows.jsonl")), {})


def test_another_command_on_the_same_folder_is_refused_with_what_differs(sounds, tmp_path):
    plan(tmp_path / "job", read_input(str(sounds)), {"language": "en"})
    with pytest.raises(ValueError, match="holds a job with language='en', not 'de'"):
        plan(tmp_path / "job", [], {"language": "de"})


def test_many_planners_at_once_make_one_plan(sounds, tmp_path):
    made: list[Job] = []
    threads = [threading.Thread(target=lambda: made.append(planned(sounds, tmp_path / "job"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8
    assert len({job.recordings for job in made}) == 1
    assert not list((tmp_path / "job").glob("*.partial"))


def test_a_planner_that_died_leaves_nothing_that_counts(sounds, tmp_path, undisturbed):
    (tmp_path / "job" / "plan.0123.partial").mkdir(parents=True)
    (tmp_path / "job" / "plan.0123.partial" / "000000.jsonl").write_text("{")
    job = planned(sounds, tmp_path / "job")
    work(job, transcribe_all)
    assert {name: content for name, content in files(job).items() if "partial" not in name} == undisturbed


# Work.


def test_results_are_in_the_order_of_the_plan_and_failures_apart(sounds, tmp_path):
    job = planned(sounds, tmp_path / "job")
    done: list[int] = []
    work(job, transcribe_all, report=done.append)
    rows = list(results(job))
    assert sorted(done) == list(range(job.shards))
    assert [Path(row["audio"]).name for row in rows] == [f"{n:03d}.wav" for n in range(60)]
    assert rows[0]["text"] == " 000.wav déjà vu"
    [failed] = failures(job)
    assert failed["error"] == "ValueError"
    assert failed["reason"].endswith("bad.wav: broken")
    assert status(job) == Status(recordings=61, done=60, failed=1, shards=8, shards_done=8, workers=0)
    assert report(job)["languages"] == {"en": 60}


def test_a_recording_that_changed_since_the_plan_is_not_transcribed(sounds, tmp_path):
    job = planned(sounds, tmp_path / "job")
    (sounds / "004.wav").write_bytes(b"longer" * 1000)
    (sounds / "005.wav").unlink()
    copied = (sounds / "006.wav").stat()
    os.utime(sounds / "006.wav", (0, 0))  # another one of the same size
    os.utime(sounds / "007.wav", ns=(0, copied.st_mtime_ns // 10**9 * 10**9))  # by a system that keeps whole seconds
    planned_at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(copied.st_mtime))
    work(job, transcribe_all)
    assert [row["reason"].split(": ", 1)[1] for row in failures(job)] == [
        "6000 bytes, but 2000 when the job was planned; start a new job for it",
        "file not found",
        f"modified at 1970-01-01 00:00:00 UTC, but at {planned_at} when the job was planned; "
        "copies must keep times (rsync -a), and what has changed needs a new job",
        "broken",
    ]


def test_a_url_that_changed_is_not_transcribed_alone_either(tmp_path):
    memory = fsspec.filesystem("memory")
    for name in "ab":
        memory.pipe(f"/alone/{name}.wav", b"x" * 10)
    job = plan(tmp_path / "job", read_input("memory://alone"), {})
    for number in range(2):
        dead = Journal(job, 0, f"dead-{number}")
        dead.begin(job.shard(0)[0].id, alone=False)
        dead.close()
    memory.pipe("/alone/a.wav", b"longer" * 10)
    work(job, transcribe_all)
    [failed] = failures(job)
    assert failed["reason"].endswith("/a.wav: 60 bytes, but 10 when the job was planned; start a new job for it")


def test_a_recording_that_changes_while_it_is_transcribed_fails_also_after_a_worker_died(sounds, tmp_path):
    job = planned(sounds, tmp_path / "job")
    dead = Journal(job, 0, "dead")
    dead.begin(job.shard(0)[2].id, alone=False)
    dead.close()

    def changing(paths):
        for number, path in enumerate(paths):
            if path.endswith(("002.wav", "004.wav")):
                Path(path).write_bytes(b"longer" * 1000)
            elif path.endswith("005.wav"):
                os.utime(path, (0, 0))
            elif path.endswith("006.wav"):
                Path(path).unlink()
            yield number, transcript(path)

    work(job, changing)
    reasons = {Path(row["audio"]).name: row["reason"].split(": ", 1)[1] for row in failures(job)}
    assert reasons.keys() == {"002.wav", "004.wav", "005.wav"}
    assert reasons["005.wav"].startswith("modified at 1970-01-01 00:00:00 UTC, but at ")
    assert (
        reasons["002.wav"]
        == reasons["004.wav"]
        == "6000 bytes, but 2000 when the job was planned; start a new job for it"
    )


def test_what_failed_is_tried_again_and_only_that(sounds, tmp_path, undisturbed):
    job, asked = planned(sounds, tmp_path / "job"), list[str]()

    def first(paths):
        for number, path in enumerate(paths):
            yield number, OSError("away") if path.endswith(("7.wav", "bad.wav")) else transcript(path)

    def second(paths):
        def noted():
            for path in paths:
                asked.append(Path(path).name)
                yield path

        return transcribe_all(noted())

    work(job, first)
    assert status(job).failed == 7
    reopen_failed(job)
    work(job, second)
    assert asked == [*(f"0{n}7.wav" for n in range(6)), "bad.wav"]
    [bad] = failures(job)
    assert bad["reason"].endswith("bad.wav: broken")
    assert files(job) == undisturbed


def test_an_interrupted_worker_keeps_what_is_finished(sounds, tmp_path, undisturbed):
    job, asked = planned(sounds, tmp_path / "job"), count()

    def interrupted(paths):
        for number, result in transcribe_all(paths):
            if next(asked) == 25:
                raise KeyboardInterrupt
            yield number, result

    with pytest.raises(KeyboardInterrupt):
        work(job, interrupted)
    assert not list((tmp_path / "job" / "leases").iterdir())
    begun = list[str]()

    def resumed(paths):
        def noted():
            for path in paths:
                begun.append(path)
                yield path

        return transcribe_all(noted())

    work(job, resumed)
    assert len(begun) == 61 - 25
    assert files(job) == undisturbed


@contextmanager
def killing(job: Job) -> Iterator[list[int]]:
    """Within this context, workers of a job are killed at random moments."""
    chance, killed, running = random.Random(7), list[int](), threading.Event()

    def kill():
        while not running.wait(0.1 + 0.3 * chance.random()) and len(killed) < 12:
            found = subprocess.run(["pgrep", "-f", f"tests.jobs.echo {job.folder}"], capture_output=True, text=True)
            if pids := found.stdout.split():
                victim = int(chance.choice(pids))
                try:
                    os.kill(victim, signal.SIGKILL)
                    killed.append(victim)
                except ProcessLookupError:
                    pass

    thread = threading.Thread(target=kill)
    thread.start()
    yield killed
    running.set()
    thread.join()


@pytest.mark.parametrize("batched", [False, True])
def test_workers_that_are_killed_at_any_moment_change_no_byte(sounds, tmp_path, undisturbed, batched):
    job = planned(sounds, tmp_path / "job")
    if batched:
        work(expected := planned(sounds, tmp_path / "expected"), transcribe_together, batched=True)
        undisturbed = files(expected)
    with killing(job) as killed:
        for _ in range(5):  # the command is given again where it gave up
            ended, _ = run(job, 2, "", *["batched"] * batched)
            if ended == 0:
                break
    assert killed
    assert files(job) == undisturbed


def test_a_recording_that_ends_its_worker_three_times_is_quarantined_and_the_rest_goes_on(sounds, tmp_path):
    job = planned(sounds, tmp_path / "job")
    ended, lines = run(job, workers=1, poison="033.wav")
    assert ended == 0
    assert len(lines) == 3
    assert status(job).done == 59
    failed, _ = failures(job)
    assert failed["reason"].endswith("033.wav: 3 or more workers ended while they transcribed it")


def dead(job: Job, shard: int, name: str, begun: list[str], alone: bool = False, interrupted: bool = False) -> None:
    """The journal of a worker that has ended, or was interrupted, while it transcribed these."""
    journal = Journal(job, shard, name)
    for id_ in begun:
        journal.begin(id_, alone)
    if interrupted:
        journal.release()
    journal.close()


def test_in_a_batch_a_recording_that_ends_its_workers_leaves_the_same_bytes_whatever_else_ends_them(sounds, tmp_path):
    jobs = [planned(sounds, tmp_path / name) for name in ("undisturbed", "job")]
    poisoned = [one.id for one in jobs[0].shard(4)[:3]]
    assert jobs[0].shard(4)[1].audio.endswith("033.wav")
    for number in range(5):
        alone = number >= 3
        dead(jobs[0], 4, f"worker{number}", poisoned[1:2] if alone else poisoned, alone)
    work(jobs[0], transcribe_together, batched=True)
    for number in range(2):  # the first one of the shard is suspected, too
        dead(jobs[1], 0, f"killed{number}", [one.id for one in jobs[1].shard(0)])
        dead(jobs[1], 4, f"killed{number}", poisoned)
    ended, lines = run(jobs[1], 1, "033.wav", "batched")
    assert (ended, len(lines)) == (0, 3)
    assert status(jobs[0]).done == 59
    assert failures(jobs[0])[0]["reason"].endswith("033.wav: 3 or more workers ended while they transcribed it")
    assert files(jobs[1]) == files(jobs[0])


def test_in_a_batch_those_that_end_no_worker_alone_are_transcribed_with_the_others_again(sounds, tmp_path):
    jobs, asked = [planned(sounds, tmp_path / name) for name in ("undisturbed", "job")], list[int]()
    shard = jobs[1].shard(0)
    for number in range(3):
        dead(jobs[1], 0, f"killed{number}", [one.id for one in shard[:3]])

    def counted(paths):
        found = list(transcribe_together(paths))
        asked.append(len(found))
        return found

    for job in jobs:
        work(job, counted, batched=True)
    assert asked == [8] * 7 + [5] + [1] * 3 + [8] * 7 + [5]
    assert files(jobs[1]) == files(jobs[0])


def test_a_shard_that_never_ends_as_a_whole_is_done_one_by_one(sounds, tmp_path):
    job, asked = planned(sounds, tmp_path / "job"), list[int]()
    for number in range(10):  # interrupted, or killed
        dead(job, 0, f"worker{number}", [job.shard(0)[0].id], interrupted=number % 2 == 0)

    def interrupted(paths):
        found = list(transcribe_together(paths))
        asked.append(len(found))
        if len(asked) == 6:
            raise KeyboardInterrupt
        return found

    with pytest.raises(KeyboardInterrupt):
        work(job, interrupted, batched=True)
    work(job, interrupted, batched=True)
    assert asked == [0] + [1] * 5 + [0] + [1] * 4 + [8] * 6 + [5]
    assert (status(job).done, status(job).failed) == (60, 1)


def test_a_shard_that_is_done_one_by_one_stays_so_when_a_poisoned_recording_is_found(sounds, tmp_path):
    job = planned(sounds, tmp_path / "job")
    for number in range(10):
        dead(job, 4, f"worker{number}", [one.id for one in job.shard(4)[:3]])
    ended, lines = run(job, 1, "033.wav", "batched")
    assert (ended, len(lines)) == (0, 2)  # alone
    rows = map(json.loads, job.path("results", 4).read_text(encoding="utf-8").splitlines())
    assert [(Path(row["audio"]).name, row["segments"][0]["avg_logprob"]) for row in rows] == [
        (name, -zlib.crc32(name.encode()) / 1e10) for name in ("032.wav", *(f"{n:03d}.wav" for n in range(34, 40)))
    ]


def test_a_shard_that_is_done_one_by_one_stays_so_when_failures_are_tried_again(sounds, tmp_path):
    job = planned(sounds, tmp_path / "job")
    journal = Journal(job, 0, "worker")
    journal.give_up()
    journal.finish({"id": job.shard(0)[0].id, "error": "OSError"})
    journal.close()
    reopen_failed(job)
    assert not (found := Progress.read(job, 0)).rows
    assert found.is_given_up()


def test_in_a_batch_the_longest_recordings_come_first_and_results_are_in_the_order_of_the_plan(sounds, tmp_path):
    for name in ("003.wav", "bad.wav"):
        (sounds / name).write_bytes(b"x" * 3000)
    job, asked = planned(sounds, tmp_path / "job"), list[str]()
    work(job, lambda paths: transcribe_all(asked.append(Path(path).name) or path for path in paths), batched=True)
    assert asked[:4] == ["003.wav", "000.wav", "001.wav", "002.wav"]
    assert [Path(row["audio"]).name for row in results(job)] == [f"{n:03d}.wav" for n in range(60)]


def test_shards_of_batches_hold_several_recordings_for_each_row(sounds, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"audio": "{n}.wav", "duration": 3600}}\n' for n in range(20)))

    def sizes(**options):
        job = plan(
            tmp_path / f"job{len(list(tmp_path.iterdir()))}", read_input(str(tmp_path / "rows.jsonl")), **options
        )
        return [len(job.shard(n)) for n in range(job.shards)]

    assert sizes(settings={}) == [1] * 20
    assert sizes(settings={"batch_size": 2}) == [8, 8, 4]
    assert sizes(settings={"batch_size": 2}, shard_s=7200) == [2] * 10


def test_workers_that_die_before_they_begin_are_not_started_for_ever(sounds, tmp_path):
    job, lines = planned(sounds, tmp_path / "job"), list[str]()
    command = [sys.executable, "-c", "import sys; sys.exit(130)"]
    assert supervise(job, lambda name, place: Process(command), 1, lines.append) == 130
    assert lines == ["a worker was interrupted"]
    command = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    assert supervise(job, lambda name, place: Process(command), 2, lines.append) == 1
    assert lines.count("a worker died (signal 9); another one continues") == 4
    assert lines.count("3 workers died before they began (signal 9): not enough memory?") == 2
    assert status(job).done == 0


def test_a_worker_ends_with_the_process_that_has_started_it_also_where_that_is_killed(tmp_path):
    child = """if True:
        import sys, time
        from whisper_nnx.jobs.supervise import end_with
        from whisper_nnx.runtime.console import Terminated, termination_interrupts
        with termination_interrupts():
            end_with(int(sys.argv[1]))
            try:
                open(sys.argv[2], "w").close()
                time.sleep(60)
            except Terminated:
                open(sys.argv[2] + ".ended", "w").close()
    """
    code = "import os, subprocess, sys; subprocess.run([*sys.argv[1:4], str(os.getpid()), sys.argv[4]])"
    parent = subprocess.Popen([sys.executable, "-c", code, sys.executable, "-c", child, str(tmp_path / "child")])
    for name in ("child", "child.ended"):
        end = time.monotonic() + 60
        while not (tmp_path / name).exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        parent.kill()
    assert parent.wait() == -signal.SIGKILL


def test_a_full_disk_ends_the_worker_and_nothing_is_half_written(sounds, tmp_path, undisturbed, monkeypatch):
    job = planned(sounds, tmp_path / "job")

    def full(path, content, check):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("whisper_nnx.jobs.worker.write_once", full)
        with pytest.raises(OSError, match="No space left"):
            work(job, transcribe_all)
    assert not list((tmp_path / "job" / "results").iterdir())
    work(job, transcribe_all)
    assert files(job) == undisturbed


def test_a_full_disk_is_named_with_the_file_that_was_written(sounds, tmp_path):
    job = planned(sounds, tmp_path / "job")
    (path := job.path("work", 0, "full")).symlink_to("/dev/full")
    journal = Journal(job, 0, "full")
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        journal.begin("a", alone=False)
    journal.close()


@pytest.mark.parametrize("gone", ["results", "leases", "work", ""])
def test_a_folder_that_vanishes_ends_the_worker_and_what_comes_back_is_continued(sounds, tmp_path, undisturbed, gone):
    job = planned(sounds, tmp_path / "job")

    def vanish(shard):
        if shard == 3:
            (job.folder / gone).rename(tmp_path / "away")

    with pytest.raises(OSError, match=str(job.folder)):
        work(job, transcribe_all, report=vanish)
    (tmp_path / "away").rename(job.folder / gone)
    work(job, transcribe_all, expires_s=0.2)
    assert files(job) == undisturbed


# Leases.


def test_a_machine_that_stands_still_is_replaced_and_changes_nothing_when_it_returns(sounds, tmp_path, undisturbed):
    job = planned(sounds, tmp_path / "job")
    other = subprocess.Popen([sys.executable, "-m", "tests.jobs.echo", str(job.folder), "other"])
    while not list((job.folder / "work").iterdir()):
        time.sleep(0.01)
    other.send_signal(signal.SIGSTOP)
    assert other.poll() is None
    work(job, transcribe_all, expires_s=0.2)
    assert files(job) == undisturbed
    other.send_signal(signal.SIGCONT)
    assert other.wait(60) == 0
    assert files(job) == undisturbed


def test_a_lease_is_taken_when_it_was_silent_for_long_enough_by_the_own_clock(sounds, tmp_path, monkeypatch):
    job = planned(sounds, tmp_path / "job")
    dead, other = Leases(job, "dead", expires_s=1000), Leases(job, "other", expires_s=1000)
    assert dead.take(0)
    os.utime(job.path("leases", 0), (0, 0))  # another machine's clock
    assert not other.take(0)
    later = time.monotonic() + 999
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert not other.take(0)
    later += 2
    assert other.take(0)
    assert job.path("leases", 0).read_text().startswith("other ")
    dead.release(0)  # it is not its own any more
    assert job.path("leases", 0).exists()


def test_a_lease_that_is_renewed_is_not_taken(sounds, tmp_path):
    job = planned(sounds, tmp_path / "job")
    alive, other = Leases(job, "alive", expires_s=0.2), Leases(job, "other", expires_s=0.6)
    assert alive.take(0)
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        assert not other.take(0)
        time.sleep(0.05)
    alive.close()
    assert other.take(0)
    other.close()


def test_what_killed_processes_have_left_is_removed_and_nothing_that_is_being_written(sounds, tmp_path, undisturbed):
    job = planned(sounds, tmp_path / "job")
    left = ["plan.1.partial/0.jsonl", "leases/000000.dead.expired", "results/.whisper_nnx-1.tmp", ".whisper_nnx-2.tmp"]
    for name in (*left, "export/000000/.whisper_nnx-3.tmp", written := "failed/.whisper_nnx-4.tmp"):
        (job.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (job.folder / name).write_text("{")

    def writing(paths):
        with (job.folder / written).open("a") as file:
            for found in transcribe_all(paths, seconds=0.02):
                file.write("{")
                file.flush()
                yield found

    work(job, writing, expires_s=0.4)
    assert [path.name for path in job.folder.rglob(".*")] == [Path(written).name]
    assert files(job) == undisturbed


def test_a_planner_whose_plan_was_removed_joins_the_one_that_was_faster(sounds, tmp_path):
    found = read_input(str(sounds))

    def slow():
        yield next(found)
        [unfinished] = (tmp_path / "job").glob("plan.*.partial")
        planned(sounds, tmp_path / "job")
        shutil.rmtree(unfinished)
        yield from found

    settings = {"input": str(sounds), "output_format": "json"}
    assert plan(tmp_path / "job", slow(), settings, shard_s=1) == planned(sounds, tmp_path / "job")


# The report.


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, []),
        ({"compression_ratio": 3.0}, ["repetitive"]),
        ({"avg_logprob": -1.5}, ["low probability"]),
        ({"end": 0.1}, ["unlikely rate of speech"]),
        ({"end": 29.0}, ["unlikely rate of speech"]),
        ({"language_probability": 0.4}, ["unsure language"]),
    ],
)
def test_transcripts_that_may_be_wrong_are_named(change, reason):
    row = transcript("a.wav")
    (row if "language_probability" in change else row["segments"][0]).update(change)
    assert suspicions(row) == reason


def test_the_report_counts_what_was_retried_or_failed_and_the_time_that_workers_took(sounds, tmp_path):
    job = planned(sounds, tmp_path / "job")
    assert report(job)["real_time_factor"] is None

    def transcribe(paths):
        for number, path in enumerate(paths):
            retried = {"retries": {"logprob": 1, "compression_ratio": 2}} if path.endswith("1.wav") else {}
            yield number, ValueError("broken") if path.endswith("bad.wav") else transcript(path) | retried

    work(job, transcribe)
    (notes,) = (job.folder / "speed").glob("*.jsonl")
    lines = [json.loads(line) for line in notes.read_text().splitlines()]
    assert [line["audio_s"] for line in lines] == [16.0] * 7 + [8.0]
    notes.write_text("".join(json.dumps({"audio_s": 16.0, "seconds": 4.0}) + "\n" for _ in range(8)))
    found = report(job)
    assert found["hours"] == pytest.approx(120 / 3600, abs=1e-4)
    assert found["real_time_factor"] == 0.25
    assert found["retries_by_threshold"] == {"compression_ratio": 12, "logprob": 6}
    assert found["failed"] == {"ValueError": 1}


def test_the_report_counts_the_failures_of_shards_in_work_as_the_status_does(sounds, tmp_path):
    job = planned(sounds, tmp_path / "job")
    journal = Journal(job, 0, "worker")
    for row in ({"id": "a", "error": "AudioError"}, {"id": "b"}):
        journal.finish(row)
    journal.close()
    assert (status(job).done, status(job).failed) == (1, 1)
    assert report(job)["failed"] == {"AudioError": 1}


def test_the_status_counts_what_is_in_work_and_extrapolates_from_the_speed_of_its_workers(sounds, tmp_path):
    job = planned(sounds, tmp_path / "job")
    job.path("work", 0, "a").write_text('{"begun": "x", "alone": false}\n{"id": "x"}\n{"id": "y", "error": "E"}\n')
    job.path("leases", 0).write_text("a 3")
    assert status(job) == Status(recordings=61, done=1, failed=1, shards=8, shards_done=0, workers=1)  # no speed yet
    job.path("leases", 1).write_text("b 7")
    note_speed(job, "a", 30.0, 10.0)
    note_speed(job, "gone", 10.0, 1.0)
    found = status(job)
    assert (found.workers, found.speed) == (2, 6.0)  # b's is not known
    assert found.left_s == pytest.approx(8 * 20 / 6)


def test_shards_of_another_length_and_a_damaged_plan_are_refused(sounds, tmp_path):
    settings = planned(sounds, tmp_path / "job").settings
    with pytest.raises(ValueError, match=r"holds a job with shard_s=1, not 2; choose another folder"):
        plan(tmp_path / "job", read_input(str(sounds)), settings, shard_s=2)
    with pytest.raises(ValueError, match=r"shard_s=nan must be above 0"):
        plan(tmp_path / "other", read_input(str(sounds)), {}, shard_s=float("nan"))
    for damaged, message in (('{"format": 1, ', "is damaged"), ("[]", "has format None"), ("{}", "has format None")):
        (tmp_path / "job" / "plan" / "job.json").write_text(damaged)
        with pytest.raises(ValueError, match=rf"job.json {message}"):
            Job.open(tmp_path / "job")


def test_failures_are_not_lost_when_reopening_them_is_interrupted(sounds, tmp_path, monkeypatch):
    work(job := planned(sounds, tmp_path / "job"), transcribe_all)
    removed, real = list[Path](), Path.unlink

    def unlink(path, *args, **kwargs):
        if path.parent.name in ("results", "failed"):
            if removed:
                raise KeyboardInterrupt
            removed.append(path)
        real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(KeyboardInterrupt):
        reopen_failed(job)
    monkeypatch.undo()
    work(job, transcribe_all)
    assert (status(job).done, status(job).failed) == (60, 1)


def test_a_recording_that_was_interrupted_three_times_is_not_to_blame(sounds, tmp_path, undisturbed):
    job = planned(sounds, tmp_path / "job")

    def interrupted(paths):
        for _ in paths:
            raise KeyboardInterrupt
        yield from ()

    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            work(job, interrupted)
    work(job, transcribe_all)
    assert files(job) == undisturbed


def test_a_worker_that_wakes_up_late_changes_nothing_of_what_others_have_done(sounds, tmp_path, undisturbed):
    job = planned(sounds, tmp_path / "job")

    def late(paths):
        waiting = [next(paths) for _ in range(3)]
        for path in (job.folder / "leases").iterdir():
            path.unlink()  # as if they had expired
        work(job, transcribe_all)
        for number, _ in enumerate([*waiting, *paths]):
            yield number, OSError("away")

    work(job, late)
    assert files(job) == undisturbed


def test_failures_of_shards_that_are_not_done_are_tried_again(sounds, tmp_path, undisturbed):
    job = planned(sounds, tmp_path / "job")

    def away(paths):
        for number, _ in enumerate(paths):
            if number == 12:
                raise KeyboardInterrupt
            yield number, OSError("away")

    with pytest.raises(KeyboardInterrupt):
        work(job, away)
    assert (status(job).done, status(job).failed) == (0, 12)
    reopen_failed(job)
    assert status(job).failed == 0
    work(job, transcribe_all)
    assert files(job) == undisturbed


def test_a_worker_that_is_killed_after_its_results_leaves_no_journal(sounds, tmp_path, undisturbed, monkeypatch):
    job = planned(sounds, tmp_path / "job")
    with monkeypatch.context() as killed:
        killed.setattr("whisper_nnx.jobs.worker.forget", lambda job, shard: None)
        work(job, lambda paths: ((n, OSError("away")) for n, _ in enumerate(paths)))
    assert list((job.folder / "work").iterdir())
    reopen_failed(job)
    assert status(job).failed == 0
    work(job, transcribe_all)
    assert files(job) == undisturbed


def test_a_recording_that_was_missing_when_planned_may_come_later(tmp_path):
    (tmp_path / "list.txt").write_text("late.wav\n")
    job = plan(tmp_path / "job", read_input(str(tmp_path / "list.txt")), {})
    work(job, transcribe_all)
    assert status(job).failed == 1
    recordings(tmp_path, ["late.wav"])
    reopen_failed(job)
    work(job, transcribe_all)
    assert (status(job).done, status(job).failed) == (1, 0)


def test_shards_do_not_wait_for_the_suspects_of_all(sounds, tmp_path, undisturbed):
    job = planned(sounds, tmp_path / "job")
    for shard in range(job.shards):
        (journal := Journal(job, shard, "dead")).begin(job.shard(shard)[0].id, alone=False)
        journal.close()

    def transcribe(paths):
        for found in transcribe_all(paths):
            assert len(list((job.folder / "leases").iterdir())) == 1
            yield found

    work(job, transcribe)
    assert files(job) == undisturbed


def test_of_two_results_of_a_shard_the_first_stays_also_without_hard_links(tmp_path, monkeypatch):
    def unsupported(*_):
        raise PermissionError

    for number, link in enumerate((os.link, unsupported)):
        monkeypatch.setattr(os, "link", link)
        path = tmp_path / f"{number}.jsonl"
        assert [write_once(path, content) for content in ("first", "second")] == [True, False]
        assert path.read_text() == "first"
    assert len(list(tmp_path.iterdir())) == 2


def test_reopening_goes_on_where_another_process_was_faster(sounds, tmp_path, monkeypatch, undisturbed):
    work(job := planned(sounds, tmp_path / "job"), transcribe_all)
    real = Job.n_failed

    def slow(self, shard):
        if shard == self.shards - 1:
            monkeypatch.setattr(Job, "n_failed", real)
            reopen_failed(self)
            assert not self.is_done(shard)
        return real(self, shard)

    monkeypatch.setattr(Job, "n_failed", slow)
    reopen_failed(job)
    work(job, transcribe_all)
    assert files(job) == undisturbed
