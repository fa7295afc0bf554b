"""Times whisper_nnx beside its peers: the same checkpoint, the same work, in one run.

    python benchmarks/compare.py CHECKPOINT_FOLDER RECORDING [--random tiny] [--only PATTERN] [--systems PATTERN]

Every system lives in a process of its own (with --environments, in a virtual environment of its own) and is warmed up
by doing each piece of work once; the time of that is reported apart. Then they take turns. Reported: medians, the
ratio of ours to each peer's, and the most memory that each process held. All must decode the same number of tokens: a
system that does not gets no time.
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
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.checkpoints import FIXED, prepare
from benchmarks.environments import python_of
from benchmarks.memory import peak_memory_mb, reset_peak_memory
from benchmarks.systems import CORES, FORMATS, SYSTEMS, work

LONG_S = 5.0  # what takes longer is done only twice after the warm-up


def serve(name: str, checkpoint: Path, hour_batch: int) -> None:
    """The process of one system: reads names of pieces of work, answers with seconds, tokens and megabytes."""
    answers, sys.stdout = sys.stdout, sys.stderr
    fixed = checkpoint / FIXED
    start = time.perf_counter()
    system = SYSTEMS[name](checkpoint, int(fixed.read_text()) if fixed.exists() else None)
    loaded_s = time.perf_counter() - start
    pieces = work(system, np.load(checkpoint / "recording.npy"), hour_batch)
    print(json.dumps({"version": system.version(), "load_s": loaded_s, "work": list(pieces)}), file=answers, flush=True)
    for line in sys.stdin:
        reset_peak_memory()
        start = time.perf_counter()
        tokens = pieces[line.strip()]()
        seconds = time.perf_counter() - start
        print(json.dumps({"s": seconds, "tokens": tokens, "mb": peak_memory_mb()}), file=answers, flush=True)


class Worker:
    """A system in its process, as seen from here."""

    def __init__(self, name: str, python: Path, checkpoint: Path, hour_batch: int):
        command = [python, __file__, checkpoint, "-", "--serve", name, "--hour", str(hour_batch)]
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # a GPU is for all of them
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
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


def measure(piece: str, workers: list[Worker], repeats: int) -> dict[str, dict]:
    """System -> median seconds, those of the first run, megabytes, or why it is refused: warm-up, then in turn."""
    able = [worker for worker in workers if piece in worker.about["work"]]
    first = {worker.name: worker.run(piece) for worker in able}
    long = max(run["s"] for run in first.values()) > LONG_S
    runs = [{worker.name: worker.run(piece) for worker in able} for _ in range(min(repeats, 2) if long else repeats)]
    tokens, found = first[able[0].name]["tokens"], {}
    for name in first:
        answers = [run[name] for run in runs]
        counts = {answer["tokens"] for answer in answers}
        found[name] = {
            "s": statistics.median(answer["s"] for answer in answers),
            "first_s": first[name]["s"],
            "mb": max(answer["mb"] for answer in answers),
            "refused": None if counts <= {tokens} else f"refused: {'/'.join(map(str, counts))} tokens, not {tokens}",
        }
    return found


def tables(found: dict[str, dict[str, dict]], systems: list[str]) -> list[str]:
    """Markdown: a row for each piece of work, a column for each system."""

    def table(title: str, columns: list[str], cell: Callable[[dict, str], str]) -> list[str]:
        rows = [[title, *columns], ["---"] * (len(columns) + 1)]
        rows += [[piece, *(cell(of, name) if name in of else "" for name in columns)] for piece, of in found.items()]
        return ["", *(f"| {' | '.join(row)} |" for row in rows)]

    def ratios(ours: str) -> list[str]:
        def cell(of: dict, name: str) -> str:
            return "" if ours not in of or of[name]["refused"] else f"{of[ours]['s'] / of[name]['s']:.2f}"

        return table(f"{ours} / peer", [name for name in systems if name != ours], cell)

    lines = table("ms", systems, lambda of, name: of[name]["refused"] or f"{of[name]['s'] * 1000:.0f}")
    for ours in (name for name in systems if name.startswith("whisper_nnx")):
        lines += ratios(ours)
    lines += table("first run, s", systems, lambda of, name: f"{of[name]['first_s']:.1f}")
    return lines + table("peak memory, MB", systems, lambda of, name: f"{of[name]['mb']:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a Hugging Face checkpoint")
    parser.add_argument("recording", type=Path, help="repeated or cut to the lengths that are timed")
    parser.add_argument("--random", metavar="SIZE", help="random weights of this released shape instead")
    parser.add_argument("--only", default="", metavar="PATTERN", help="the rows whose name has this regular expression")
    # By default without the one that torch compiles for minutes.
    parser.add_argument("--systems", default="(?<!static)$", metavar="PATTERN", help="ours, and the peers with it")
    parser.add_argument("--environments", type=Path, metavar="FOLDER", help="makes and uses a virtual environment each")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--hour", type=int, default=0, metavar="N", help="an hour in batches of N as well")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.folder, args.hour)
    names = [name for name in SYSTEMS if name.startswith("whisper_nnx") or re.search(args.systems, name)]
    with tempfile.TemporaryDirectory() as scratch:
        from whisper_nnx.audio import load_audio

        formats = {FORMATS[name.split(",")[0]] for name in names}
        checkpoint = prepare(args.folder, Path(scratch), args.random, formats)
        np.save(checkpoint / "recording.npy", load_audio(args.recording))
        workers = [Worker(name, python_of(name, args.environments), checkpoint, args.hour) for name in names]
        found = {}
        for piece in workers[0].about["work"]:
            if re.search(args.only, piece):
                found[piece] = measure(piece, workers, args.repeats)
                told = {name: of["refused"] or round(of["s"], 3) for name, of in found[piece].items()}
                print(piece, told, file=sys.stderr, flush=True)
        for worker in workers:
            worker.stop()
    print("\n".join(tables(found, names)))
    versions = "; ".join(f"{w.name} {w.about['version']}, loaded in {w.about['load_s']:.1f} s" for w in workers)
    runs = f"medians of {args.repeats} interleaved runs, of at most 2 where one takes over {LONG_S:g} s"
    print(f"\n{versions}; {platform.machine()}, {CORES} cores, {runs}.")
    return None


if __name__ == "__main__":
    main()
