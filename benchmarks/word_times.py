"""Measures errors of word times against manual labels, for this project and its peers.

    python benchmarks/word_times.py FOLDER --ours CHECKPOINT [--openai tiny.en.pt] [--faster CT2_FOLDER]

FOLDER contains recordings NAME.wav with labels NAME.wrd in TIMIT's format: one line per word with start, end and word.
Times with a decimal point are seconds; whole numbers are samples at 16 kHz. Words are English. For transcripts, only
words that match the labels' in a minimal edit alignment count; `align` gets the labels' words, and all count.
"""

from __future__ import annotations

import argparse
import difflib
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Timed(NamedTuple):
    word: str
    start_s: float
    end_s: float


def labels_of(file: Path) -> list[Timed]:
    """Reads the words of a label file. ValueError for a line that is not "start end word"."""
    words = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        parts = line.split()
        if not parts:
            continue
        try:
            start, end = (float(t) if "." in t else int(t) / 16_000 for t in parts[:2])
            words.append(Timed(" ".join(parts[2:]), start, end))
        except ValueError:
            raise ValueError(f"{file}:{number}: {line!r} is not a start, an end and a word") from None
    return words


def letters(word: str) -> str:
    plain = unicodedata.normalize("NFKC", word).casefold()
    return "".join(c for c in plain if c.isalnum())


def errors(found: list[Timed], labels: list[Timed]) -> np.ndarray:
    """Returns start and end errors [n,2] in s of matching words; positive is late."""
    texts = [[letters(word.word) for word in own] for own in (labels, found)]
    blocks = difflib.SequenceMatcher(None, *texts, autojunk=False).get_matching_blocks()
    pairs = [(labels[a + i], found[b + i]) for a, b, n in blocks for i in range(n)]
    return np.array([(f.start_s - t.start_s, f.end_s - t.end_s) for t, f in pairs]).reshape(-1, 2)


def systems(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[Path, str], list[Timed]]]]:
    """Yields (name, function from audio and text to words); the text is used only by `align`."""

    def of(words: list[dict]) -> list[Timed]:
        return [Timed(w["word"], w["start"], w["end"]) for w in words if w["start"] is not None]

    def of_transcript(transcript: dict) -> list[Timed]:
        return of([word for segment in transcript["segments"] for word in segment["words"]])

    if args.ours:
        import whisper_nnx

        model = whisper_nnx.load_model(args.ours)
        options = {"language": "en", "temperature": 0.0, "word_timestamps": True}
        yield "word_timestamps", lambda audio, _: of_transcript(whisper_nnx.transcribe(model, audio, **options))
        refined = {**options, "refine_word_times": True}
        yield "refine_word_times", lambda audio, _: of_transcript(whisper_nnx.transcribe(model, audio, **refined))
        yield "align", lambda audio, text: of(whisper_nnx.align(model, audio, text, language="en")["words"])
    if args.openai:
        import whisper

        from whisper_nnx import load_audio

        theirs = whisper.load_model(args.openai, device="cpu")
        # A model that is loaded by name has the released heads, one from a file has not.
        theirs.set_alignment_heads(whisper._ALIGNMENT_HEADS[Path(args.openai).stem])
        options = {"language": "en", "temperature": 0.0, "word_timestamps": True, "fp16": False}
        yield "openai-whisper", lambda audio, _: of_transcript(theirs.transcribe(load_audio(audio), **options))
    if args.faster:
        import faster_whisper

        faster = faster_whisper.WhisperModel(args.faster, device="cpu", compute_type="float32")

        def transcribe(audio: Path, _: str) -> list[Timed]:
            segments, _info = faster.transcribe(
                str(audio), language="en", temperature=0.0, beam_size=1, word_timestamps=True
            )
            return [Timed(w.word, w.start, w.end) for segment in segments for w in segment.words or ()]

        yield "faster-whisper", transcribe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ours", help="a checkpoint of this project")
    parser.add_argument("--openai", help="the same, as openai-whisper's .pt, by its released name")
    parser.add_argument("--faster", help="the same, as a CTranslate2 folder")
    args = parser.parse_args()
    clips = [(file.with_suffix(".wav"), labels_of(file)) for file in sorted(args.folder.glob("*.wrd"))]
    if not clips:
        sys.exit(f"{args.folder} contains no .wrd files; see --help")
    n_words = sum(len(labels) for _, labels in clips)
    print(f"{len(clips)} recordings, {n_words} words; start/end\n")
    print(
        "| | words | median, ms | mean, ms | within 50 ms | within 100 ms | bias, ms |\n|---|---|---|---|---|---|---|"
    )
    for name, words_of in systems(args):
        found = [words_of(audio, " ".join(label.word for label in labels)) for audio, labels in clips]
        error = np.concatenate([errors(own, labels) for own, (_, labels) in zip(found, clips, strict=True)])
        size = np.abs(error)
        cells = [
            *(f"{1000 * a:.0f}/{1000 * b:.0f}" for a, b in (np.median(size, axis=0), size.mean(axis=0))),
            *("/".join(f"{100 * x:.0f} %" for x in (size <= s + 1e-9).mean(axis=0)) for s in (0.05, 0.1)),
            "/".join(f"{1000 * x:+.0f}" for x in np.median(error, axis=0)),
        ]
        print(f"| {name} | {len(error)} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
