"""What stops a worker, because it is not the fault of a recording."""

import errno
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import jax
import pytest

from tests.jobs.echo import transcribe_all, transcript
from tests.jobs.test_jobs import files, planned, recordings, sounds, undisturbed  # noqa: F401
from tests.small import small_model
from whisper_nnx.jobs.in_process import run
from whisper_nnx.jobs.inputs import read_input
from whisper_nnx.jobs.job import Job, plan
from whisper_nnx.jobs.journal import Journal, Progress
from whisper_nnx.jobs.leases import Leases
from whisper_nnx.jobs.status import status
from whisper_nnx.jobs.supervise import supervise
from whisper_nnx.jobs.worker import DeviceError, work
from whisper_nnx.output.writers import write_whole


@pytest.mark.parametrize("mounted_on", ["an empty folder", "nothing"])
def test_an_input_that_is_not_mounted_stops_the_worker_and_fails_no_recording(
    sounds,  # noqa: F811
    tmp_path,
    undisturbed,  # noqa: F811
    mounted_on,
):
    job = planned(sounds, tmp_path / "job")

    def unmount(shard):
        if shard == 3:
            sounds.rename(tmp_path / "away")
            if mounted_on == "an empty folder":
                sounds.mkdir()

    with pytest.raises(OSError, match=rf"{sounds} is (gone|empty).*; mount it, then give the same command again"):
        work(job, transcribe_all, report=unmount)
    assert status(job).failed == 0
    shutil.rmtree(sounds, ignore_errors=True)
    (tmp_path / "away").rename(sounds)
    work(job, transcribe_all)
    assert files(job) == undisturbed


def test_of_a_list_that_names_files_on_several_disks_one_that_is_away_stops_the_worker(tmp_path):
    disks = [recordings(tmp_path / "disks" / name, ["deep/a.wav", "deep/b.wav"]) for name in ("1", "2")]
    (tmp_path / "list.txt").write_text("".join(f"{disk}/deep/{name}.wav\n" for disk in disks for name in "ab"))
    job = plan(tmp_path / "job", read_input(str(tmp_path / "list.txt")), {"input": str(tmp_path / "list.txt")})
    shutil.rmtree(disks[1] / "deep")
    with pytest.raises(OSError, match=f"{disks[1]} is empty"):
        work(job, transcribe_all)
    assert status(job).failed == 0
    disks[1].rmdir()  # removed for good
    work(job, transcribe_all)
    assert (status(job).done, status(job).failed) == (2, 2)


def test_a_folder_below_the_input_that_was_removed_fails_its_recordings_only(tmp_path):
    sounds = recordings(tmp_path / "sounds", ["a.wav", "b/c.wav"])  # noqa: F811
    job = planned(sounds, tmp_path / "job")
    shutil.rmtree(sounds / "b")
    work(job, transcribe_all)
    assert (status(job).done, status(job).failed) == (1, 1)


@pytest.fixture
def four(tmp_path: Path) -> Path:
    return recordings(tmp_path / "four", [f"{n}.wav" for n in range(4)])


@pytest.mark.parametrize(
    ("message", "after", "counts"),
    [
        ("INTERNAL: the device is lost", 2, (2, 0)),
        ("RESOURCE_EXHAUSTED: out of memory", 0, (0, 0)),  # another process has it
        ("RESOURCE_EXHAUSTED: out of memory", 2, (3, 1)),
    ],
)
def test_a_device_that_fails_stops_the_worker_and_leaves_the_rest_undone(
    four, tmp_path, monkeypatch, message, after, counts
):
    def broken(model, paths, **options):
        for number, path in enumerate(paths):
            yield number, jax.errors.JaxRuntimeError(message) if number == after else transcript(path)

    monkeypatch.setattr("whisper_nnx.jobs.in_process.iter_transcripts", broken)
    stopped = pytest.raises(DeviceError, match=f"the device failed: {message}") if sum(counts) < 4 else nullcontext()
    with stopped:
        run(small_model(), four, tmp_path / "job")
    found = status(Job.open(tmp_path / "job"))
    assert (found.done, found.failed) == counts


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_recording_that_ends_the_device_again_and_again_is_quarantined(four, tmp_path, monkeypatch, batch_size):
    def broken(model, paths, **options):
        for number, path in enumerate(paths):
            if path.endswith("1.wav"):
                raise jax.errors.JaxRuntimeError("INTERNAL: illegal address")
            yield number, transcript(path)

    monkeypatch.setattr("whisper_nnx.jobs.in_process.iter_transcripts", broken)
    options: Any = {"batch_size": batch_size} if batch_size > 1 else {}
    for _ in range(3 if batch_size == 1 else 5):  # together, then alone
        with pytest.raises(DeviceError, match="the device failed: INTERNAL: illegal address"):
            run(small_model(), four, tmp_path / "job", **options)
    found = run(small_model(), four, tmp_path / "job", **options)
    assert (found.done, found.failed) == (3, 1)


class Killed:
    """A worker that has a recording in work, and does not note how it ends: an actor of Ray."""

    cause, waits_for = "killed", ""

    def __init__(self, job: Job, name: str):
        self._journal = Journal(job, 0, name)
        self._journal.begin(job.shard(0)[0].id, alone=True)

    def poll(self) -> int | None:
        raise KeyboardInterrupt

    def terminate(self) -> None:
        with self._journal._path.open("a") as file:
            file.write('{"begun": "half of a li')
        self._journal.close()

    def wait(self) -> int:
        return 0


def test_what_killed_workers_have_in_work_is_not_to_blame_where_the_command_was_interrupted(
    sounds,  # noqa: F811
    tmp_path,
    undisturbed,  # noqa: F811
):
    job = planned(sounds, tmp_path / "job")
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            supervise(job, lambda name, place: Killed(job, name), 1, print)
    assert not Progress.read(job, 0).deaths
    work(job, transcribe_all)
    assert files(job) == undisturbed


def test_workers_without_room_are_reported_once_in_a_while(sounds, tmp_path, monkeypatch):  # noqa: F811
    job, now, lines = planned(sounds, tmp_path / "job"), [0.0], list[str]()

    class Waiting:
        cause = ""

        @property
        def waits_for(self) -> str:
            return "1 GPU" if now[0] < 700 else ""

        def poll(self) -> int | None:
            return 0 if now[0] > 2000 else None

        def terminate(self) -> None: ...

        def wait(self) -> int:
            return 0

    def sleep(seconds: float) -> None:
        now[0] += 1
        lines.extend([] if now[0] not in (20, 22, 700) else [f"{now[0]:g}"])

    monkeypatch.setattr("whisper_nnx.jobs.supervise.time", SimpleNamespace(sleep=sleep, monotonic=lambda: now[0]))
    supervise(job, lambda name, place: Waiting(), 2, lines.append)
    reported = "no room yet for 2 of 2 workers, which need 1 GPU each"
    assert lines == ["20", reported, "22", reported, "700"]


@pytest.mark.parametrize("is_away", [True, False])
def test_a_server_that_is_away_stops_the_worker_and_one_recording_fails_alone(tmp_path, monkeypatch, is_away):
    memory = fsspec.filesystem("memory")
    for number in range(40):
        memory.pipe(f"/server{is_away}/{number:02d}.wav", b"x" * 1000)
    job = plan(tmp_path / "job", read_input(f"memory://server{is_away}"), {}, shard_s=0.01)

    def broken(paths):
        for number, path in enumerate(paths):
            is_broken = "07.wav" in path or (is_away and number > 7)
            yield number, OSError(f"{path} cannot be read: ConnectError") if is_broken else transcript(path)

    def state(path):
        return (-1, None) if is_away or "07.wav" in path else (1000, None)

    def unplug(shard):
        if shard == 6:
            monkeypatch.setattr("whisper_nnx.jobs.worker.file_state", state)

    with (
        pytest.raises(OSError, match=r"07.wav cannot be read: .*; other recordings are not reachable either; restore")
        if is_away
        else nullcontext()
    ):
        work(job, broken, report=unplug)
    assert (status(job).done, status(job).failed) == ((7, 0) if is_away else (39, 1))


def test_a_recording_whose_row_never_fits_on_a_full_disk_is_not_to_blame(tmp_path):
    """Files of 200 bytes at most have room for what is begun, but not for what is finished."""
    resource = pytest.importorskip("resource")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    job = planned(recordings(tmp_path / "sounds", ["long.wav"]), tmp_path / "job")
    for _ in range(4):
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, limit[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                work(job, transcribe_all)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    work(job, transcribe_all)
    assert (status(job).done, status(job).failed) == (1, 0)


def test_the_error_of_writing_is_reported_where_nothing_can_be_removed_either(tmp_path, monkeypatch):
    def away(*paths, **options):
        raise OSError(errno.ESTALE, "Stale file handle", "hidden")

    monkeypatch.setattr(Path, "unlink", away)
    with pytest.raises(OSError, match=r"cannot write .*a\.txt: Stale file handle"):
        write_whole(tmp_path / "a.txt", "a", away)


def test_of_a_job_that_is_done_the_next_command_removes_journals_and_leases(sounds, tmp_path, undisturbed, monkeypatch):  # noqa: F811
    job = planned(sounds, tmp_path / "job")
    with monkeypatch.context() as away:  # a mount, from the moment at which the last results are written
        away.setattr("whisper_nnx.jobs.worker.forget", lambda job, shard: None)
        away.setattr(Leases, "release", lambda self, shard: None)
        work(job, transcribe_all)
    assert list((job.folder / "leases").iterdir())
    assert supervise(job, lambda name, place: pytest.fail("nothing is left to do"), 1, print) == 0
    assert files(job) == undisturbed
