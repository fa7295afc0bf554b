"""Times whole processes on a recording: from start to the first line of text, and to the end.

    python benchmarks/cold_start.py CHECKPOINT RECORDING --result benchmarks/results/NAME.cold_start.json

Ours and openai-whisper's are the commands, which print lines immediately and write all subtitle formats; the others are
scripts that print. All decode greedily, without fallback. Ours is run with an empty compilation cache first, then with
that cache.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.checkpoints import prepare
from benchmarks.scoring import write_result
from benchmarks.systems import CORES

ROOT = Path(__file__).parents[1]
FASTER_WHISPER = """
import sys
from faster_whisper import WhisperModel
model = WhisperModel(sys.argv[1], device="cpu", compute_type=sys.argv[3], cpu_threads=int(sys.argv[4]))
options = {"beam_size": 1, "temperature": 0.0, "condition_on_previous_text": False}
for segment in model.transcribe(sys.argv[2], language="en", **options)[0]:
    print(f"[{segment.start:05.2f} --> {segment.end:05.2f}] {segment.text}")
"""
WHISPER_CPP = """
import sys
from pywhispercpp.model import Model
from whisper_nnx.audio.loading import load_audio  # pywhispercpp needs ffmpeg except for wav
options = {"n_threads": int(sys.argv[3]), "temperature_inc": 0.0, "print_progress": False, "language": "en"}
model = Model(sys.argv[1], redirect_whispercpp_logs_to=None, **options)
model.transcribe(load_audio(sys.argv[2]), new_segment_callback=lambda s: print(f"[{s.t0} --> {s.t1}] {s.text}"))
"""
TRANSFORMERS = """
import sys, torch, transformers
from whisper_nnx.audio.loading import load_audio
model = transformers.WhisperForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.float32)
processor = transformers.WhisperProcessor.from_pretrained(sys.argv[1])
found = processor(load_audio(sys.argv[2]), sampling_rate=16000, return_tensors="pt", truncation=False,
                  padding="longest", return_attention_mask=True)
language = {"language": "en"} if model.generation_config.is_multilingual else {}
ids = model.generate(**found, return_timestamps=True, do_sample=False, **language)
print("-->", processor.decode(ids[0], skip_special_tokens=True))
"""


def commands(checkpoint: Path, recording: Path, scratch: Path) -> dict[str, list[object]]:
    """Returns the command of each system."""
    common = ["--language", "en", "--temperature", "0", "--temperature_increment_on_fallback", "None"]
    common += ["--beam_size", "None", "--condition_on_previous_text", "False", "--output_dir", scratch / "out"]
    ours = [sys.executable, "-m", "whisper_nnx.transcribe", recording, "--model", checkpoint / "huggingface", *common]
    ours += ["--compilation_cache", scratch / "cache"]

    def script(code: str, name: str, *rest: object) -> list[object]:
        return [sys.executable, "-W", "ignore", "-c", code, checkpoint / name, recording, *rest]

    openai = [
        Path(sys.executable).parent / "whisper",
        recording,
        "--model",
        checkpoint / "openai.pt",
        "--fp16",
        "False",
    ]
    if not openai[0].exists():
        openai[:1] = [sys.executable, "-m", "whisper"]
    return {
        "whisper_nnx": ours,
        "whisper_nnx, bfloat16": [*ours, "--dtype", "bfloat16"],
        "whisper_nnx, int8": [*ours, "--dtype", "bfloat16", "--weights", "int8"],
        "openai-whisper": [*openai, *common],
        "transformers": script(TRANSFORMERS, "huggingface"),
        "faster-whisper": script(FASTER_WHISPER, "ctranslate2", "float32", CORES),
        "faster-whisper, int8": script(FASTER_WHISPER, "ctranslate2", "int8", CORES),
        "whisper.cpp, f16": script(WHISPER_CPP, "ggml-f16.bin", CORES),
        "whisper.cpp, q8_0": script(WHISPER_CPP, "ggml-q8_0.bin", CORES),
    }


def times(command: list[object], programs: Path) -> tuple[float, float]:
    """Returns seconds to the first line with text and to the end; `programs` is first in PATH."""
    path = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}
    environment = os.environ | path | {"PYTHONPATH": str(ROOT)}  # ours need not be installed
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    first_s, start = None, time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        for line in process.stdout:
            if "-->" in line and first_s is None:
                first_s = time.perf_counter() - start
        code, end_s = process.wait(), time.perf_counter() - start
        if code or first_s is None:
            errors.seek(0)
            raise SystemExit(f"{' '.join(map(str, command[:4]))} ended with {code}: {errors.read()[-2000:]}")
    return first_s, end_s


def with_ffmpeg(folder: Path) -> Path:
    """Makes a folder with a program named ffmpeg, which openai-whisper calls."""
    import imageio_ffmpeg

    folder.mkdir()
    (folder / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="in any format")
    parser.add_argument("recording", type=Path, help="in English")
    parser.add_argument("--result", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="each once: shows that everything runs")
    parser.add_argument("--formats", type=Path, metavar="FOLDER", help="where the converted checkpoint is kept")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = prepare(args.checkpoint, args.formats or Path(scratch) / "formats")
        chosen = commands(checkpoint, args.recording.resolve(), Path(scratch))
        programs = with_ffmpeg(Path(scratch) / "programs")
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen}
        for _ in range(1 if args.quick else args.repeats + 1):
            for name, command in chosen.items():
                runs[name].append(times(command, programs))
                print(name, runs[name][-1], file=sys.stderr, flush=True)
    found = {}
    for name, (cold, *warm) in runs.items():
        first, end = (statistics.median(values) for values in zip(*(warm or [cold]), strict=True))
        found[name] = {
            "first_line_s": round(first, 2),
            "end_s": round(end, 2),
            "runs": len(warm),
            "cold_s": round(cold[0], 2),
        }
    from whisper_nnx.audio.loading import load_audio

    seconds = round(len(load_audio(args.recording)) / 16_000, 1)
    write_result(args.result, args.checkpoint.name, {}, audio_s=seconds, cold_start=found)


if __name__ == "__main__":
    main()
