"""Measures what checkpoints write without speech: phrases by language, and which heads of the decoder cause it.

    python benchmarks/invented.py CHECKPOINT --pauses RECORDING ... --result COUNTS --phrases PHRASES
    python benchmarks/invented.py CHECKPOINT --speech MANIFEST --result benchmarks/results/NAME.heads.json

Windows of 30 s are decoded greedily without any threshold, so that nothing hides what the model would write. The first
form adds to the counts in COUNTS (benchmarks/results/phrases.invented.json), and writes the phrases of up to ten words
to PHRASES (whisper_nnx/assets/invented_phrases.json). The second masks each self-attention head of the decoder by
itself, then the best ones together (arXiv:2505.12969), and counts words without speech beside errors in speech.
`--sounds` and `--languages` do a part at a time.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1]))

import whisper_nnx
from benchmarks import speech
from benchmarks.nonspeech_sounds import speechless
from benchmarks.scoring import score, write_result
from whisper_nnx.model.whisper import Whisper
from whisper_nnx.transcription.attempts import compression_ratio
from whisper_nnx.transcription.calm import plain
from whisper_nnx.transcription.segments import split_at_timestamps
from whisper_nnx.transcription.windows import encode_windows

LANGUAGES = "en,de,es,fr,it,pt,nl,ru,pl,zh,ja,ko,tr,ar"
WINDOW_S, TOKENS = 30, 48
LONGEST = 10  # words
BEST = (2, 4)  # numbers of the best heads that are masked together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="in any format")
    parser.add_argument("--pauses", type=Path, nargs="*", default=[], help="recordings with NAME.words.json")
    parser.add_argument("--windows", type=int, default=2, help="of each kind of audio")
    parser.add_argument("--languages", default=LANGUAGES)
    parser.add_argument("--phrases", type=Path, help="the JSON file to write phrases to")
    parser.add_argument("--speech", type=Path, help="manifest of English recordings")
    parser.add_argument("--result", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--sounds", default="", metavar="PATTERN", help="only these, for a part at a time")
    args = parser.parse_args()
    windows = [
        sound[i * WINDOW_S * 16_000 : (i + 1) * WINDOW_S * 16_000]
        for name, sound in speechless(WINDOW_S * args.windows, args.pauses).items()
        if re.search(args.sounds, name)
        for i in range(args.windows)
    ]
    if args.phrases:
        write_phrases(args, windows)
    else:
        write_heads(args, windows)


def encoded(model: Whisper, audio: list[np.ndarray]) -> np.ndarray:
    """Encoder output [B,T,D] of windows of up to 30 s, encoded one by one."""
    mels = [whisper_nnx.log_mel_spectrogram(whisper_nnx.pad_or_trim(one), model.config.num_mel_bins) for one in audio]
    return np.concatenate([np.asarray(encode_windows(model, mel[None]).features) for mel in mels])


def segments(model: Whisper, features: np.ndarray, language: str, tokens: int = TOKENS) -> list[list[str]]:
    """The texts of the segments of each window."""
    tokenizer = model.tokenizer
    found = whisper_nnx.decode(model, features, language=language, max_new_tokens=tokens)
    pieces = [split_at_timestamps(one.tokens, tokenizer.special, 0.02, WINDOW_S)[0] for one in found]
    return [[tokenizer.decode(tokenizer.text_tokens(piece.tokens)) for piece in own] for own in pieces]


def write_phrases(args: argparse.Namespace, windows: list[np.ndarray]) -> None:
    """Adds what one checkpoint writes to the counts in the result, and makes the list of phrases of all counts."""
    path = args.checkpoint
    result = json.loads(args.result.read_text()) if args.result.exists() else {"windows": {}, "counts": {}}
    model = whisper_nnx.load_model(str(path))
    features, counts = encoded(model, windows), result["counts"]
    for language in args.languages.split(",") if model.tokenizer.is_multilingual else ["en"]:
        own = Counter(counts.setdefault(language, {}))
        for texts in segments(model, features, language):
            own.update({plain(text) for text in texts} - {""})
        counts[language] = dict(own.most_common())
        print(path.name, language, own.most_common(8), file=sys.stderr, flush=True)
    result["windows"][path.name] = result["windows"].get(path.name, 0) + len(windows)
    args.result.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    kept = {code: sorted(p for p in own if is_phrase(p)) for code, own in sorted(counts.items())}
    about = {"measured_with": sorted(result["windows"]), "phrases": kept}
    args.phrases.write_text(json.dumps(about, ensure_ascii=False, indent=1) + "\n")


def is_phrase(text: str) -> bool:
    """Whether it is neither long nor a loop."""
    return len(text.split()) <= LONGEST and compression_ratio(text) < 2


def masked(model: Whisper, heads: list[tuple[int, int]]) -> Whisper:
    """The model with the output of these self-attention heads (layer, head) of the decoder left out."""
    other = nnx.clone(model)
    width = model.config.d_model // model.config.decoder_attention_heads
    for layer, head in heads:
        kernel = other.decoder.layers[layer].self_attn.out_proj.kernel
        kernel.set_value(kernel[...].at[head * width : (head + 1) * width].set(0))
    return other


def write_heads(args: argparse.Namespace, windows: list[np.ndarray]) -> None:
    path = args.checkpoint
    model = whisper_nnx.load_model(str(path))
    recordings = speech.read(args.speech, {"en"})
    clips = [(clip, recording) for recording in recordings for clip in speech.cut(recording.audio)]
    noise, spoken = encoded(model, windows), encoded(model, [clip for clip, _ in clips])

    def measure(heads: list[tuple[int, int]]) -> dict[str, Any]:
        other = masked(model, heads)
        invented = sum(len(plain(text).split()) for own in segments(other, noise, "en") for text in own)
        texts = dict.fromkeys((r.name for r in recordings), "")
        for (_, recording), own in zip(clips, segments(other, spoken, "en", 200), strict=True):
            texts[recording.name] += "".join(own)
        found = score([texts[r.name] for r in recordings], [r.text for r in recordings], ["en"] * len(recordings))
        row = {"heads": heads, "invented": invented, **found}
        print(row, file=sys.stderr, flush=True)
        return row

    def wrong(row: dict[str, Any]) -> int:
        return row["substitutions"] + row["deletions"] + row["insertions"] + row["loop_words"]

    whole = measure([])
    config, rows = model.config, [whole]
    for layer in range(config.decoder_layers):
        rows += [measure([(layer, head)]) for head in range(config.decoder_attention_heads)]
    harmless = [row for row in rows[1:] if wrong(row) <= wrong(whole) and row["invented"] < whole["invented"]]
    best = [row["heads"][0] for row in sorted(harmless, key=lambda row: row["invented"])]
    rows += [measure(best[:n]) for n in BEST if len(best) >= n]
    versions = {"whisper_nnx": whisper_nnx.__version__}
    write_result(args.result, path.name, versions, windows=len(windows), heads=rows)


if __name__ == "__main__":
    main()
