"""Word error rates by the numbers that a model computes with (dtype) and is kept in (weights).

    python benchmarks/precision.py CHECKPOINT RECORDINGS

RECORDINGS is a folder that holds recordings with NAME.words.json beside them, as of benchmarks/hour.py, or a manifest
(JSON lines with audio, text and language). Each is transcribed in its language, greedily, and without being told what
was said before: so one other word has no further consequences.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.hour import normalised

PAIRS = [  # dtype, weights
    ("float32", "float32"),
    ("float32", "bfloat16"),
    ("float32", "float16"),
    ("float32", "int8"),
    ("bfloat16", "bfloat16"),
    ("bfloat16", "int8"),
    ("float16", "float16"),
]


def known(recordings: Path) -> list[dict]:
    """audio, text and language of each recording in which one language is spoken."""
    if recordings.is_file():
        rows = [json.loads(line) for line in recordings.read_text().splitlines()]
        return [row | {"audio": recordings.parent / row["audio"]} for row in rows]
    found = []
    for path in sorted(recordings.glob("*.words.json")):
        truth = json.loads(path.read_text())
        languages = {word["language"] for word in truth["words"]}
        if len(languages) == 1:
            text = " ".join(word["word"] for word in truth["words"])
            found.append({"audio": recordings / truth["recording"], "text": text, "language": languages.pop()})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("recordings", type=Path)
    args = parser.parse_args()

    import jiwer

    import whisper_nnx

    truths = known(args.recordings)
    spoken = [normalised(truth["text"]) for truth in truths]
    audio = [{name: truth[name] for name in ("audio", "language")} for truth in truths]
    options = {"temperature": 0.0, "condition_on_previous_text": False}
    warnings.simplefilter("ignore")
    print(
        "| dtype | weights | word error rate | differs from float32 | s |",
        "|---|---|---|---|---|",
        sep="\n",
    )
    exact: list[str] = []
    for dtype, weights in PAIRS:
        model = whisper_nnx.load_model(args.checkpoint, dtype=dtype, weights=weights)
        start = time.perf_counter()
        texts = [normalised(whisper_nnx.transcribe(model, one, **options)["text"]) for one in audio]
        seconds = time.perf_counter() - start
        exact = exact or texts
        rates = f"{100 * jiwer.wer(spoken, texts):.2f} % | {100 * jiwer.wer(exact, texts):.2f} %"
        print(f"| {dtype} | {weights} | {rates} | {seconds:.0f} |", flush=True)
    print(f"\n{len(truths)} recordings, {sum(len(text.split()) for text in spoken)} words; seconds with compilation.")


if __name__ == "__main__":
    main()
