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
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (
    "README.md",
    "docs/numbers/speed.md",
    "docs/numbers/accuracy.md",
    "docs/numbers/accelerators.md",
    "docs/guides/clusters.md",
)
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


def bias(result: dict[str, Any]) -> str:
    """A row per sound and weight: errors on listed words and on the others."""
    rows = []
    for row in result["bias"]:
        name = f"`bias_weight={row['weight']:g}`" if row["weight"] else "without a list"
        cells = [
            f"{row[f'{kind}_errors']} ({percent(row[f'{kind}_errors'], row[kind])})" for kind in ("listed", "others")
        ]
        rows.append([row["sound"], name, *cells])
    words = result["bias"][0]
    header = ["recordings", "", f"errors on {words['listed']} listed words", f"on {words['others']} others"]
    return markdown(header, rows) + about(result)


def step_cost(result: dict[str, Any]) -> str:
    """A row per number of windows and option: milliseconds of a step of the loop, and how much the option adds."""
    rows, without = [], 0.0
    for name, ms in result["cost_ms"].items():
        windows, option = name.split(" rows, ")
        without = ms if option == "none" else without
        rows.append([windows, option, f"{ms:.2f}", "" if option == "none" else f"{100 * (ms / without - 1):+.0f} %"])
    return markdown(["windows", "", "ms a step", "more than without"], rows) + about(result)


def contexts(result: dict[str, Any]) -> str:
    """A row per context, a column of word errors per length of clips, with what a clip takes."""
    found = result["contexts"]
    clips = {row["length_s"]: row["clips"] for row in found}
    by_context: dict[int, dict[float, Any]] = defaultdict(dict)
    for row in found:
        by_context[row["audio_ctx"]][row["length_s"]] = row
    rows = []
    for context, own in sorted(by_context.items()):
        any_row = next(iter(own.values()))
        cells = [_context_cell(own[length_s]) if length_s in own else "" for length_s in clips]
        cost = f"{any_row['gflop']:.1f}", f"{any_row['cross_mb']:.1f}"
        rows.append([f"{context} ({context * 0.02:g} s)", *cells, *cost])
    header = ["audio_ctx", *(f"{number} clips of up to {length_s:g} s" for length_s, number in clips.items())]
    return markdown([*header, "encoder, GFLOP", "audio keys and values, MB"], rows) + about(result)


def _context_cell(row: dict[str, Any]) -> str:
    wrong = percent(errors(row) + row["loop_words"], row["spoken"])
    return f"{wrong}, {seconds(row['clip_s'])} s" if "clip_s" in row else wrong


def drafts(result: dict[str, Any]) -> str:
    """A row per draft: seconds for all recordings, and in how many the tokens are the same."""
    found = result["drafts"]
    plain, rows = sum(next(iter(found.values()))["s"].values()), []
    for number, (name, row) in enumerate(found.items()):
        same = f"{len(row['s']) - len(row['different'])} of {len(row['s'])}" if number else ""
        taken = sum(row["s"].values())
        rows.append([name, seconds(taken), f"{plain / taken:.2f}" if number else "", same])
    title = f"{result['audio_s']:g} s of speech, {result['tokens']} tokens"
    return markdown([title, "s", "without / with", "recordings with the same tokens"], rows) + about(result)


def jobs(result: dict[str, Any]) -> str:
    found = result["jobs"]
    speeds = found["speeds"]
    first = next(iter(speeds.values()))
    rows = [[name, f"{speed:.1f}", f"{speed / first:.2f}"] for name, speed in speeds.items()]
    title = f"{found['audio_s']:g} s of speech, in batches of {found['batch_size']}"
    return markdown([title, "audio s a second", "it / transcribe"], rows) + about(result)


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


def compiled(found: list[dict[str, Any]]) -> str:
    """A table per chip, with a row per program of each size."""

    def cells(row: dict[str, Any]) -> list[str]:
        layers = f", {row['layers'][0]} layers" if row["layers"][0] and len(row["layers"]) == 1 else ""
        memory = [f"{row[name]:,.0f}" for name in ("arguments_mb", "temporary_mb", "peak_mb")]
        cost = [f"{row['mb'] / 1e3:,.1f}", f"{row['gflop'] / 1e3:,.2f}"]
        cost += [f"{row['mcycles']:,.1f}"] if "mcycles" in row else []
        program = row["program"] + (f", {row['cross']} audio keys and values" if row["cross"] else "")
        return [row["size"] + layers, program, str(row["batch"]), *memory, *cost]

    text = []
    for chip in dict.fromkeys(row["chip"] for row in found):
        rows = [row for row in found if row["chip"] == chip]
        header = [f"{chip}", "program", "windows", "arguments, MB", "temporary, MB", "peak, MB", "traffic, GB", "TFLOP"]
        header += ["M cycles"] if "mcycles" in rows[0] else []
        made = "; ".join(
            dict.fromkeys(f"{row['compilers']}, {row['date']}" for row in rows if row["program"] == "encode")
        )
        text.append(f"{markdown(header, [cells(row) for row in rows])}\n{made}.\n")
    return "\n".join(text)


def estimate(result: dict[str, Any]) -> str:
    """A row per case: seconds and what bounds them at the data sheet's rates, and at a part of these with the parts."""

    def cells(row: dict[str, Any]) -> list[str]:
        sheet, reached = row["sheet"], row["reached"]
        about = [f"{row['hours']}", f"{row['batch']}{' x 5 beams' if row['beam'] else ''}", f"{8 * row['cross_bytes']}"]
        about += ["yes" if row["refilled"] else "no", f"{row['files']}", f"{row['steps']:,}"]
        parts = [f"{part} {seconds(s)}" for part, s in reached["parts"].items()]
        both = [f"{seconds(found['s'])} ({found['times']:,} x)" for found in (sheet, reached)]
        name = f"{row['size']}, {row['chip']}" + (f", {row['faster']:g} times the tokens" if row["faster"] != 1 else "")
        return [name, *about, *both, ", ".join(parts), reached["bound"]]

    host, (memory, matrix) = result["host"], result["reached"]
    header = ["", "hours", "rows", "bits of cross-attention", "refilled", "files an hour", "steps"]
    header += ["s, all of the sheet's rates", f"s, {memory:.0%} of the memory's, {matrix:.0%} of the matrix rate"]
    header += ["of these", "bound by"]
    assumed = (
        f"\nOf the host: {host['processes']} processes that decode an hour of MP3 in {host['decoding_s']:g} s each, "
        f"{host['program_ms']:g} ms a program, {host['window_ms']:g} ms a window.\n"
    )
    windows = f"\nTokens drawn from {result['versions']['windows']}; {result['date']}.\n"
    return markdown(header, [cells(row) for row in result["estimates"]]) + assumed + windows


def cost(result: dict[str, Any]) -> str:
    """Device hours for a million hours of audio: of estimates, or of measured batches of clips."""
    if "estimates" not in result:
        [(piece, found)] = [(name, found) for name, found in result["timings"].items() if name.startswith("clips")]
        times = {name: found["audio_s"] / row["s"] for name, row in found["systems"].items() if name.startswith(_OURS)}
        rows = [[name, f"{x:.1f}", f"{1e6 / x:,.0f}"] for name, x in times.items()]
        header = [f"{result['checkpoint']}, {piece}", "hours of audio an hour", "machine hours"]
        return markdown(header, rows) + f"\nmeasured, {result['date']}, {result['machine']}.\n"
    rows = []
    for row in result["estimates"]:
        if row["hours"] == 100 and row["refilled"] and not row["beam"]:
            times = row["reached"]["times"]
            name = f"{row['size']}, {row['chip']}, {8 * row['cross_bytes']} bits of cross-attention"
            cores = times * result["host"]["decoding_s"] / 3600
            rows.append([name, f"{times:,}", f"{1e6 / times:,.0f}", f"{cores:.1f}"])
    return markdown(["compiled, not measured", "hours of audio an hour", "device hours", "cores"], rows)


def reading(result: dict[str, Any]) -> str:
    """Hours of audio an hour, by file and by way of reading it."""
    files = result["reading"]
    header = ["hours of audio an hour", *(f"{one['file']} ({one['about']})" for one in files)]
    rows = [[name, *(f"{one['rates'][name]:,.0f}" for one in files)] for name in files[0]["rates"]]
    return markdown(header, rows) + about(result)


KINDS: dict[str, Callable[[Any], str]] = {
    "timings": timings,
    "summary": summary,
    "cold_start": cold_start,
    "precision": precision,
    "nonspeech": nonspeech,
    "contexts": contexts,
    "drafts": drafts,
    "jobs": jobs,
    "reading": reading,
    "bias": bias,
    "bias_cost": step_cost,
    "grammar_cost": step_cost,
    "ngram_cost": step_cost,
    "serving": serving,
    "compiled": compiled,
    "estimate": estimate,
    "cost": cost,
}
_FILES = {"summary": ("timings",), "cost": ("timings", "estimate")}  # kinds that are another form of these


def table(name: str, results: Path = RESULTS) -> str:
    """Returns the table of a name: "base.timings", or "base.summary" of the same file."""
    checkpoint, kind = name.rsplit(".", 1)
    paths = [results / f"{checkpoint}.{file}.json" for file in _FILES.get(kind, (kind,))]
    path = next((path for path in paths if path.exists()), paths[0])
    lines = path.with_suffix(".jsonl")
    if lines.exists():
        return KINDS[kind]([json.loads(line) for line in lines.read_text().splitlines()])
    return KINDS[kind](json.loads(path.read_text())) if path.exists() else _NOT_RUN


def filled(text: str, results: Path = RESULTS) -> str:
    """Returns a document with updated tables."""
    return _MARK.sub(lambda mark: f"{mark[1]}{table(mark[2], results)}{mark[3]}", text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="report outdated documents without changing them")
    args = parser.parse_args(argv)
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
