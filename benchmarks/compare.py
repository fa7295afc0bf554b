"""Times whisper_nnx and its peers in one run with the same checkpoint, recordings and options.

    python benchmarks/compare.py CHECKPOINT MANIFEST --result benchmarks/results/NAME.timings.json

Every system has a separate process and runs each task once as a warm-up, whose time is reported separately (for long
recordings, the first 90 s). Then the systems take turns; long tasks run twice. All decode greedily at temperature 0
without fallback, in float32 unless named otherwise, with given language and timestamps, without previous text. Also
reported: words written, their errors, and peak memory.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import speech
from benchmarks.checkpoints import FIXED, prepare
from benchmarks.scoring import score, write_result
from benchmarks.systems import SAMPLE_RATE, Work, chosen, formats, is_able
from benchmarks.worker import Worker, save

LONG_S = 5.0  # longer tasks run only twice after the warm-up
WARM_UP_S = 90  # of a long recording


@dataclass(frozen=True)
class Task:
    """A task, with its audio in a file."""

    audio: Path
    warm_up: Path
    seconds: float
    text: str
    work: Work | None


def tasks(manifest: Path, minutes: float, batch_size: int, folder: Path) -> dict[str, Task]:
    """Returns the tasks by name."""
    recordings = speech.read(manifest, {"en"})
    window, whole = speech.one_window(recordings), speech.long(recordings, minutes)
    clips = speech.cut(whole.audio)
    start = whole.audio[: WARM_UP_S * SAMPLE_RATE]
    signals = {"window": [window.audio], "whole": [whole.audio], "clips": clips, "start": [start]}
    files = {name: save(folder / f"{name}.npz", signal) for name, signal in signals.items()}

    def task(audio: str, warm_up: str, work: Work | None) -> Task:
        recording = window if audio == "window" else whole
        return Task(files[audio], files[warm_up], recording.duration_s, recording.text, work)

    batch = f"in batches of {batch_size}"
    return {
        "encoder": task("window", "window", None),
        "one window": task("window", "window", Work()),
        "one window, beam 5": task("window", "window", Work(beam_size=5)),
        "one window, words": task("window", "window", Work(words=True)),
        "sequential": task("whole", "start", Work()),
        f"clips, {batch}": task("clips", "clips", Work(batch_size=batch_size)),
        f"cut by VAD, {batch}": task("whole", "whole", Work(vad=True, batch_size=batch_size)),
    }


def measure(task: Task, workers: list[Worker], repeats: int, fixed: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each system's medians and errors: a warm-up, then runs in turn."""
    first = {worker.name: worker.run(task.warm_up, task.work, warm_up=task.warm_up != task.audio) for worker in workers}
    runs = [{worker.name: worker.run(task.audio, task.work) for worker in workers}]
    long = max(run["s"] for run in runs[0].values()) > LONG_S
    for _ in range(min(repeats, 2) - 1 if long else repeats - 1):
        runs.append({worker.name: worker.run(task.audio, task.work) for worker in workers})
    for worker in workers:
        answers = [run[worker.name] for run in runs]
        found: dict[str, Any] = {
            "s": round(statistics.median(answer["s"] for answer in answers), 4),
            "runs": len(runs),
            "first_s": round(first[worker.name]["s"], 2),
            "mb": round(max(answer["mb"] for answer in answers)),
        }
        if task.work:
            found["tokens"] = answers[0]["tokens"]
            if fixed and found["tokens"] != runs[0][workers[0].name]["tokens"]:
                print(f"{worker.name} decoded {found['tokens']} tokens: not the same work", file=sys.stderr)
                continue
            if not fixed:
                found |= score([" ".join(answers[0]["texts"])], [task.text], [task.work.language])
        yield worker.name, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="in any format")
    parser.add_argument(
        "manifest", type=Path, help="JSON lines with audio, text and language, of which English rows are used"
    )
    parser.add_argument("--result", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--only", default="", metavar="PATTERN", help="tasks that match this regular expression")
    parser.add_argument(
        "--systems", default="", metavar="PATTERN", help="ours, and peers that match this regular expression"
    )
    parser.add_argument("--minutes", type=float, default=5, help="length of the long recording")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="half a minute, once: checks that everything runs")
    parser.add_argument("--formats", type=Path, metavar="FOLDER", help="where to keep the converted checkpoint")
    parser.add_argument("--random", metavar="SIZE", help="random weights of this released shape, 100 tokens a window")
    args = parser.parse_args()
    if args.quick:
        args.minutes, args.batch_size, args.repeats = 0.5, 2, 1
    names = chosen(args.systems)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        checkpoint = prepare(args.checkpoint, args.formats or folder / "formats", args.random, formats(names))
        workers = [stack.enter_context(Worker(name, checkpoint, keep_compiled=args.quick)) for name in names]
        versions = {worker.name: worker.about["version"] for worker in workers}
        load_s = {worker.name: round(worker.about["load_s"], 2) for worker in workers}
        for piece, task in tasks(args.manifest, args.minutes, args.batch_size, folder).items():
            able = [worker for worker in workers if is_able(worker.name, task.work)]
            if re.search(args.only, piece) and able:
                rows = dict(measure(task, able, args.repeats, (checkpoint / FIXED).exists()))
                found[piece] = {"audio_s": round(task.seconds, 1), "systems": rows}
                print(piece, {name: row["s"] for name, row in rows.items()}, file=sys.stderr, flush=True)
                write_result(args.result, args.random or args.checkpoint.name, versions, load_s=load_s, timings=found)


if __name__ == "__main__":
    main()
