"""All that is asked of a GPU, by one command that ends in time with what it has.

    python benchmarks/gpu.py VOCABULARY MANIFEST [--real CHECKPOINT ...]          # the defaults take a GPU ten minutes
    python benchmarks/gpu.py VOCABULARY MANIFEST --size tiny --minutes 1 --limit_s 200        # tries it on a CPU

Sizes have random weights, since only shapes decide their speed; they never end a text by themselves, so that every
system decodes --tokens a window (by default, as many as real windows have). They take the vocabulary of VOCABULARY, a
multilingual Hugging Face folder. --real: checkpoints in any format, whose words are counted beside the seconds.

Systems run one after the other, ours first, each in a process of its own. A figure is written as soon as it is known,
to RESULTS/gpu.SIZE.timings.json. Those that are missing, fail or take too long are written with the reason. What does
not fit into the device's memory is tried again with half the batch, which is written too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import speech
from benchmarks.checkpoints import prepare
from benchmarks.scoring import machine, score, write_result
from benchmarks.systems import SAMPLE_RATE, Work, formats, is_able
from benchmarks.worker import Stopped, Worker, save

RESULTS = Path(__file__).parent / "results"
TOKENS = RESULTS / "base.tokens.json"  # of real windows
OURS = ("whisper_nnx, bfloat16", "whisper_nnx, bfloat16, int8 audio keys and values")
PEERS = ("transformers, bfloat16", "faster-whisper, batched, half", "faster-whisper, half")
GOALS_S = {"large-v3": 2.3, "large-v3-turbo": 3600 / 4900}  # for an hour
REAL_MINUTES = 5.0
_NO_MEMORY = ("out of memory", "RESOURCE_EXHAUSTED", "OutOfMemory", "CUDA_ERROR_OUT_OF_MEMORY", "MemoryError")
_LEAST_S = 5.0  # that are worth the start of a process
_LONG_S = 20.0  # a longer task is measured once


class Task(NamedTuple):
    """Recordings in a file, what is done with them, how long they are and what is spoken. work: None encodes only."""

    audio: Path
    work: Work | None
    seconds: float
    text: str


@dataclass
class Run:
    """The time that is left, and what was found so far about one checkpoint."""

    name: str
    result: Path
    deadline: float
    repeats: int
    is_random: bool
    versions: dict[str, str] = field(default_factory=dict)
    load_s: dict[str, float] = field(default_factory=dict)
    timings: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, dict[str, str]] = field(default_factory=dict)

    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def write(self) -> None:
        found = {"load_s": self.load_s, "timings": self.timings, "failed": self.failed, "accelerator": accelerator()}
        write_result(self.result, self.name, self.versions, **found)

    def fail(self, piece: str, system: str, reason: str) -> None:
        self.failed.setdefault(piece, {})[system] = reason
        print(f"{self.name}, {piece}, {system}: {reason}", file=sys.stderr, flush=True)
        self.write()

    def add(self, piece: str, task: Task, system: str, row: dict[str, Any]) -> None:
        known = self.timings.setdefault(piece, {"audio_s": round(task.seconds, 1), "systems": {}})
        known["systems"][system] = row
        speed = (
            f"{row['s']:.3f} s, {task.seconds / row['s']:.0f} times real time; the first time {row['first_s']:.1f} s"
        )
        print(f"{self.name}, {piece}, {system}: {speed}", file=sys.stderr, flush=True)
        self.write()


def accelerator() -> str:
    """What nvidia-smi calls the GPU; the processor where there is none."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    if not shutil.which(command[0]):
        return machine()
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or machine()


def recordings(manifest: Path, minutes: float, batch_size: int, folder: Path, is_random: bool) -> dict[str, Task]:
    """The tasks: an hour (or other) in clips, one window, and with random weights the encoder alone."""
    english = speech.read(manifest, {"en"})
    window, whole = speech.one_window(english), speech.long(english, minutes)
    audio = whole.audio[: round(minutes * 60 * SAMPLE_RATE)] if is_random else whole.audio
    clips = speech.cut(audio, search_s=2.0)
    kind = "random" if is_random else "real"
    one = save(folder / f"{kind}.window.npz", [window.audio])
    many = save(folder / f"{kind}.clips.npz", clips)
    found = {
        f"clips, in batches of {batch_size}": Task(
            many, Work(batch_size=batch_size), len(audio) / SAMPLE_RATE, whole.text
        ),
        "one window": Task(one, Work(), window.duration_s, window.text),
    }
    if is_random:
        found["encoder"] = Task(one, None, window.duration_s, "")
    return found


def measure(worker: Any, task: Task, run: Run) -> Iterator[dict[str, Any]]:
    """Runs a task; yields its row after each run but the first. Halves the batch where memory does not suffice."""
    while True:
        try:
            first = worker.run(task.audio, task.work, limit_s=run.left_s())
            break
        except Stopped as stopped:
            batch_size = task.work.batch_size if task.work else 1
            if batch_size == 1 or not any(sign in str(stopped) for sign in _NO_MEMORY):
                raise
            assert task.work is not None
            task = task._replace(work=replace(task.work, batch_size=batch_size // 2))
    times: list[float] = []
    for _ in range(run.repeats):
        if times and (times[-1] > _LONG_S or run.left_s() < 1.5 * times[-1]):
            return
        answer = worker.run(task.audio, task.work, limit_s=run.left_s())
        times.append(answer["s"])
        row = {"s": round(statistics.median(times), 4), "runs": len(times), "first_s": round(first["s"], 2)}
        row |= {"mb": round(answer["mb"]), "tokens": answer["tokens"]}
        row |= {name: answer[name] for name in ("device_mb", "warnings") if name in answer}
        if task.work and task.work.batch_size > 1:
            row["batch_size"] = task.work.batch_size
        if task.work and not run.is_random:
            text = " ".join(answer["texts"])
            row |= score([text], [task.text], [task.work.language]) | {"text": text}
        yield row


def measure_system(system: str, checkpoint: Path, tasks: dict[str, Task], run: Run, share: float) -> None:
    """All tasks that a system is able to do, in at most that share of the time that is left."""
    able = {piece: task for piece, task in tasks.items() if is_able(system, task.work)}
    whole, run.deadline = run.deadline, time.monotonic() + share * run.left_s()
    piece = next(iter(able), "")
    try:
        if able and run.left_s() < _LEAST_S:
            raise Stopped("no time was left")
        with Worker(system, checkpoint, limit_s=run.left_s()) as worker:
            run.versions[system] = worker.about["version"]
            run.load_s[system] = round(worker.about["load_s"], 2)
            for piece, task in able.items():
                try:
                    for row in measure(worker, task, run):
                        run.add(piece, task, system, row)
                except Stopped as stopped:
                    run.fail(piece, system, str(stopped))
                    if worker.process.poll() is not None:
                        return
    except Stopped as stopped:
        run.fail(piece, system, str(stopped))
    except Exception as error:  # a package for scoring may be missing, or the disk full: the others go on
        run.fail(piece, system, f"{type(error).__name__}: {error}")
    finally:
        run.deadline = whole


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError after so many seconds, in the main thread."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"was stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def summary(runs: list[Run]) -> Iterator[str]:
    """What is known about the goals."""
    known = [(run, piece, found) for run in runs for piece, found in run.timings.items()]
    for run, piece, found in known:
        rows, goal = found["systems"], GOALS_S.get(run.name)
        ours = rows.get(OURS[0])
        for name, row in rows.items():
            about = f"{run.name}, {piece}, {name}"
            if name in OURS and goal and piece.startswith("clips"):
                at_most = goal * found["audio_s"] / 3600
                verdict = "reached" if row["s"] <= at_most else "missed"
                yield f"{about}: {row['s']:.2f} s; the goal of {at_most:.2f} s is {verdict}"
            if ours and name not in OURS:
                yield f"{about}: {row['s'] / ours['s']:.1f} times as long as {OURS[0]}"
            if ours and run.is_random and row["tokens"] != ours["tokens"]:
                yield f"{about}: {row['tokens']} tokens, not {ours['tokens']}: not the same work"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vocabulary", type=Path, metavar="VOCABULARY")
    parser.add_argument("manifest", type=Path, metavar="MANIFEST")
    parser.add_argument("--size", nargs="*", default=["large-v3", "large-v3-turbo"])
    parser.add_argument("--real", nargs="*", type=Path, default=[], metavar="CHECKPOINT")
    parser.add_argument("--minutes", type=float, default=60, help="of audio, default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--tokens", type=int, help="per window; default: the mean of real windows")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit_s", type=float, default=560, help="default: %(default)s")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    import jax

    jax.config.update("jax_platforms", "cpu")  # in this process, which only prepares: the systems take the GPU
    deadline = time.monotonic() + args.limit_s
    tokens = args.tokens or round(statistics.mean(json.loads(TOKENS.read_text())["tokens"]))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        runs, tasks = [], {}
        for is_random, minutes in ((True, args.minutes), (False, min(args.minutes, REAL_MINUTES))):
            tasks[is_random] = recordings(args.manifest, minutes, args.batch_size, folder, is_random)
        for name in [*args.size, *args.real]:
            result = args.results / f"gpu.{Path(name).name}.timings.json"
            runs.append((Run(Path(name).name, result, deadline, args.repeats, name in args.size), name))
        jobs = [(run, name, system) for system in (*OURS, *args.peers) for run, name in runs]
        for i, (run, name, system) in enumerate(jobs):
            shape, source = (name, args.vocabulary) if run.is_random else (None, name)
            try:
                with limited(run.left_s()):
                    checkpoint = prepare(source, folder / run.name, shape, formats([system]), tokens)
            except Exception as error:  # a peer's converter may be missing, or the disk full: others go on
                run.fail("load", system, f"{type(error).__name__}: {error}")
                continue
            measure_system(system, checkpoint, tasks[run.is_random], run, 1 if i == len(jobs) - 1 else 0.5)
    print("\n".join(summary([run for run, _ in runs])), flush=True)


if __name__ == "__main__":
    main()
