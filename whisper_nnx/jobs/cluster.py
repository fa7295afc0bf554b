"""Workers of a job as actors of a Ray cluster, one for each of its devices."""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any, Unpack, cast

from whisper_nnx.jobs.export import export_settings
from whisper_nnx.jobs.status import Status, status
from whisper_nnx.jobs.supervise import supervise
from whisper_nnx.jobs.worker import EXPIRES_S
from whisper_nnx.runtime.console import one_line, say
from whisper_nnx.runtime.packages import require_packages

if TYPE_CHECKING:
    from whisper_nnx.model.whisper import Whisper
    from whisper_nnx.transcription.changes import TranscribeChanges

_MEMORY = 0.9  # of a GPU, for all the workers that share it
_ANSWERS_S = 10.0  # in which the address of a cluster must accept a connection
_ENDS_S = 5.0  # in which an actor that is killed usually ends


def run_on_cluster(
    load: Callable[[], Whisper],
    input: str | PathLike[str],
    output: str | PathLike[str],
    address: str = "auto",
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    shard_s: float | None = None,
    expires_s: float = EXPIRES_S,
    output_format: str | None = None,
    subtitles: Mapping[str, Any] | None = None,
    **options: Unpack[TranscribeChanges],
) -> Status:
    """Like `jobs.run`, by all devices of a Ray cluster, whose machines have input and output under the same paths.

    Args:
      load: loads the model; called in each actor.
      address: see `connected`.
      workers: how many actors; None: one for each device.
      gpus_per_worker: see `slots`.

    Raises what `jobs.run` raises; ConnectionError, see `connected`; RuntimeError if workers failed.
    """
    from whisper_nnx.jobs.in_process import planned, work_with

    written = export_settings(output_format, subtitles or {}, options)
    with connected(address) as machines:
        count, resources = slots(machines, gpus=gpus_per_worker)
        job = planned(input, output, shard_s, options, written, workers or count)
        work = partial(work_with, load, job, options, expires_s)  # and its name
        supervise(job, lambda name, place: Actor(work, name, resources), workers or count, say)
    if (found := status(job)).shards_done < job.shards:
        raise RuntimeError(f"{output}: {found.shards_done} of {job.shards} shards are done; workers have reported why")
    return found


@contextmanager
def connected(address: str) -> Iterator[list[dict[str, Any]]]:
    """Connects this process, which must run on a machine of the cluster, and yields Ray's list of its machines.

    address: host:port of its head; "auto": that of this machine. Raises ConnectionError if there is no cluster.
    """
    require_packages("a job on a cluster", "cluster", "ray")
    import ray

    host, _, port = address.rpartition(":")
    if port.isdecimal() and "/" not in host:  # Ray itself would try for minutes
        try:
            socket.create_connection((host, int(port)), _ANSWERS_S).close()
        except OSError as error:
            raise ConnectionError(f"no Ray cluster at {address}: {one_line(error)}; check the address") from None
    with ray.init(address=address, logging_level=logging.WARNING, ignore_reinit_error=True):
        yield ray.nodes()


def slots(
    machines: list[dict[str, Any]],
    device: str | None = None,
    threads: int | None = None,
    gpus: float | None = None,
) -> tuple[int, dict[str, Any]]:
    """How many workers fit, and what each takes, as Ray's options of an actor; or ValueError if none fits.

    Args:
      machines: from `connected`.
      device: gpu, tpu or cpu; None: the first of these that there is.
      threads: cores of a worker on the CPU; None: all of the smallest machine.
      gpus: the share of a GPU that a worker has, of its memory, too; None: the whole.
    """
    if gpus is not None and not (0 < gpus <= 1 and device in (None, "gpu", "cuda")):
        raise ValueError(f"gpus_per_worker={gpus:g} must be above 0 and at most 1, and the device a GPU")
    device = "gpu" if gpus is not None else device
    nodes = [machine["Resources"] for machine in machines if machine["Alive"]]
    for kind in ("gpu", "tpu", "cpu") if device is None else (device.replace("cuda", "gpu"),):
        if amounts := [int(amount) for node in nodes if (amount := node.get(kind.upper(), 0)) >= 1]:
            if gpus is not None and gpus < 1:
                share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{_MEMORY * gpus:g}"}
                return sum(amounts) * int(1 / gpus), {"num_gpus": gpus, "runtime_env": {"env_vars": share}}
            each = 1 if kind != "cpu" else threads or min(amounts)
            if count := sum(amount // each for amount in amounts):
                return count, {"resources": {"TPU": 1}} if kind == "tpu" else {f"num_{kind}s": each}
    raise ValueError(f"the cluster has no room for a worker on {device or 'any device'}; add a machine that has")


class _Runner:
    """What an actor is; it lives for one call."""

    def run(self, work: Callable[[Any], int], argument: Any) -> int:
        try:
            return work(argument)
        except SystemExit as usage:  # with which Ray's process would end
            return int(usage.code or 0)


class Actor:
    """A worker as an actor, see `supervise.Worker`; `work` returns its exit status."""

    def __init__(self, work: Callable[[Any], int], argument: Any, resources: dict[str, Any]):
        import ray

        self._ray, self.cause = ray, ""
        amounts = {name[4:-1].upper(): amount for name, amount in resources.items() if name.startswith("num_")}
        amounts |= resources.get("resources", {})
        self._needs = ", ".join(f"{amount:g} {name}" for name, amount in amounts.items())
        self._actor = cast(Any, ray.remote(_Runner).options(**resources).remote())
        self._begun = self._actor.__ray_ready__.remote()
        self._status = self._actor.run.remote(work, argument)

    @property
    def waits_for(self) -> str:
        if self._begun is not None and self._ray.wait([self._begun], timeout=0)[0]:
            self._begun = None
        return "" if self._begun is None else self._needs

    def poll(self) -> int | None:
        if not self._ray.wait([self._status], timeout=0)[0]:
            return None
        try:
            return self._ray.get(self._status)
        except self._ray.exceptions.RayTaskError as error:
            say(f"a worker failed: {one_line(error.cause or error)}")
            return 1
        except self._ray.exceptions.RayError as death:  # of the actor, also where its memory ended it
            self.cause = type(death).__name__
            self.terminate()  # it may live where only the connection broke
            return -signal.SIGKILL

    def terminate(self) -> None:
        self._ray.kill(self._actor)

    def wait(self) -> int:
        """Until it has ended; if its machine is away, what it writes later is right all the same."""
        self._ray.wait([self._status], timeout=_ENDS_S)
        return 0
