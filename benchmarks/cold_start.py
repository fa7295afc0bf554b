"""Times whole processes, from their start to their end: the command on a recording of 30 s, beside its peers.

    python benchmarks/cold_start.py CHECKPOINT_FOLDER RECORDING [--random tiny] [--repeats 5]

Ours is run with an empty compilation cache once, then with that cache. Each writes all formats of subtitles into a
folder; faster-whisper, which has no command, is a script that prints. All decode greedily, without fallback.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.checkpoints import FIXED, prepare

ROOT = Path(__file__).parents[1]
SCRIPT = """
import json, sys
from faster_whisper import WhisperModel
model = WhisperModel(sys.argv[1], device="cpu", compute_type=sys.argv[3], cpu_threads=int(sys.argv[4]))
segments, _ = model.transcribe(sys.argv[2], language="en", beam_size=1, temperature=0.0, **json.loads(sys.argv[5]))
for segment in segments:
    print(f"{segment.start:05.2f} {segment.end:05.2f} {segment.text}")
"""


def commands(checkpoint: Path, recording: Path, scratch: Path) -> dict[str, list]:
    """Name -> the command."""
    common = ["--language", "en", "--temperature", "0", "--temperature_increment_on_fallback", "None"]
    common += ["--beam_size", "None", "--output_dir", scratch / "out"]
    ours = [sys.executable, "-m", "whisper_nnx.transcribe", recording, "--model", checkpoint / "huggingface", *common]
    ours += ["--compilation_cache", scratch / "cache"]
    # Whose weights never end stop at half the context, 224 tokens; faster-whisper has to be told.
    limit = json.dumps({"max_new_tokens": 444} if (checkpoint / FIXED).exists() else {})
    script = [sys.executable, "-c", SCRIPT, checkpoint / "ctranslate2", recording]
    cores = str(os.cpu_count() or 1)
    return {
        "whisper_nnx": ours,
        "whisper_nnx, bfloat16": [*ours, "--dtype", "bfloat16"],
        "openai-whisper": [
            Path(sys.executable).parent / "whisper",
            *(recording, "--model", checkpoint / "openai.pt", "--fp16", "False", *common),
        ],
        "faster-whisper": [*script, "float32", cores, limit],
        "faster-whisper, int8": [*script, "int8", cores, limit],
    }


def seconds(command: list, programs: Path) -> float:
    """How long it runs; `programs` goes first in its PATH. AssertionError where it prints no text."""
    path = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    environment = os.environ | path | {"PYTHONPATH": str(ROOT)}  # ours need not be installed
    start = time.perf_counter()
    run = subprocess.run(list(map(str, command)), check=True, capture_output=True, env=environment, text=True)
    took = time.perf_counter() - start
    assert "00" in run.stdout, run.stderr
    assert "Skipping" not in run.stdout, run.stderr
    return took


def with_ffmpeg(folder: Path) -> Path:
    """A folder of programs: openai-whisper calls one named ffmpeg."""
    import imageio_ffmpeg

    folder.mkdir()
    (folder / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a Hugging Face checkpoint")
    parser.add_argument("recording", type=Path, help="about 30 s")
    parser.add_argument("--random", metavar="SIZE", help="random weights of this released shape instead")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = prepare(args.folder, Path(scratch), args.random)
        chosen = commands(checkpoint, args.recording.resolve(), Path(scratch))
        programs = with_ffmpeg(Path(scratch) / "programs")
        first, *runs = (
            {name: seconds(command, programs) for name, command in chosen.items()} for _ in range(args.repeats + 1)
        )
    medians = {name: statistics.median(run[name] for run in runs) for name in chosen}
    print("| process | s | first, s | ours / it |", "|---|---|---|---|", sep="\n")
    for name, median in medians.items():
        print(f"| {name} | {median:.2f} | {first[name]:.2f} | {medians['whisper_nnx'] / median:.2f} |")


if __name__ == "__main__":
    main()
