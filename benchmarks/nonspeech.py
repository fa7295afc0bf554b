"""Measures hallucinations: words per hour on audio without speech.

    python benchmarks/nonspeech.py CHECKPOINT --pauses RECORDING ... --result benchmarks/results/NAME.nonspeech.json

The sounds of nonspeech_sounds.py, among them the pauses of recordings; each system with its own defaults (but the given
language), then also with its voice activity filter, and ours with `hallucination="calm"`. The script ends with an error
if that writes a word.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.checkpoints import prepare
from benchmarks.nonspeech_sounds import speechless
from benchmarks.scoring import write_result
from benchmarks.systems import Work, formats, is_able
from benchmarks.worker import Worker, save

NAMES = ("whisper_nnx", "openai-whisper", "faster-whisper")
CALM = "calm"
WAYS = {
    "defaults": Work(defaults=True),
    "vad_filter": Work(defaults=True, vad=True),
    CALM: Work(defaults=True, calm=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="in any format")
    parser.add_argument("--pauses", type=Path, nargs="*", default=[], help="recordings with NAME.words.json")
    parser.add_argument("--result", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--systems", default="", metavar="PATTERN")
    parser.add_argument("--minutes", type=float, default=5, help="of each kind of audio")
    parser.add_argument("--quick", action="store_true", help="half a minute of each: checks that everything runs")
    parser.add_argument("--formats", type=Path, metavar="FOLDER", help="where to keep the converted checkpoint")
    args = parser.parse_args()
    minutes = 0.5 if args.quick else args.minutes
    signals = speechless(60 * minutes, args.pauses)
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
    calm = [row for name, rows in found.items() if name.endswith(CALM) for row in rows.values()]
    if any(row["words"] for row in calm):
        sys.exit(f"{CALM} wrote {sum(row['words'] for row in calm)} words without speech")


if __name__ == "__main__":
    main()
