"""Throughput of a job with one and two workers, beside the command that transcribes the same list in one process.

    python benchmarks/jobs.py CHECKPOINT SPEECH --recordings 60 --batch_size 8 --result base.jobs.json

SPEECH is JSON lines with `audio`; the recordings are repeated until there are as many as asked for. Each system runs in
turn on one recording and on all of them: start, compilation and loading, which both have, are subtracted. Workers share
the cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.scoring import write_result
from whisper_nnx import __version__
from whisper_nnx.audio.loading import load_audio

SHARD_S = "480"  # several shards for two workers, of several recordings for each row of a batch
COMMAND = [sys.executable, "-m", "whisper_nnx"]
SYSTEMS = {"transcribe": 0, "job, 1 worker": 1, "job, 2 workers": 2}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("speech", type=Path)
    parser.add_argument("--recordings", type=int, default=60)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="each system runs so often; the medians count")
    parser.add_argument("--result", type=Path)
    args = parser.parse_args(argv)
    options = ["--model", args.checkpoint, "--batch_size", str(args.batch_size), "--beam_size", "None"]
    rows = map(json.loads, args.speech.read_text(encoding="utf-8").splitlines())
    spoken = [str(args.speech.parent / row["audio"]) for row in rows]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        links = [
            folder / f"{n:05d}{Path(path).suffix}" for n, path in zip(range(args.recordings), itertools.cycle(spoken))
        ]
        for link, path in zip(links, itertools.cycle(spoken), strict=False):
            link.symlink_to(Path(path).resolve())
        audio_s = sum(len(load_audio(str(link))) / 16000 for link in links[1:])
        runs: dict[str, list[float]] = {system: [] for system in SYSTEMS}
        for number, (system, workers) in itertools.product(range(args.rounds), SYSTEMS.items()):
            few, all_ = (
                run(links[:count], folder / f"{number}.{workers}.{count}", workers, options) for count in (1, None)
            )
            runs[system].append(all_ - few)
            print(f"{system}: {audio_s / runs[system][-1]:.2f} s of audio a second", flush=True)
    speeds = {system: round(audio_s / statistics.median(found), 3) for system, found in runs.items()}
    print(json.dumps(speeds | {"of transcribe": round(speeds["job, 1 worker"] / speeds["transcribe"], 3)}, indent=1))
    if args.result:
        about = {"audio_s": round(audio_s, 1), "batch_size": args.batch_size, "rounds": args.rounds}
        write_result(
            args.result, Path(args.checkpoint).name, {"whisper_nnx": __version__}, jobs=about | {"speeds": speeds}
        )
    return 0


def run(links: list[Path], output: Path, workers: int, options: list[str]) -> float:
    """Transcribes recordings, by a job or by `transcribe` (no workers) -> s."""
    if workers:
        rows = (json.dumps({"id": link.name, "audio": str(link)}) for link in links)
        (listed := output.with_suffix(".jsonl")).write_text("".join(f"{row}\n" for row in rows))
        command = [
            *COMMAND,
            "batch",
            str(listed),
            "--output",
            str(output),
            "--workers",
            str(workers),
            "--shard_s",
            SHARD_S,
        ]
    else:
        command = [
            *COMMAND,
            *map(str, links),
            "--output_dir",
            str(output),
            "--output_format",
            "json",
            "--verbose",
            "None",
        ]
    start = time.monotonic()
    subprocess.run([*command, *options], check=True)
    return time.monotonic() - start


if __name__ == "__main__":
    sys.exit(main())
