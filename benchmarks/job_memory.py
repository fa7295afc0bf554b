"""Memory of a job's worker over many short recordings.

    python benchmarks/job_memory.py CHECKPOINT FOLDER --recordings 2000

FOLDER has short recordings (.flac), see kill_job.py. Prints the worker's resident memory after each twentieth of them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.kill_job import CHEAP, finished, worker_processes, write_recordings


def resident_mb(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) // 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recordings", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        sounds, job = Path(name) / "sounds", Path(name) / "job"
        seconds = write_recordings(sounds, sorted(args.folder.glob("**/*.flac")), args.recordings, Random(0))
        command = [sys.executable, "-m", "whisper_nnx", "batch", str(sounds), "--output", str(job), *CHEAP]
        command += ["--model", args.checkpoint, "--shard_s", str(round(seconds / 20))]
        process = subprocess.Popen([*command, "--batch_size", str(args.batch_size)])
        due, start = 0, time.monotonic()
        while process.poll() is None:
            time.sleep(0.5)
            if (done := finished(job)) > due and (workers := worker_processes(job)):
                print(f"{time.monotonic() - start:.0f} s: {done} recordings, {resident_mb(workers[0])} MB", flush=True)
                due += args.recordings / 20
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
