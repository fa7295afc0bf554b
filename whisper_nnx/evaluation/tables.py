"""An evaluation as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from unicodedata import east_asian_width

from whisper_nnx.evaluation.results import Evaluation, Scores
from whisper_nnx.text.tokenizer import UNSPACED

Table = list[list[str]]  # of cells, the first row being headings

_HEADINGS = ("recordings", "words", "WER %", "subst.", "deleted", "inserted", "CER %")
_TIME_HEADINGS = (
    "words",
    "matched",
    *(f"{end} {of}" for end in ("starts:", "ends:") for of in ("median", "mean", "90 %")),
)


def to_table(evaluation: Evaluation, n_worst: int = 20) -> str:
    """By language, by source, of the n_worst files, and what no table says, in sentences."""
    tables = list(group_tables(evaluation))
    if shown := [(row.name, row.scores) for row in evaluation.ranked()[:n_worst]]:
        n_all = len(evaluation.done)
        title = "file, worst first" if len(shown) == n_all else f"the worst {len(shown)} of {n_all} files"
        tables.append(error_table(title, shown))
    return "\n".join([*map(aligned, tables), "".join(f"{line}\n" for line in remarks(evaluation))])


def group_tables(evaluation: Evaluation) -> Iterator[Table]:
    """Errors by language and by source; word times by language, in s. What the manifest does not tell is left out."""
    total = [("all", evaluation.total)]
    languages = [*evaluation.by_language().items(), *total]
    yield error_table("language", languages)
    if any(row.source for row in evaluation.done):
        sources = [(label or "(none)", scores) for label, scores in evaluation.by_source().items()]
        yield error_table("source", [*sources, *total])
    if evaluation.total.times.words:
        timed = [(label, scores) for label, scores in languages if scores.times.words]
        yield [["word times, s off", *_TIME_HEADINGS], *([label, *_time_cells(scores)] for label, scores in timed)]


def error_table(title: str, groups: Sequence[tuple[str, Scores]]) -> Table:
    """A row for each group; with a column for the languages found, if any had to be."""
    guessed = any(scores.guessed for _, scores in groups)
    rows = [[title, *_HEADINGS, *(["language found"] if guessed else [])]]
    for label, scores in groups:
        words = scores.rates.words
        counts = map(str, (words.substitutions, words.deletions, words.insertions))
        rates = percent(scores.rates.wer), *counts, percent(scores.rates.cer)
        found = [f"{scores.guessed_right} of {scores.guessed}" if scores.guessed else "-"] if guessed else []
        rows.append([label, str(scores.recordings), str(words.length), *rates, *found])
    return rows


def _time_cells(scores: Scores) -> list[str]:
    times = scores.times
    cells = [str(times.words), str(len(times.starts))]
    for spread in (times.spread("starts"), times.spread("ends")):
        cells += [f"{value:.3f}" for value in spread.values()] if spread else ["-"] * 3
    return cells


def percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.2f}"


def remarks(evaluation: Evaluation) -> list[str]:
    """Sentences."""
    total = evaluation.total
    lines = [
        f"{total.audio_s:.1f} s of audio took {evaluation.wall_s:.1f} s, of which {evaluation.compile_s:.1f} s went to "
        f"compilation; without that it is {evaluation.speed:.1f} times faster than real time."
    ]
    if unspaced := sorted({str(row.written_language) for row in evaluation.done} & UNSPACED):
        lines.append(f"Written without spaces, so that each character counts as a word: {', '.join(unspaced)}.")
    if total.silent:
        lines.append(f"Recordings without speech: {total.silent}; of these, with invented text: {total.invented}.")
    if evaluation.failed:
        lines.append(f"Recordings that could not be transcribed, and count nowhere: {len(evaluation.failed)}.")
    return lines


def aligned(table: Table) -> str:
    """Columns side by side, the first to the left and the others to the right, with a rule under the headings."""
    widths = [max(map(_width, column)) for column in zip(*table, strict=True)]

    def line(row: Sequence[str]) -> str:
        first, *pads = (" " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True))
        return "  ".join([row[0] + first, *(pad + cell for pad, cell in zip(pads, row[1:], strict=True))])

    head, *body = map(line, table)
    return "".join(f"{text.rstrip()}\n" for text in (head, "-" * _width(head), *body))


def _width(text: str) -> int:
    """Columns of a terminal that it takes."""
    return sum(2 if east_asian_width(letter) in "WF" else 1 for letter in text)
