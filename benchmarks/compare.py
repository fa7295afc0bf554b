"""Times whisper_nnx beside its peers: the same checkpoint, the same work, in one run.

    python benchmarks/compare.py CHECKPOINT_FOLDER RECORDING [--random tiny] [--only PATTERN] [--repeats 5]

Every system lives in a process of its own and is warmed up by doing each piece of work once (our first run, with
compilation, is reported apart); then they take turns. Reported: medians, the ratio of ours to each peer's, and the most
memory that each process held. All must decode the same number of tokens: a system that does not gets no time. With
--random the weights are random ones of a released shape, with the checkpoint's vocabulary; the end of text and
timestamps are suppressed, so that each window takes exactly 100 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.systems import SYSTEMS, peak_memory_mb, prepare, reset_peak_memory, work

LONG_S = 5.0  # what takes longer is done only twice after the warm-up


def serve(name: str, checkpoint: Path, recording: Path) -> None:
    """The process of one system: reads names of pieces of work, answers with seconds, tokens and megabytes."""
    from whisper_nnx.audio import load_audio

    answers, sys.stdout = sys.stdout, sys.stderr
    start = time.perf_counter()
    system = SYSTEMS[name](checkpoint)
    loaded_s = time.perf_counter() - start
    pieces = work(system, load_audio(recording))
    print(json.dumps({"version": system.version(), "load_s": loaded_s, "work": list(pieces)}), file=answers, flush=True)
    for line in sys.stdin:
        reset_peak_memory()
        start = time.perf_counter()
        tokens = pieces[line.strip()]()
        seconds = time.perf_counter() - start
        print(json.dumps({"s": seconds, "tokens": tokens, "mb": peak_memory_mb()}), file=answers, flush=True)


class Worker:
    """A system in its process, as seen from here."""

    def __init__(self, name: str, checkpoint: Path, recording: Path):
        command = [sys.executable, __file__, str(checkpoint), str(recording), "--serve", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.name, self.about = name, self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} stopped with exit code {self.process.wait()}")
        return json.loads(line)

    def run(self, piece: str) -> dict:
        self.process.stdin.write(piece + "\n")
        self.process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def row(piece: str, workers: list[Worker], repeats: int) -> str:
    """A row of the table: warm-up, then the workers in turn."""
    able = [worker for worker in workers if piece in worker.about["work"]]
    first = {worker.name: worker.run(piece) for worker in able}
    long = max(run["s"] for run in first.values()) > LONG_S
    runs = [{worker.name: worker.run(piece) for worker in able} for _ in range(min(repeats, 2) if long else repeats)]
    ours = workers[0].name
    tokens = first[ours]["tokens"]
    times, ratios, memory = [], [], []
    for name in (worker.name for worker in workers):
        answers = [run[name] for run in runs if name in run]
        counts = {answer["tokens"] for answer in answers}
        median_s = statistics.median(answer["s"] for answer in answers) if answers else None
        refused = None if counts <= {tokens} else f"refused: {'/'.join(map(str, counts))} tokens, not {tokens}"
        times.append(refused or (f"{median_s * 1000:.0f} ms" if median_s else ""))
        memory.append(f"{max(answer['mb'] for answer in answers):.0f}" if answers else "-")
        if name == ours:
            ours_s = median_s
        else:
            ratios.append(f"{ours_s / median_s:.2f}" if median_s and not refused else "")
    cells = [piece, *times, *ratios, f"{first[ours]['s']:.1f} s", " / ".join(memory)]
    return f"| {' | '.join(cells)} |"


def compare(checkpoint: Path, recording: Path, only: str, repeats: int) -> list[str]:
    """The rows of the table."""
    workers = [Worker(name, checkpoint, recording) for name in SYSTEMS]
    names = [worker.name for worker in workers]
    headings = ["work", *names, *(f"ours / {name}" for name in names[1:]), "our first run", "peak memory, MB"]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for piece in workers[0].about["work"]:
        if re.search(only, piece):
            lines.append(row(piece, workers, repeats))
            print(lines[-1], file=sys.stderr, flush=True)
    versions = "; ".join(f"{w.name} {w.about['version']}, loaded in {w.about['load_s']:.1f} s" for w in workers)
    runs = f"median of {repeats} interleaved runs, of at most 2 where one takes over {LONG_S:g} s"
    lines.append(f"\n{versions}; {platform.machine()}, {os.cpu_count()} cores, float32, {runs}.")
    for worker in workers:
        worker.stop()
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a Hugging Face checkpoint")
    parser.add_argument("recording", type=Path, help="repeated or cut to the lengths that are timed")
    parser.add_argument("--random", metavar="SIZE", help="random weights of this released shape instead")
    parser.add_argument("--only", default="", metavar="PATTERN", help="the rows whose name has this regular expression")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.folder, args.recording)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = prepare(args.folder, Path(scratch), args.random)
        print("\n".join(compare(checkpoint, args.recording, args.only, args.repeats)))
    return None


if __name__ == "__main__":
    main()
