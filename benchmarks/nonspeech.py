"""Measures hallucinations: words per hour on audio without speech.

    python benchmarks/nonspeech.py CHECKPOINT --noise_only RECORDING --result benchmarks/results/NAME.nonspeech.json

Silence, noise, hum, chords with a melody, clicks, and a recording of noise; each system with its own defaults (but the
given language), then also with its voice activity filter.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import speech
from benchmarks.checkpoints import prepare
from benchmarks.scoring import write_result
from benchmarks.systems import Work, formats, is_able
from benchmarks.worker import Worker, save

NAMES = ("whisper_nnx", "openai-whisper", "faster-whisper")
WAYS = {"defaults": Work(defaults=True), "vad_filter": Work(defaults=True, vad=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="in any format")
    parser.add_argument("--noise_only", type=Path, help="a recording without speech")
    parser.add_argument("--result", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--systems", default="", metavar="PATTERN")
    parser.add_argument("--minutes", type=float, default=5, help="of each kind of audio")
    parser.add_argument("--quick", action="store_true", help="half a minute of each: checks that everything runs")
    parser.add_argument("--formats", type=Path, metavar="FOLDER", help="where to keep the converted checkpoint")
    args = parser.parse_args()
    minutes = 0.5 if args.quick else args.minutes
    signals = speech.speechless(60 * minutes, args.noise_only)
    names = [name for name in NAMES if re.search(args.systems, name)]
    found: dict[str, Any] = {}
    versions = {}
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = prepare(args.checkpoint, args.formats or Path(scratch) / "formats", only=formats(names))
        files = {name: save(Path(scratch) / f"{name}.npz", [signal]) for name, signal in signals.items()}
        for name in names:
            with Worker(name, checkpoint) as worker:
                versions[name] = worker.about["version"]
                for way, work in ((way, work) for way, work in WAYS.items() if is_able(name, work)):
                    rows = {}
                    for kind, file in files.items():
                        text = worker.run(file, work)["texts"][0]
                        rows[kind] = {"words": len(re.findall(r"\w+", text)), "begins": text.strip()[:60]}
                        print(name, way, kind, rows[kind], file=sys.stderr, flush=True)
                    found[f"{name}, {way}"] = rows
                    write_result(args.result, args.checkpoint.name, versions, minutes=minutes, nonspeech=found)


if __name__ == "__main__":
    main()
