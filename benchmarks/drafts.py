"""Times greedy decoding with drafts beside that without one, and compares every token.

    python benchmarks/drafts.py CHECKPOINT RECORDING ... --draft DRAFT --result benchmarks/results/NAME.drafts.json

Recordings are transcribed one by one, in any language, at temperature 0: first without a draft, then by n-grams and by
each draft (`examples/distil_draft.py` makes one), in turn. The first round only compiles. The script ends with an error
where a draft changes a token.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.scoring import write_result
from benchmarks.systems import GREEDY, SAMPLE_RATE

PLAIN = "without a draft"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="in any format")
    parser.add_argument("audio", type=Path, nargs="+")
    parser.add_argument("--draft", type=Path, nargs="*", default=[], help="checkpoints with the same vocabulary")
    parser.add_argument("--result", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--repeats", type=int, default=3, help="of which the fastest counts")
    args = parser.parse_args()

    import jax

    import whisper_nnx

    model = whisper_nnx.load_model(str(args.checkpoint))
    drafts = {PLAIN: None, "n-grams": "ngram"} | {path.name: whisper_nnx.load_model(str(path)) for path in args.draft}
    recordings = {path.name: whisper_nnx.load_audio(str(path)) for path in args.audio}
    rows: dict[str, dict[str, Any]] = {name: {"s": {}, "different": []} for name in drafts}
    tokens: dict[str, list[int]] = {}
    for turn in range(args.repeats + 1):
        for recording, audio in recordings.items():
            for name, draft in drafts.items():
                start = time.perf_counter()
                found = whisper_nnx.transcribe(model, audio, draft=draft, **GREEDY)
                taken = time.perf_counter() - start
                own = [token for segment in found["segments"] for token in segment["tokens"]]
                if name == PLAIN:
                    tokens[recording] = own
                elif own != tokens[recording] and recording not in rows[name]["different"]:
                    rows[name]["different"].append(recording)
                if turn:
                    rows[name]["s"][recording] = min(taken, rows[name]["s"].get(recording, float("inf")))
    for row in rows.values():
        row["s"] = {recording: round(s, 3) for recording, s in row["s"].items()}
    about = {"audio_s": round(sum(map(len, recordings.values())) / SAMPLE_RATE, 1)}
    about |= {"tokens": sum(map(len, tokens.values()))}
    versions = {"whisper_nnx": f"{whisper_nnx.__version__}, jax {jax.__version__}"}
    write_result(args.result, args.checkpoint.name, versions, **about, drafts=rows)
    if changed := {name: row["different"] for name, row in rows.items() if row["different"]}:
        sys.exit(f"tokens differ from those without a draft: {changed}")


if __name__ == "__main__":
    main()
