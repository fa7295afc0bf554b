"""Times whisper_nnx beside its peers: the same checkpoint, the same work, in one run.

    python benchmarks/compare.py CHECKPOINT_FOLDER RECORDING [--random tiny] [--repeats 5]

Every system lives in a process of its own, is warmed up by doing each piece of work once (compilation and first run are
reported apart), and then they take turns. Reported: medians, and the ratio of ours to the peer's. That all decode the
same number of tokens is checked. With --random the weights are random ones of a released shape, with the checkpoint's
vocabulary, and the end of text is suppressed, so that each window takes exactly 100 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.systems import SYSTEMS, work


def serve(name: str, folder: Path, recording: Path, fixed: dict) -> None:
    """The process of one system: reads names of pieces of work, answers with seconds and tokens."""
    from whisper_nnx.audio import load_audio

    answers, sys.stdout = sys.stdout, sys.stderr
    start = time.perf_counter()
    system = SYSTEMS[name](folder)
    loaded_s = time.perf_counter() - start
    pieces = work(system, load_audio(recording), fixed)
    print(json.dumps({"version": system.version(), "load_s": loaded_s, "work": list(pieces)}), file=answers, flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        tokens = pieces[line.strip()]()
        print(json.dumps({"s": time.perf_counter() - start, "tokens": tokens}), file=answers, flush=True)


class Worker:
    """A system in its process, as seen from here."""

    def __init__(self, name: str, folder: Path, recording: Path, fixed: dict):
        command = [sys.executable, __file__, str(folder), str(recording), "--serve", name, "--fixed", json.dumps(fixed)]
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


def random_checkpoint(shape: str, vocabulary: Path, folder: Path) -> Path:
    """A checkpoint with random weights of a released shape and the vocabulary of another folder."""
    from dataclasses import replace

    from whisper_nnx import RELEASED, Tokenizer, create_whisper, save_pretrained

    model = create_whisper(replace(RELEASED[shape], vocab_size=51865, num_mel_bins=80))
    model.tokenizer = Tokenizer.from_folder(vocabulary)
    save_pretrained(model, folder)
    return folder


def compare(folder: Path, recording: Path, fixed: dict, repeats: int) -> list[str]:
    """The rows of the table."""
    workers = [Worker(name, folder, recording, fixed) for name in SYSTEMS]
    pieces = workers[0].about["work"]
    lines = [
        "| work | " + " | ".join(w.name for w in workers) + " | ratio | first run here |",
        "|---" * (len(workers) + 3) + "|",
    ]
    for piece in pieces:
        first = {w.name: w.run(piece) for w in workers}
        runs = [{w.name: w.run(piece) for w in workers} for _ in range(repeats)]
        if len(tokens := {r[w.name]["tokens"] for r in runs for w in workers}) > 1:
            print(f"{piece}: the systems decoded {tokens} tokens: the times are of different work", file=sys.stderr)
        median = {w.name: statistics.median(r[w.name]["s"] for r in runs) for w in workers}
        ours, peer = (median[w.name] for w in workers)
        cells = " | ".join(f"{median[w.name] * 1000:.0f} ms" for w in workers)
        lines.append(f"| {piece} | {cells} | {ours / peer:.2f} | {first[workers[0].name]['s']:.1f} s |")
        print(lines[-1], file=sys.stderr, flush=True)
    versions = "; ".join(f"{w.name} {w.about['version']}, loaded in {w.about['load_s']:.1f} s" for w in workers)
    lines.append(f"\n{versions}; {platform.machine()}, {os.cpu_count()} cores, median of {repeats} interleaved runs.")
    for worker in workers:
        worker.process.stdin.close()
        worker.process.wait()
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a Hugging Face checkpoint")
    parser.add_argument("recording", type=Path)
    parser.add_argument("--random", metavar="SIZE", help="random weights of this released shape instead")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--fixed", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.folder, args.recording, args.fixed)

    from whisper_nnx import Tokenizer

    eot = Tokenizer.from_folder(args.folder).special.eot
    fixed = {"sample_len": 100, "suppress_tokens": f"-1,{eot}"} if args.random else {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = random_checkpoint(args.random, args.folder, Path(scratch) / "model") if args.random else args.folder
        print("\n".join(compare(folder, args.recording, fixed, args.repeats)))
    return None


if __name__ == "__main__":
    main()
