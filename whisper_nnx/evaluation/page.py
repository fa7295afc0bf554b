"""An evaluation as one HTML file, which needs nothing else: figures, tables, and the worst errors word by word."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from whisper_nnx.evaluation.error_rates import Pair
from whisper_nnx.evaluation.results import Evaluation, RowResult
from whisper_nnx.evaluation.tables import Table, error_table, group_tables, percent, remarks

_SHOWN_ITEMS = 20

STYLE = """
:root { color-scheme: light dark; --ink: #1b2530; --faint: #66727f; --line: #d8dde3; --paper: #fff;
  --sub: #fff0c2; --del: #ffd9d6; --ins: #d3ecff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --faint: #98a3ae; --line: #3a434d; --paper: #15191d;
  --sub: #574711; --del: #622824; --ins: #12466b; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 72rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .3rem; overflow-wrap: anywhere; }
.figures { display: flex; flex-wrap: wrap; gap: 2rem; } .figures b { display: block; font-size: 1.7rem; }
.scroll { overflow-x: auto; margin: 1.4rem 0; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, .about td { text-align: left; } th { color: var(--faint); font-weight: 500; }
.faint { color: var(--faint); } .words { line-height: 1.35; }
.pair { display: inline-flex; flex-direction: column; vertical-align: top; margin: 0 .22em .4em 0;
  padding: 0 .2em; border-radius: 3px; min-height: 2.7em; }
.dense .pair { margin-right: 0; padding: 0 .05em; }
.pair > :empty::before { content: "\\00a0"; }
.substitute { background: var(--sub); } .delete { background: var(--del); } .insert { background: var(--ins); }
.substitute s, .delete s { text-decoration-thickness: 1px; }
"""
LEGEND = (
    ("substitute", "reference", "written", "substituted"),
    ("delete", "reference", "", "deleted"),
    ("insert", "", "written", "inserted"),
)


def to_html(evaluation: Evaluation, n_worst: int = 50) -> str:
    """The whole page; texts that come from outside are escaped."""
    worst = evaluation.worst(n_worst)
    parts = [
        _figures(evaluation),
        *(f"<p>{escape(line)}</p>" for line in remarks(evaluation)),
        *map(_table, group_tables(evaluation)),
        *_failures(evaluation.failed),
        f"<h2>The worst errors: {len(worst)} of {len(evaluation.worst())} recordings that have any</h2>",
        '<p class="words">' + "".join(_pair(Pair(*pair)) + f" {name} &emsp;" for *pair, name in LEGEND) + "</p>",
        *map(_errors, worst),
        "<h2>All files</h2>",
        _table(error_table("file", [(row.name, row.scores) for row in evaluation.done])),
        *_about(evaluation.about),
    ]
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Evaluation</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
    )
    return "\n".join([head, "<body><h1>Evaluation</h1>", *parts, "</body></html>", ""])


def _figures(evaluation: Evaluation) -> str:
    total = evaluation.total
    figures = {
        "word error rate": f"{percent(total.rates.wer)} %",
        "character error rate": f"{percent(total.rates.cer)} %",
        "recordings": str(total.recordings),
        "words": str(total.rates.words.length),
        "times faster than real time": f"{evaluation.speed:.1f}",
    }
    if total.guessed:
        figures["languages found"] = f"{percent(total.guessed_right / total.guessed)} %"
    inside = "".join(f"<div><b>{escape(value)}</b>{escape(name)}</div>" for name, value in figures.items())
    return f'<div class="figures">{inside}</div>'


def _table(table: Table) -> str:
    head, *rows = table
    body = "".join(_row("td", row) for row in rows)
    return f'<div class="scroll"><table><thead>{_row("th", head)}</thead><tbody>{body}</tbody></table></div>'


def _row(tag: str, texts: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts) + "</tr>"


def _failures(failed: Sequence[RowResult]) -> list[str]:
    if not failed:
        return []
    lines = "".join(f"<li>{escape(row.name)}: {escape(row.error or '')}</li>" for row in failed)
    return ["<h2>Not transcribed</h2>", f"<ul>{lines}</ul>"]


def _errors(row: RowResult) -> str:
    words = row.scores.rates.words
    counts = f"{words.substitutions} substituted, {words.deletions} deleted, {words.insertions} inserted"
    rate = f"WER {percent(words.rate)} %" if words.length else "no speech"
    dense = " dense" if all(len(pair.reference) < 2 and len(pair.hypothesis) < 2 for pair in row.pairs) else ""
    return (
        f'<h3>{escape(row.name)} <span class="faint">{escape(row.language_label)}: {rate}; {counts}</span></h3>'
        f'<p class="words{dense}" dir="auto">{"".join(map(_pair, row.pairs))}</p>'
    )


def _pair(pair: Pair) -> str:
    """Above the reference, below the hypothesis in its place, once where they are equal."""
    if pair.kind == "equal":
        return f'<span class="pair"><span>{escape(pair.reference)}</span></span>'
    reference = f"<s>{escape(pair.reference)}</s>" if pair.reference else "<span></span>"
    return f'<span class="pair {escape(pair.kind)}">{reference}<span>{escape(pair.hypothesis)}</span></span>'


def _shortened(value: Any) -> str:
    """A long list by its first items; report.json has them all."""
    if not isinstance(value, list) or len(value) <= _SHOWN_ITEMS:
        return str(value)
    return f"{'; '.join(map(str, value[:_SHOWN_ITEMS]))}; and {len(value) - _SHOWN_ITEMS:,} more, in report.json"


def _about(about: Mapping[str, Any]) -> list[str]:
    if not about:
        return []
    rows = "".join(_row("td", [name, _shortened(value)]) for name, value in about.items())
    return ["<h2>How it was made</h2>", f'<div class="scroll"><table class="about">{rows}</table></div>']
