"""Compares word error rates of computation and weight dtypes, ours and those of peers.

    python benchmarks/precision.py CHECKPOINT MANIFEST --result benchmarks/results/NAME.precision.json

Each recording of the manifest (JSON lines with audio, text and language), clean and with pink noise 5 dB below it, is
transcribed in its language, greedily at temperature 0 and without previous text, so that single differences have no
further consequences. Phrases repeated four or more times are loops, which are counted separately from errors.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import speech
from benchmarks.checkpoints import prepare
from benchmarks.scoring import score, write_result
from benchmarks.systems import SYSTEMS, Work, formats
from benchmarks.worker import Worker, save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="in any format")
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--result", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--languages", help="comma-separated; default: all")
    parser.add_argument(
        "--systems",
        default="^(?!transformers, b)",
        metavar="PATTERN",
        help="systems that match this regular expression, and ours",
    )
    parser.add_argument("--noise", type=float, nargs="*", default=[5.0], metavar="DB")
    parser.add_argument("--quick", action="store_true", help="only the shortest recording: checks that everything runs")
    parser.add_argument("--formats", type=Path, metavar="FOLDER", help="where to keep the converted checkpoint")
    args = parser.parse_args()

    recordings = speech.read(args.manifest, set(args.languages.split(",")) if args.languages else None)
    if args.quick:
        recordings, args.noise = [min(recordings, key=lambda recording: recording.duration_s)], []
    recordings += [speech.noisy(recording, ratio) for ratio in args.noise for recording in recordings]
    names = [name for name in SYSTEMS if "batched" not in name and re.search(args.systems, name)]
    names = list(dict.fromkeys(["whisper_nnx", *names]))  # the reference for the others
    found: dict[str, Any] = {}
    versions = {}
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = prepare(args.checkpoint, args.formats or Path(scratch) / "formats", only=formats(names))
        groups = defaultdict(list)
        for recording in recordings:
            groups[recording.language].append(recording)
        ordered = [recording for group in groups.values() for recording in group]
        files = {
            language: save(Path(scratch) / f"{language}.npz", [recording.audio for recording in group])
            for language, group in groups.items()
        }
        spoken, languages = [r.text for r in ordered], [r.language for r in ordered]
        seconds = round(sum(r.duration_s for r in ordered))
        about = {"recordings": len(ordered), "audio_s": seconds, "noise_db": args.noise}
        exact: list[str] = []
        for name in names:
            with Worker(name, checkpoint) as worker:
                texts = [text for lang, file in files.items() for text in worker.run(file, Work(lang))["texts"]]
                versions[name] = worker.about["version"]
            exact = exact or texts
            differs = score(texts, exact, languages)
            different = sum(differs[kind] for kind in ("substitutions", "deletions", "insertions"))
            found[name] = score(texts, spoken, languages) | {"differs": different}
            print(name, found[name], file=sys.stderr, flush=True)
            write_result(args.result, args.checkpoint.name, versions, **about, precision=found)


if __name__ == "__main__":
    main()
