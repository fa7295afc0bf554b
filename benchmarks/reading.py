"""Measures decoding of files: one after the other, and read ahead by threads and by processes, beside other Whispers.

    python benchmarks/reading.py FILE ... --result benchmarks/results/files.reading.json

Each way decodes a file as often as it takes to have some minutes of audio; three rounds in turn, of which the best
counts. On a quiet machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import av
import numpy as np

from benchmarks.scoring import write_result
from whisper_nnx.audio.constants import SAMPLE_RATE
from whisper_nnx.audio.loading import load_audio
from whisper_nnx.transcription.opening import read_samples
from whisper_nnx.transcription.options import TranscribeOptions
from whisper_nnx.transcription.reading import ReadAhead

MINUTES, ROUNDS = 20, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--result", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    args = parser.parse_args()
    found = []
    for file in args.files:
        audio_s = len(load_audio(file)) / SAMPLE_RATE
        times = max(4, round(60 * args.minutes / audio_s))
        best = dict.fromkeys(WAYS, float("inf"))
        for _ in range(ROUNDS):
            for name, way in WAYS.items():
                best[name] = min(best[name], taken_s(way, file, times))
        rates = {name: round(times * audio_s / s, 1) for name, s in best.items()}
        found.append({"file": file.suffix[1:], "about": about(file), "audio_s": round(audio_s, 1), "rates": rates})
        print(found[-1], file=sys.stderr, flush=True)
    versions = {"whisper_nnx": version("whisper-nnx"), "av": version("av")}
    versions |= {name: version(name) for name in ("faster-whisper", "openai-whisper")}
    write_result(args.result, "files", versions, reading=found)


def about(file: Path) -> str:
    with av.open(str(file)) as container:
        codec = container.streams.audio[0].codec_context
        return f"{codec.name}, {codec.sample_rate} Hz, {codec.layout.nb_channels} channels"


def taken_s(way: Callable[[Path, int], None], file: Path, times: int) -> float:
    start = time.perf_counter()
    way(file, times)
    return time.perf_counter() - start


def in_turn(load: Callable[[str], Any], file: Path, times: int) -> None:
    for _ in range(times):
        load(str(file))


def ahead(options: dict[str, int], file: Path, times: int) -> None:
    """With the start of processes."""
    sources = [(str(file), TranscribeOptions.of())] * times
    with closing(ReadAhead(iter(sources), read_samples, 8, **options)) as reading:
        assert all(isinstance(one.result.samples, np.ndarray) for one in reading)


def openai_whisper(file: str) -> np.ndarray:
    """As its `load_audio` does: by the program ffmpeg. Without its package, which imports torch."""
    command = ["ffmpeg", "-nostdin", "-threads", "0", "-i", file, "-f", "s16le", "-ac", "1", "-acodec", "pcm_s16le"]
    out = subprocess.run([*command, "-ar", str(SAMPLE_RATE), "-"], capture_output=True, check=True).stdout
    return np.frombuffer(out, np.int16).flatten().astype(np.float32) / 32768.0


def faster_whisper(file: str) -> np.ndarray:
    from faster_whisper.audio import decode_audio

    return decode_audio(file)


WAYS: dict[str, Callable[[Path, int], None]] = {
    "whisper_nnx, one by one": partial(in_turn, load_audio),
    "whisper_nnx, 1 thread ahead": partial(ahead, {"threads": 1}),
    "whisper_nnx, 2 threads ahead": partial(ahead, {"threads": 2}),
    "whisper_nnx, 1 process": partial(ahead, {"processes": 1}),
    "whisper_nnx, 2 processes": partial(ahead, {"processes": 2}),
    "faster-whisper": partial(in_turn, faster_whisper),
    "openai-whisper (ffmpeg)": partial(in_turn, openai_whisper),
}

if __name__ == "__main__":
    main()
