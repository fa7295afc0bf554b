"""Kills a job's processes at random moments and compares its results with those of an undisturbed job, byte for byte.

    python benchmarks/kill_job.py CHECKPOINT FOLDER --recordings 200 --result kill_job.json

FOLDER has short recordings (.flac), of which two at a time are joined to as many as asked for. The victims are, in
turn, the command that plans and supervises, one of its workers, and all processes at once. Windows of 2 s and texts
of 8 tokens make a recording cheap: it does not matter what is written. Other options are those of the command.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import wave
from pathlib import Path
from typing import Any

import numpy as np

from whisper_nnx import load_audio
from whisper_nnx.jobs.job import Job
from whisper_nnx.jobs.status import results, status

CHEAP = ["--audio_ctx=100", "--max_new_tokens=8", "--temperature_increment_on_fallback=None", "--beam_size=None"]
_POLL_S = 0.2
_SOURCES = 300


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recordings", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--result", type=Path)
    args, more = parser.parse_known_args()
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds = write_recordings(folder / "sounds", sorted(args.folder.glob("**/*.flac")), args.recordings, chance)
        command = [sys.executable, "-m", "whisper_nnx", "batch", str(folder / "sounds"), "--model", args.checkpoint]
        shards = max(1, min(50, args.recordings // (2 * args.batch_size)))
        command += ["--workers", "2", "--expires_s", "20", "--shard_s", f"{seconds / shards:.3f}", *CHEAP]
        command += ["--output_format", "srt,parquet", *more]
        command += ["--batch_size", str(args.batch_size), "--output"]
        start = time.monotonic()
        subprocess.run([*command, str(folder / "undisturbed")], check=True)
        undisturbed_s, start = time.monotonic() - start, time.monotonic()
        killed = disturb([*command, str(folder / "job")], folder / "job", args.recordings, args.kills, chance)
        found = compare(Job.open(folder / "undisturbed"), Job.open(folder / "job")) | {
            "kills": killed,
            "undisturbed_s": round(undisturbed_s, 1),
            "disturbed_s": round(time.monotonic() - start, 1),
            "batch_size": args.batch_size,
            "seed": args.seed,
        }
    text = json.dumps(found, indent=1)
    print(text)
    if args.result:
        args.result.write_text(text + "\n", encoding="utf-8")
    return int(not found["equal"])


def write_recordings(folder: Path, sources: list[Path], count: int, chance: random.Random) -> float:
    """Writes recordings of two of the sources each -> their duration in s."""
    folder.mkdir()
    sounds = [np.asarray(load_audio(str(path))) for path in chance.sample(sources, min(len(sources), _SOURCES))]
    samples = 0
    for number in range(count):
        sound = np.concatenate(chance.choices(sounds, k=2))
        with wave.open(str(folder / f"{number:05d}.wav"), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes((np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes())
        samples += len(sound)
    return samples / 16000


def disturb(command: list[str], folder: Path, recordings: int, kills: int, chance: random.Random) -> list[str]:
    """Runs the command until the job is done, and kills it on the way -> who was killed.

    The first kill may hit the planning; each other one comes at a random moment after the next share of the recordings.
    """
    killed: list[str] = []
    process = subprocess.Popen(command)
    while True:
        due = len(killed) * recordings / (kills + 1)
        while process.poll() is None and (len(killed) == kills or finished(folder) < due):
            time.sleep(_POLL_S)
        if process.poll() == 0:
            break
        time.sleep(chance.uniform(0, 3))
        if process.poll() is None:
            workers = worker_processes(folder)
            victims = {"planner": [process.pid], "worker": workers[:1], "all": [process.pid, *workers]}
            who = ["planner", "worker", "all"][len(killed) % 3]
            for victim in victims[who]:
                try:
                    os.kill(victim, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            if victims[who]:
                killed.append(who)
                print(f"{who} killed, {finished(folder)} of {recordings} recordings done", flush=True)
        if who != "worker" or process.poll() is not None:
            process.wait()
            process = subprocess.Popen(command)
    while worker_processes(folder):  # of planners that were killed
        time.sleep(_POLL_S)
    return killed


def worker_processes(folder: Path) -> list[int]:
    found = subprocess.run(["pgrep", "-f", f"batch work {folder} "], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def finished(folder: Path) -> int:
    """How many recordings have a row, in results or in journals."""
    rows = 0
    for path in [*folder.glob("results/*.jsonl"), *folder.glob("work/*.jsonl")]:
        try:
            rows += sum(b'"begun"' not in line for line in path.read_bytes().splitlines())
        except FileNotFoundError:  # a shard was done meanwhile
            continue
    return rows


def compare(expected: Job, job: Job) -> dict[str, Any]:
    ids = [row["id"] for row in results(job)]
    files = [written(one) for one in (expected, job)]
    differing = sorted(name for name in {*files[0], *files[1]} if files[0].get(name) != files[1].get(name))
    return {
        "recordings": job.recordings,
        "shards": job.shards,
        "done": len(ids),
        "duplicates": len(ids) - len(set(ids)),
        "failed": status(job).failed,
        "differing_files": differing,
        "equal": not differing and len(set(ids)) == job.recordings,
    }


def written(job: Job) -> dict[str, bytes]:
    """All files of a job but notes of speed and hidden files of killed workers; no lease or journal may be left."""
    paths = {str(path.relative_to(job.folder)): path for path in job.folder.rglob("[!.]*") if path.is_file()}
    return {name: path.read_bytes() for name, path in paths.items() if not name.startswith("speed")}


if __name__ == "__main__":
    sys.exit(main())
