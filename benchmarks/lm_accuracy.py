"""Counts errors without a language model, and with n-grams over words and over tokens made from a text (`lm`).

    python benchmarks/lm_accuracy.py CHECKPOINT MANIFEST TEXT --result benchmarks/results/NAME.lm_accuracy.json

TEXT has a sentence, a verse or a paragraph a line, and none of the recordings' texts. The trigrams are estimated here,
by absolute discounting with interpolation. The words are in lower case and without punctuation; the tokens are those of
the lines as they are. Recordings are decoded without fallback, clean and with pink noise.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import speech
from benchmarks.scoring import write_result

DISCOUNT = 0.75
MARKS = re.compile(r"[^\w\s']")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="in any format")
    parser.add_argument("manifest", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--result", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--weights", type=float, nargs="*", default=[0.05, 0.1, 0.2, 0.3], help="lm_weight")
    parser.add_argument("--noise", type=float, nargs="*", default=[5.0], metavar="DB")
    parser.add_argument("--beams", type=int, nargs="*", default=[1, 5], help="1: greedily")
    args = parser.parse_args()

    from whisper_nnx import load_model

    model = load_model(str(args.checkpoint))
    recordings = speech.read(args.manifest, {"en"})
    lines = [line.strip() for line in args.text.read_text(encoding="utf-8").splitlines() if line.strip()]
    units = {
        "words": [MARKS.sub(" ", line.lower()).split() for line in lines],
        "tokens": [list(map(str, model.tokenizer.encode(f" {line}"))) for line in lines],
    }
    sounds = {"clean": recordings}
    sounds |= {f"noise {ratio:g} dB below": [speech.noisy(one, ratio) for one in recordings] for ratio in args.noise}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.arpa" for name in units}
        for name, file in files.items():
            file.write_text(trigrams(units[name]), encoding="utf-8")
        options: list[tuple[str, dict[str, Any]]] = [("none", {})]
        options += [(name, {"lm": file, "lm_weight": w}) for name, file in files.items() for w in args.weights]
        for beams, (sound, some), (name, changes) in product(args.beams, sounds.items(), options):
            row = errors(model, some, temperature=0.0, beam_size=None if beams == 1 else beams, **changes)
            found.append({"beams": beams, "sound": sound, "lm": name, "weight": changes.get("lm_weight"), **row})
            print(found[-1], file=sys.stderr, flush=True)
    write_result(args.result, args.checkpoint.name, {"whisper_nnx": version("whisper-nnx")}, lm_accuracy=found)


def errors(model: Any, recordings: Sequence[speech.Recording], **options: Any) -> dict[str, Any]:
    """Words and errors of all recordings, the errors of each, and how many marks are written."""
    import jiwer

    from whisper_nnx import transcribe
    from whisper_nnx.evaluation.normalizers import split

    total: dict[str, Any] = {"words": 0, "errors": 0, "marks": 0}
    for recording in recordings:
        text = transcribe(model, recording.audio, language="en", **options)["text"]
        spoken, written = (split(one, "en") for one in (recording.text, text))
        wrong = round(jiwer.wer(" ".join(spoken), " ".join(written)) * len(spoken))
        total["words"] += len(spoken)
        total["errors"] += wrong
        total["marks"] += len(re.findall(r"[.,:;?!]", text))
        total[recording.name] = wrong
    return total


def trigrams(lines: Iterable[Sequence[str]]) -> str:
    """An ARPA file of what follows each other in these lines."""
    padded = [("<s>", *line, "</s>") for line in lines]
    counts = [Counter(line[i : i + n] for line in padded for i in range(len(line) + 1 - n)) for n in (1, 2, 3)]
    del counts[0]["<s>",]
    of_context = [Counter[tuple[str, ...]](), Counter[tuple[str, ...]](), Counter[tuple[str, ...]]()]
    kinds = [Counter[tuple[str, ...]](), Counter[tuple[str, ...]](), Counter[tuple[str, ...]]()]
    for n, own in enumerate(counts):
        for ngram, count in own.items():
            of_context[n][ngram[:-1]] += count
            kinds[n][ngram[:-1]] += 1

    def backoff(context: tuple[str, ...]) -> float:
        seen = of_context[len(context)][context] if len(context) < 3 else 0
        return DISCOUNT * kinds[len(context)][context] / seen if seen else 1.0

    def probability(ngram: tuple[str, ...]) -> float:
        if not ngram:
            return 1 / (len(counts[0]) + 1)
        context = ngram[:-1]
        own = max(counts[len(context)][ngram] - DISCOUNT, 0) / of_context[len(context)][context]
        return own + backoff(context) * probability(ngram[1:])

    sections = [[("<unk>",), ("<s>",), *counts[0]], [*counts[1]], [*counts[2]]]
    parts = ["\\data\\\n", *(f"ngram {n}={len(own)}\n" for n, own in enumerate(sections, start=1))]
    for n, own in enumerate(sections, start=1):
        parts.append(f"\n\\{n}-grams:\n")
        for ngram in own:
            value = -99.0 if ngram == ("<s>",) else math.log10(probability(ngram))
            parts.append(f"{value:.6f}\t{' '.join(ngram)}")
            parts.append(f"\t{math.log10(backoff(ngram)):.6f}\n" if n < 3 and ngram[-1] != "</s>" else "\n")
    return "".join([*parts, "\n\\end\\\n"])


if __name__ == "__main__":
    main()
