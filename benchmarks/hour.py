"""An hour of speech whose words are known: window after window, beside the voice activity filter and batches.

    python benchmarks/hour.py CHECKPOINT_FOLDER RECORDINGS_FOLDER [--minutes 60] [--batch_size 8] [--only PATTERN]

The hour is made of the folder's English recordings and of those without speech; beside each lie its true words, in
NAME.words.json. Each way to transcribe it runs in a process of its own, after a warm-up on its first two minutes.
Reported: word error rate over the whole, seconds, and the most memory that the process held. All options are the
defaults, with the language given; the peers decode greedily.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.checkpoints import prepare
from benchmarks.memory import peak_memory_mb, reset_peak_memory
from benchmarks.systems import SAMPLE_RATE, SYSTEMS

WARM_UP_S = 120


def ways(batch_size: int) -> dict[str, tuple[str, dict]]:
    """Name -> the system and its options."""
    batch = {"batch_size": batch_size}
    return {
        "whisper_nnx, sequential": ("whisper_nnx", {}),
        "whisper_nnx, vad_filter": ("whisper_nnx", {"vad_filter": True}),
        f"whisper_nnx, vad_filter, batch {batch_size}": ("whisper_nnx", {"vad_filter": True, **batch}),
        "openai-whisper, sequential": ("openai-whisper", {}),
        "faster-whisper, sequential": ("faster-whisper", {"beam_size": 1}),
        f"faster-whisper, batched, batch {batch_size}": ("faster-whisper, batched", {"beam_size": 1, **batch}),
    }


def make_hour(folder: Path, minutes: float) -> tuple[np.ndarray, str]:
    """Samples of at least that many minutes, and the words in them; each round has the recordings in another order."""
    from whisper_nnx.audio import load_audio

    truths = [json.loads(path.read_text()) for path in sorted(folder.glob("*.words.json"))]
    truths = [truth for truth in truths if all(word["language"] == "en" for word in truth["words"])]
    if not truths:
        raise SystemExit(f"{folder} holds no English recordings with NAME.words.json beside them")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*digital silence")  # so it is meant
        sounds = {truth["recording"]: load_audio(folder / truth["recording"]) for truth in truths}
    chosen, samples, words, wanted = random.Random(0), [], [], minutes * 60 * SAMPLE_RATE
    while True:
        for truth in chosen.sample(truths, len(truths)):
            if wanted <= 0:
                return np.concatenate(samples), " ".join(words)
            samples.append(sounds[truth["recording"]])
            words += [word["word"] for word in truth["words"]]
            wanted -= len(samples[-1])


def normalised(text: str) -> str:
    """Words alone: capitals and punctuation are no errors."""
    return " ".join(re.findall(r"\w+", text.lower()))


def measure(system: str, options: dict, checkpoint: Path, folder: Path, minutes: float) -> dict:
    """Transcribes the hour in this process."""
    import jiwer

    audio, truth = make_hour(folder, minutes)
    made = SYSTEMS[system](checkpoint, None)
    start = time.perf_counter()
    made.text(audio[: WARM_UP_S * SAMPLE_RATE], **options)
    warm_up_s = time.perf_counter() - start
    reset_peak_memory()
    start = time.perf_counter()
    text = made.text(audio, **options)
    seconds = time.perf_counter() - start
    result = jiwer.process_words(truth, normalised(text))
    wrong = {name: getattr(result, name) for name in ("substitutions", "deletions", "insertions")}
    length = {"minutes": len(audio) / SAMPLE_RATE / 60, "words": len(truth.split())}
    mb, version = peak_memory_mb(), made.version()
    return {"wer": result.wer, "s": seconds, "warm_up_s": warm_up_s, "mb": mb, "version": version, **wrong, **length}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="a Hugging Face folder")
    parser.add_argument("recordings", type=Path, help="a folder of recordings with NAME.words.json beside them")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--only", default="", metavar="PATTERN", help="the ways whose name has this regular expression")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        system, options = ways(args.batch_size)[args.measure]
        answers, sys.stdout = sys.stdout, sys.stderr
        print(json.dumps(measure(system, options, args.checkpoint, args.recordings, args.minutes)), file=answers)
        return
    print("| way | word error rate | substitutions, deletions, insertions | seconds | first 2 min | peak memory, MB |")
    print("|---|---|---|---|---|---|", flush=True)
    versions = {}
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = prepare(args.checkpoint, Path(scratch))
        for name, (system, _) in ways(args.batch_size).items():
            if not re.search(args.only, name):
                continue
            command = [sys.executable, __file__, checkpoint, args.recordings, "--measure", name]
            command += ["--minutes", str(args.minutes), "--batch_size", str(args.batch_size)]
            answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if answer.returncode:
                print(f"| {name} | failed with exit code {answer.returncode} | | | | |", flush=True)
                continue
            r = json.loads(answer.stdout)
            versions[system.split(",")[0]] = r["version"]
            errors = ", ".join(str(r[kind]) for kind in ("substitutions", "deletions", "insertions"))
            times = f"{r['s']:.1f} | {r['warm_up_s']:.1f}"
            print(f"| {name} | {100 * r['wer']:.2f} % | {errors} | {times} | {r['mb']:.0f} |", flush=True)
            about = f"{r['minutes']:.1f} min, {r['words']} words"
    if versions:
        systems = "; ".join(f"{name} {version}" for name, version in versions.items())
        print(f"\n{about}; {systems}; {platform.machine()}, {os.cpu_count()} cores, float32.")


if __name__ == "__main__":
    main()
