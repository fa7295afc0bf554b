"""Jobs on a Ray cluster: of two nodes on this machine."""

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.audio.test_loading import as_int16, write_wav
from tests.jobs.echo import echo_and_tell, tell_gpu, transcribe_all
from tests.jobs.test_jobs import failures, files, planned, recordings, sounds, undisturbed  # noqa: F401
from tests.small import quick_environment, small_model
from weight_loader import load_model, save_pretrained
from whisper_nnx.jobs.cluster import Actor, connected, run_on_cluster, slots
from whisper_nnx.jobs.in_process import run
from whisper_nnx.jobs.job import Job
from whisper_nnx.jobs.status import results, status
from whisper_nnx.jobs.supervise import supervise
from whisper_nnx.jobs.worker import work

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def cluster():
    """A machine of one core, by what Ray knows of it."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # else an actor waits for whatever else runs
        patch.setenv("PYTHONPATH", os.getcwd())
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        yield nodes
        nodes.shutdown()


def run_actors(job: Job, address: str, pids: Path, poison: str = "") -> tuple[int, list[str]]:
    pids.mkdir()
    lines: list[str] = []
    with connected(address) as machines:
        count, resources = slots(machines)
        assert resources == {"num_cpus": 1}
        work = partial(echo_and_tell, str(job.folder), poison, str(pids))
        return supervise(job, lambda name, place: Actor(work, name, resources), count, lines.append), lines


def wait_for(what):
    end = time.monotonic() + 120
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def machine(**resources):
    return {"Alive": True, "Resources": {"memory": 1e10, **resources}}


@pytest.mark.parametrize(
    ("device", "threads", "expected"),
    [
        (None, None, (6, {"num_gpus": 1})),
        ("gpu", 2, (6, {"num_gpus": 1})),
        ("cuda", None, (6, {"num_gpus": 1})),
        ("cpu", None, (4, {"num_cpus": 8})),
        ("cpu", 3, (10, {"num_cpus": 3})),
    ],
)
def test_a_worker_for_each_device_of_all_machines(device, threads, expected):
    lost = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}
    assert slots([machine(CPU=8.0, GPU=4.0), machine(CPU=24.0, GPU=2.0), machine(), lost], device, threads) == expected


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        (1, (6, {"num_gpus": 1})),
        (0.5, (12, {"num_gpus": 0.5, "runtime_env": {"env_vars": {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.45"}}})),
        (0.3, (18, {"num_gpus": 0.3, "runtime_env": {"env_vars": {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.27"}}})),
    ],
)
def test_workers_share_gpus_where_they_are_asked_to(gpus, expected):
    assert slots([machine(CPU=8.0, GPU=4.0), machine(CPU=24.0, GPU=2.0), machine(CPU=8.0)], gpus=gpus) == expected
    for wrong in ({"gpus": 2}, {"gpus": 0}, {"gpus": 0.5, "device": "cpu"}):
        with pytest.raises(ValueError, match="must be above 0 and at most 1, and the device a GPU"):
            slots([machine(CPU=8.0, GPU=4.0)], **wrong)
    with pytest.raises(ValueError, match="no room for a worker on gpu"):
        slots([machine(CPU=8.0)], gpus=gpus)


def test_a_worker_for_each_tpu_and_none_where_there_is_no_such_device():
    assert slots([machine(CPU=8.0, TPU=4.0), machine(CPU=8.0, TPU=4.0)]) == (8, {"resources": {"TPU": 1}})
    with pytest.raises(ValueError, match="the cluster has no room for a worker on gpu"):
        slots([machine(CPU=8.0)], "gpu")
    with pytest.raises(ValueError, match="no room for a worker on cpu"):
        slots([machine(CPU=8.0)], "cpu", 9)


@pytest.mark.parametrize(
    ("address", "message"),
    [("auto", "Could not find any running Ray instance"), ("127.0.0.1:1", "no Ray cluster at 127.0.0.1:1: Connection")],
)
def test_without_a_cluster_there_is_one_message(address, message):
    with pytest.raises(ConnectionError, match=message), connected(address):
        pass


@pytest.mark.slow  # here; see below
def test_an_actor_that_is_killed_is_replaced(cluster, tmp_path):
    sounds = recordings(tmp_path / "sounds", [f"{n:03d}.wav" for n in range(10)])  # noqa: F811
    undisturbed, job = planned(sounds, tmp_path / "undisturbed"), planned(sounds, tmp_path / "job")  # noqa: F811
    work(undisturbed, transcribe_all)

    def kill():
        wait_for(lambda: list((job.folder / "work").iterdir()))
        [name] = (tmp_path / "pids").iterdir()
        os.kill(int(name.read_text()), signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    assert run_actors(job, cluster.address, tmp_path / "pids") == (
        0,
        ["a worker died (ActorDiedError); another one continues"],
    )
    thread.join()
    assert files(job) == files(undisturbed)


@pytest.mark.slow  # here; see below
def test_each_actor_sees_its_gpu(cluster, tmp_path):
    """Two GPUs of which only Ray knows."""
    node = cluster.add_node(num_cpus=4, num_gpus=2)  # each actor takes a core, too
    with connected(cluster.address) as machines:
        for gpus, expected in ((None, ["0 None", "1 None"]), (0.5, ["0 0.45", "0 0.45", "1 0.45", "1 0.45"])):
            count, resources = slots(machines, gpus=gpus)
            (folder := tmp_path / str(gpus)).mkdir()
            actors = [Actor(partial(tell_gpu, str(folder), count), str(n), resources) for n in range(count)]
            wait_for(lambda actors=actors: all(actor.poll() == 0 for actor in actors))
            for actor in actors:
                actor.terminate()
            assert sorted(path.read_text() for path in folder.iterdir()) == expected
    cluster.remove_node(node)


def test_actors_in_a_process_that_has_not_used_jax():
    """Ray forks, which JAX warns of once it has threads."""
    names = ("test_an_actor_that_is_killed_is_replaced", "test_each_actor_sees_its_gpu")
    tests = [f"{__file__}::{name}" for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.startswith(".. ")  # both passed


@pytest.mark.slow
def test_a_lost_node_changes_no_byte(cluster, sounds, tmp_path, undisturbed):  # noqa: F811
    job, node = planned(sounds, tmp_path / "job"), cluster.add_node(num_cpus=1)

    def kill():
        wait_for(lambda: len({path.name[7:] for path in (job.folder / "work").iterdir()}) == 2)
        cluster.remove_node(node, allow_graceful=False)

    thread = threading.Thread(target=kill)
    thread.start()
    ended, lines = run_actors(job, cluster.address, tmp_path / "pids")
    thread.join()
    assert ended == 0
    assert [line.partition(" (")[0] for line in lines] == ["a worker died"]
    assert files(job) == undisturbed


@pytest.mark.slow
def test_a_recording_that_ends_three_actors_is_quarantined(cluster, tmp_path):
    job = planned(recordings(tmp_path / "sounds", ["0.wav", "1.wav", "2.wav"]), tmp_path / "job")
    ended, lines = run_actors(job, cluster.address, tmp_path / "pids", poison="1.wav")
    assert (ended, len(lines)) == (0, 3)
    assert status(job).done == 2
    [failed] = failures(job)
    assert failed["reason"].endswith("1.wav: 3 or more workers ended while they transcribed it")


@pytest.mark.slow
def test_the_command_and_the_function_do_on_a_cluster_what_they_do_without(cluster, tmp_path):
    save_pretrained(small_model(), tmp_path / "model")
    (tmp_path / "sounds").mkdir()
    for n in range(3):
        write_wav(tmp_path / "sounds" / f"{n}.wav", as_int16(np.random.default_rng(n).normal(size=8000) / 10))
    options: Any = {"temperature": 0, "output_format": "srt"}
    run(load_model(tmp_path / "model"), tmp_path / "sounds", tmp_path / "expected", **options)
    found = run_on_cluster(
        partial(load_model, tmp_path / "model"), tmp_path / "sounds", tmp_path / "job", cluster.address, **options
    )
    assert found.done == 3
    expected = (tmp_path / "expected" / "results" / "000000.jsonl").read_bytes()
    assert (tmp_path / "job" / "results" / "000000.jsonl").read_bytes() == expected
    command = [sys.executable, "-m", "whisper_nnx", "batch", str(tmp_path / "sounds"), "--ray", cluster.address]
    command += ["--output", str(tmp_path / "command"), "--model", str(tmp_path / "model")]
    command += ["--temperature_increment_on_fallback", "None", "--beam_size", "None", "--output_format", "srt"]
    ended = subprocess.run(command, env=quick_environment(), capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    rows, expected_rows = (list(results(Job.open(tmp_path / name))) for name in ("command", "expected"))
    assert [row | {"options": {}} for row in rows] == [
        row | {"options": {}} for row in expected_rows
    ]  # spelled otherwise
    exports = [sorted((tmp_path / name / "export").rglob("*.srt")) for name in ("expected", "job", "command")]
    assert len(exports[0]) == 3
    assert len({tuple((path.name, path.read_bytes()) for path in paths) for paths in exports}) == 1


def test_an_actor_that_its_memory_ended_is_a_dead_worker(monkeypatch):
    import ray

    def get(_):
        raise ray.exceptions.OutOfMemoryError("ended")

    monkeypatch.setattr(ray, "wait", lambda *_, **__: ([0], []))
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "kill", lambda _: None)
    actor = object.__new__(Actor)
    actor._ray, actor._status, actor._actor, actor.cause = ray, None, None, ""
    assert (actor.poll(), actor.cause) == (-signal.SIGKILL, "OutOfMemoryError")
