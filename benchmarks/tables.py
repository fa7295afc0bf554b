"""Writes tables from the JSON files in benchmarks/results into the documents.

    python benchmarks/tables.py [--check]

A table is between `<!-- table NAME -->` and `<!-- end -->`, where NAME is that of its file: `base.timings` for
benchmarks/results/base.timings.json, of which `base.summary` is the short form. --check changes nothing and exits with
1 if a document is not up to date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = ("README.md", "docs/numbers/speed.md", "docs/numbers/accuracy.md")
_MARK = re.compile(r"(<!-- table ([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_OURS = "whisper_nnx"
_NOT_RUN = "(not measured)\n"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def about(result: dict[str, Any]) -> str:
    """Formats date, machine and versions."""
    families: dict[str, str] = {}
    for name, version in result["versions"].items():
        families.setdefault(name.split(",")[0], version)
    versions = "; ".join(f"{name} {version}" for name, version in families.items())
    return f"\n{result['checkpoint']}, {result['date']}, {result['machine']}{versions and '; ' + versions}.\n"


def errors(row: dict[str, Any]) -> int:
    return row["substitutions"] + row["deletions"] + row["insertions"]


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def seconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def timings(result: dict[str, Any]) -> str:
    """A row per system and task: seconds, ours / its, words, errors, memory."""
    text = []
    for piece, found in result["timings"].items():
        rows, ours = [], found["systems"].get(_OURS)
        for name, row in found["systems"].items():
            ratio = f"{ours['s'] / row['s']:.2f}" if ours and name != _OURS else ""
            wrong = percent(errors(row) + row["loop_words"], row["spoken"]) if "words" in row else ""
            written = [f"{row['words']}", wrong] if wrong else []
            cells = [name, seconds(row["s"]), ratio, *written, f"{row['mb']}", seconds(row["first_s"])]
            rows.append(cells)
        spoken = next((row["spoken"] for row in found["systems"].values() if "spoken" in row), None)
        columns = [f"words of {spoken}", "word errors"] if spoken else []
        title = f"{piece}, {found['audio_s']:g} s"
        text.append(markdown([title, "s", "ours / it", *columns, "peak MB", "first run, s"], rows))
    return "\n".join(text) + about(result)


def summary(result: dict[str, Any]) -> str:
    """A row per system: seconds for a window, speed relative to real time for the long recording, errors."""
    found = result["timings"]
    pieces = [name for name in found if name == "one window" or name.startswith(("sequential", "clips", "cut by VAD"))]
    header = [f"{name}{', s' if name == 'one window' else ', x real time'}" for name in pieces]
    rows = []
    for name in result["versions"]:
        cells, wrong = [], ""
        for piece in pieces:
            row = found[piece]["systems"].get(name)
            if row is None:
                cells.append("")
            elif piece == "one window":
                cells.append(seconds(row["s"]))
            else:
                cells.append(f"{found[piece]['audio_s'] / row['s']:.0f}")
            if row and not wrong and piece != "one window":
                wrong = percent(errors(row) + row["loop_words"], row["spoken"])
        rows.append([name, *cells, wrong])
    return markdown(["", *header, "word errors"], rows) + about(result)


def cold_start(result: dict[str, Any]) -> str:
    ours = result["cold_start"][_OURS]
    rows = [
        [
            name,
            seconds(row["first_line_s"]),
            f"{ours['first_line_s'] / row['first_line_s']:.2f}" if name != _OURS else "",
            seconds(row["end_s"]),
            seconds(row["cold_s"]),
        ]
        for name, row in result["cold_start"].items()
    ]
    header = [
        f"process, {result['audio_s']:g} s of speech",
        "first line, s",
        "ours / it",
        "end, s",
        "very first start, s",
    ]
    return markdown(header, rows) + about(result)


def precision(result: dict[str, Any]) -> str:
    rows = []
    for name, row in result["precision"].items():
        kinds = f"{row['substitutions']}, {row['deletions']}, {row['insertions']}"
        loops = f"{row['loop_words']} ({row['loops']})" if row["loops"] else "0"
        differs = percent(row["differs"], row["words"]) if name != _OURS else ""
        rows.append([name, percent(errors(row), row["spoken"]), kinds, loops, f"{row['words']}", differs])
    spoken = next(iter(result["precision"].values()))["spoken"]
    header = ["", "word errors", "substituted, missing, invented", "words in loops (recordings)"]
    header += [f"words of {spoken}", "differ from ours in float32"]
    return markdown(header, rows) + about(result)


def nonspeech(result: dict[str, Any]) -> str:
    """Words per hour, with a row per kind of audio."""
    found, per_hour = result["nonspeech"], 60 / result["minutes"]
    sounds = list(next(iter(found.values())))
    rows = [[sound, *(f"{row[sound]['words'] * per_hour:.0f}" for row in found.values())] for sound in sounds]
    return markdown(["words an hour", *found], rows) + about(result)


def serving(result: dict[str, Any]) -> str:
    """A row per server under the same load, and our batches offline; then a short request beside a long one."""

    def both(pair: list[float] | None) -> str:
        return " / ".join(map(seconds, pair or []))

    def cells(name: str, row: dict[str, Any]) -> list[str]:
        counts = [str(row.get(key, "")) for key in ("requests", "errors")]
        speeds = [f"{row['audio_s_per_s']:.1f}", f"{row['words_per_s']:.1f}"]
        memory = ", ".join(map(str, row.get("memory_mb") or []))
        return [name, *speeds, *counts, both(row.get("latency_s")), both(row.get("first_text_s")), memory]

    header = ["", "audio s a second", "words a second", "requests", "errors"]
    header += ["latency, s (median / 95 %)", "first text, s", "MB at each minute"]
    rows = [cells("whisper_nnx, a list offline", result["offline"])]
    rows += [cells(name, result[name]) for name in (_OURS, "faster-whisper") if name in result]
    beside = result["beside"]
    short = (
        f"\nA request of 3 s takes {seconds(beside['alone_s'])} s alone; beside a long recording (median / at worst) "
        f"{both(beside['beside_windows_s'])} s window by window, {both(beside['beside_pieces_s'])} s in VAD's pieces.\n"
    )
    load = f"\n{result['clients']} clients for {result['minutes']:g} minutes.\n"
    return markdown(header, rows) + short + load + about(result)


KINDS: dict[str, Callable[[dict[str, Any]], str]] = {
    "timings": timings,
    "summary": summary,
    "cold_start": cold_start,
    "precision": precision,
    "nonspeech": nonspeech,
    "serving": serving,
}


def table(name: str, results: Path = RESULTS) -> str:
    """Returns the table of a name: "base.timings", or "base.summary" of the same file."""
    checkpoint, kind = name.rsplit(".", 1)
    path = results / f"{checkpoint}.{'timings' if kind == 'summary' else kind}.json"
    return KINDS[kind](json.loads(path.read_text())) if path.exists() else _NOT_RUN


def filled(text: str, results: Path = RESULTS) -> str:
    """Returns a document with updated tables."""
    return _MARK.sub(lambda mark: f"{mark[1]}{table(mark[2], results)}{mark[3]}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="report outdated documents without changing them")
    args = parser.parse_args()
    outdated = []
    for name in DOCUMENTS:
        text = (ROOT / name).read_text()
        if (new := filled(text)) != text:
            outdated.append(name)
            if not args.check:
                (ROOT / name).write_text(new)
    if outdated:
        print(f"{'outdated' if args.check else 'written'}: {', '.join(outdated)}", file=sys.stderr)
    return int(bool(outdated) and args.check)


if __name__ == "__main__":
    sys.exit(main())
