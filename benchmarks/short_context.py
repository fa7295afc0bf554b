"""Measures word errors and seconds by clip length and `audio_ctx`, and what the encoder computes.

    python benchmarks/short_context.py CHECKPOINT MANIFEST --result benchmarks/results/NAME.contexts.json
    python benchmarks/short_context.py CHECKPOINT MANIFEST --result benchmarks/results/NAME.contexts.json --speed

Clips of some seconds are cut from real recordings between words, which `align` times; their words are the true ones.
Each is decoded greedily at temperature 0 with each context that has room for it. --speed adds to each row of a result
what a clip takes alone, warm: the median of a few.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[1]))

import whisper_nnx
from benchmarks import speech
from benchmarks.scoring import score, write_result
from benchmarks.systems import GREEDY, SAMPLE_RATE
from whisper_nnx.model.whisper import Whisper

LENGTHS_S = (3, 6, 10)
TIMED = 7  # clips
CONTEXTS = (0, 50, 100, 250, 500)  # positions beyond those of the clip; and all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="in any format")
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--result", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--languages", default="en", help="comma-separated")
    parser.add_argument("--contexts", default=",".join(map(str, CONTEXTS)), help="positions beyond those of the clip")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS_S)), help="of clips, in s")
    parser.add_argument("--seconds", type=float, default=90, help="of each recording, at most")
    parser.add_argument("--speed", action="store_true", help="add the times to the rows that --result has")
    args = parser.parse_args()
    model = whisper_nnx.load_model(str(args.checkpoint))
    recordings = speech.read(args.manifest, set(args.languages.split(",")))
    words = {r.name: aligned(model, r) for r in recordings}
    versions = {"whisper_nnx": f"{whisper_nnx.__version__}, jax {jax.__version__}"}
    if args.speed:
        rows = json.loads(args.result.read_text())["contexts"]
        for row in rows:
            clips = [clip for r in recordings for clip in cut(r, words[r.name], row["length_s"])][:TIMED]
            row["clip_s"] = round(latency_s(whisper_nnx.with_audio_ctx(model, row["audio_ctx"]), clips), 3)
            print(row, file=sys.stderr, flush=True)
        write_result(args.result, args.checkpoint.name, versions, contexts=rows)
        return
    rows = []
    for length_s in map(float, args.lengths.split(",")):
        clips = [clip for r in recordings for clip in cut(r, words[r.name], length_s) if r.duration_s <= args.seconds]
        own = round(length_s * 50)
        for more in [*map(int, args.contexts.split(",")), None]:
            context = 1500 if more is None else own + more
            if context > 1500:
                continue
            short = whisper_nnx.with_audio_ctx(model, context)
            sources = [{"audio": clip.audio, "language": clip.language} for clip in clips]
            texts = [result["text"] for result in whisper_nnx.transcribe(short, sources, batch_size=8, **GREEDY)]
            found = score(texts, [clip.text for clip in clips], [clip.language for clip in clips])
            rows.append({"length_s": length_s, "audio_ctx": context, "clips": len(clips), **cost(short), **found})
            print(rows[-1], file=sys.stderr, flush=True)
            write_result(args.result, args.checkpoint.name, versions, contexts=rows)


def latency_s(model: Whisper, clips: list[speech.Recording]) -> float:
    """The median of what clips take alone, after a first round that compiles."""

    def taken_s(clip: speech.Recording) -> float:
        start = time.perf_counter()
        whisper_nnx.transcribe(model, clip.audio, language=clip.language, **GREEDY)
        return time.perf_counter() - start

    return [statistics.median(map(taken_s, clips)) for _ in range(2)][1]


def aligned(model: Whisper, recording: speech.Recording) -> list[dict[str, Any]]:
    result = whisper_nnx.align(model, recording.audio, recording.text, language=recording.language)
    return [word for segment in result["segments"] for word in segment["words"]]


def cut(recording: speech.Recording, words: list[dict[str, Any]], longest_s: float) -> list[speech.Recording]:
    """Clips of whole words, as many as fit, with up to 0.2 s of the pauses before and after."""
    edges = [0.0, *((a["end"] + b["start"]) / 2 for a, b in pairwise(words)), recording.duration_s]
    starts = [max(middle, word["start"] - 0.2) for middle, word in zip(edges, words, strict=False)]
    ends = [min(middle, word["end"] + 0.2) for middle, word in zip(edges[1:], words, strict=True)]
    clips, first = [], 0
    while first < len(words):
        last = max([first, *(i for i in range(first, len(words)) if ends[i] - starts[first] <= longest_s)])
        end_s = min(ends[last], starts[first] + longest_s)
        audio = recording.audio[round(starts[first] * SAMPLE_RATE) : round(end_s * SAMPLE_RATE)]
        text = "".join(word["word"] for word in words[first : last + 1])
        clips.append(speech.Recording(audio, text, recording.language, f"{recording.name}, {first}"))
        first = last + 1
    return clips


def cost(model: Whisper) -> dict[str, float]:
    """GFLOP of the encoder for a window, and megabytes of audio keys and values, which each token reads."""
    config = model.config
    mel = jax.ShapeDtypeStruct((1, config.num_mel_bins, 2 * config.max_source_positions), jnp.float32)
    with whisper_nnx.ops.using("reference"):
        found = jax.jit(lambda model, mel: model.encode(mel)).lower(model, mel).cost_analysis()
    cross = 2 * config.decoder_layers * config.max_source_positions * config.d_model * 4
    return {"gflop": found["flops"] / 1e9, "cross_mb": cross / 1e6}


if __name__ == "__main__":
    main()
