"""Plots transcripts: words over the waveform or mel, probabilities, alignment matrix and path.

Needs matplotlib (`pip install "whisper-nnx[plot]"`). Each function draws into `ax`, or into a new figure that is not
registered with pyplot, and returns the axes: `plot_words(...).figure.savefig("words.png")`. In a notebook, after
`%matplotlib inline`, `plot_words(...).figure` shows it.
"""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from whisper_nnx.audio.features import N_FFT, POSITIONS_PER_SECOND, mel_filters
from whisper_nnx.audio.loading import FRAMES_PER_SECOND, SAMPLE_RATE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from whisper_nnx.alignment.window import Alignment


PROBABILITY_COLORS = "RdYlBu"  # 0 is red, 1 is blue; safe for color-blind readers
INK, FAINT = "#3a4a5a", "#9aa5b1"
FONT_SIZE = 9
COLUMNS = 2000  # of a waveform; more than the pixels of a screen
LABEL_ROOM = 0.55  # largest share of the axes' height
LAST_RESORT = "Last Resort"  # matplotlib's font with a box for every character


class Timed(NamedTuple):
    """A word, segment or token to draw; times in s."""

    text: str
    start: float
    end: float
    probability: float


def timed(spans: Any) -> list[Timed]:
    """Extracts a transcript's words, or its segments if it has no words, or a list of words, segments or tokens.

    The probability of segments and tokens is computed from their log-probability. Items without text or without times
    (words not found in the audio) are skipped. Raises ValueError for anything else.
    """
    if isinstance(spans, Mapping) and "segments" in spans:
        segments = spans["segments"]
        return timed([word for segment in segments for word in segment.get("words", ())] or segments)

    try:
        return [item for item in map(_timed, spans) if item.text and item.start is not None]
    except (KeyError, TypeError):
        given = textwrap.shorten(repr(spans), 60)
        raise ValueError(f"{given} is not a transcript; give one, or a list of its words, segments or tokens") from None


def _timed(item: Mapping[str, Any]) -> Timed:
    text = item["word"] if "word" in item else item["text"]
    probability = item.get("probability")
    if probability is None:
        probability = math.exp(item["logprob"] if "logprob" in item else item["avg_logprob"])
    return Timed(text.strip(), item["start"], item["end"], probability)


def plot_words(samples: Any, spans: Any, ax: Axes | None = None, *, span_s: tuple[float, float] | None = None) -> Axes:
    """Plots a waveform and its words, each at its time and colored by its probability.

    Args:
      samples: [N], 16 kHz.
      spans: a transcript, or a list of words, segments or tokens.
      ax: the axes to draw into, by default of a new figure.
      span_s: the part to show, (start, end) in s. Labels that do not fit are dropped; for long recordings use
        `plot_transcript`.

    Raises:
      ValueError: spans is not a transcript, or span_s is empty.
    """
    samples = np.asarray(samples)
    start_s, end_s = span_s or (0.0, len(samples) / SAMPLE_RATE)
    if not 0 <= start_s < end_s:
        raise ValueError(f"span_s={span_s} of {len(samples)} samples must be (start, end) in s with start before end")
    ax = ax or _figure(12, 2).add_subplot()
    first = round(start_s * SAMPLE_RATE)
    part = samples[first : round(end_s * SAMPLE_RATE)]
    columns = np.array_split(part, min(COLUMNS, len(part))) if len(part) else []
    edges = np.array([[column.min(), column.max()] for column in columns]).reshape(-1, 2)
    times = (first + np.cumsum([0, *map(len, columns)])[:-1]) / SAMPLE_RATE
    loudest = np.abs(samples).max(initial=0) or 1.0
    ax.fill_between(times, *(edges.T / loudest), color=INK, linewidth=0.6)
    ax.set(xlim=(start_s, end_s), yticks=[], xlabel="time (s)")
    _frame(ax)
    _draw(ax, timed(spans), -1.05, 1.05, shade=True)
    return ax


def plot_mel(mel: Any, spans: Any = (), ax: Axes | None = None, *, start_s: float = 0.0) -> Axes:
    """Plots a log-mel spectrogram [M,T] that starts at start_s (s), with words as in `plot_words`."""
    mel = np.asarray(mel, np.float32)
    if mel.ndim != 2:
        raise ValueError(f"mel has shape {mel.shape}, expected [M,T]; select one row of a batch")
    ax = ax or _figure(12, 3).add_subplot()
    n_mels, end_s = len(mel), start_s + mel.shape[1] / FRAMES_PER_SECOND
    ax.imshow(mel, cmap="magma", origin="lower", aspect="auto", extent=(start_s, end_s, 0, n_mels))
    filters = mel_filters(n_mels)
    centers_khz = filters @ np.linspace(0, SAMPLE_RATE / 2000, N_FFT // 2 + 1) / np.maximum(filters.sum(1), 1e-9)
    ticks_khz = [khz for khz in (0.5, 1, 2, 4) if khz < centers_khz[-1]]
    ax.set_yticks(np.interp(ticks_khz, centers_khz, np.arange(n_mels) + 0.5), [f"{khz:g} kHz" for khz in ticks_khz])
    ax.set(xlim=(start_s, end_s), xlabel="time (s)")
    _frame(ax)
    _draw(ax, timed(spans), 0, n_mels, shade=False)
    return ax


def plot_transcript(samples: Any, spans: Any, *, seconds_per_row: float = 10.0) -> Figure:
    """Plots a whole recording, samples [N] at 16 kHz, in rows like those of `plot_words`."""
    from matplotlib.cm import ScalarMappable

    if not seconds_per_row > 0:
        raise ValueError(f"seconds_per_row={seconds_per_row} must be above 0")
    samples = np.asarray(samples)
    starts = np.arange(max(1, math.ceil(len(samples) / SAMPLE_RATE / seconds_per_row))) * seconds_per_row
    figure = _figure(12, 1.5 * len(starts) + 0.6)
    rows = figure.subplots(len(starts), squeeze=False)[:, 0]
    for ax, start_s in zip(rows, starts, strict=True):
        plot_words(samples, spans, ax, span_s=(start_s, start_s + seconds_per_row))
        ax.set_xlabel("")
    rows[-1].set_xlabel("time (s)")
    scale = ScalarMappable(cmap=PROBABILITY_COLORS)
    scale.set_clim(0, 1)
    figure.colorbar(scale, ax=list(rows), location="bottom", label="probability", shrink=0.25, aspect=40, pad=0.01)
    return figure


def plot_probabilities(spans: Any, ax: Axes | None = None) -> Axes:
    """Plots a bar per word of a transcript, or per item of a list of words, segments or tokens: its probability."""
    items = timed(spans)
    ax = ax or _figure(max(3, 0.17 * len(items) + 0.8), 2.4).add_subplot()
    probabilities = [item.probability for item in items]
    ax.bar(range(len(items)), probabilities, color=_colors(probabilities), edgecolor=INK, linewidth=0.4, width=0.85)
    ax.set(xlim=(-0.6, max(len(items), 1) - 0.4), ylim=(0, 1), ylabel="probability")
    every = _every(len(items), ax, "width")
    labels = [_literal(item.text) for item in items[::every]]
    place: dict[str, Any] = {"rotation": 90, "size": FONT_SIZE, "family": _family(labels)}
    ax.set_xticks(range(0, len(items), every), labels, **place)
    ax.tick_params(axis="x", length=0)
    _frame(ax)
    return ax


def plot_alignment(alignment: Alignment, ax: Axes | None = None) -> Axes:
    """Plots the alignment matrix, tokens [N+1] by time, and the path through it.

    Each token's label is colored by its probability.
    """
    n_rows, n_positions = alignment.matrix.shape
    ax = ax or _figure(12, max(2.0, 0.18 * n_rows + 0.7)).add_subplot()
    start_s, end_s = alignment.start_s, alignment.start_s + n_positions / POSITIONS_PER_SECOND
    low, high = np.nanpercentile(alignment.matrix, [1, 99.5])
    place: dict[str, Any] = {"aspect": "auto", "extent": (start_s, end_s, n_rows - 0.5, -0.5)}
    ax.imshow(alignment.matrix, cmap="magma", vmin=low, vmax=high, interpolation="nearest", **place)
    rows, positions = alignment.path.T
    ax.plot(start_s + (positions + 0.5) / POSITIONS_PER_SECOND, rows, color="#7fdfff", linewidth=1.2)
    ax.set_xlabel("time (s)")
    every = _every(n_rows, ax, "height")
    labels = [_literal(label.strip() or "␣") for label in alignment.labels[::every]]
    ax.set_yticks(range(0, n_rows, every), labels, size=FONT_SIZE, family=_family(labels))
    for label, color in zip(ax.get_yticklabels(), _colors(alignment.probabilities[::every]), strict=False):
        label.set_bbox({"facecolor": color, "alpha": 0.5, "edgecolor": "none", "pad": 1})
    ax.tick_params(axis="y", length=0, pad=5)
    _frame(ax)
    return ax


def _figure(width: float, height: float) -> Figure:
    """Makes a figure of this size in inches, not registered with pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # otherwise measuring each label would create a canvas
    return figure


def _frame(ax: Axes) -> None:
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(labelsize=FONT_SIZE)


def _colors(probabilities: Iterable[float]) -> np.ndarray:
    """Maps probabilities [N] to RGBA colors [N,4]."""
    from matplotlib import colormaps

    return colormaps[PROBABILITY_COLORS](np.asarray(list(probabilities), float))


def _every(n: int, ax: Axes, side: str) -> int:
    """Returns k such that every k-th of n labels along "width" or "height" fits."""
    if (figure := ax.get_figure(root=True)) is not None:
        figure.draw_without_rendering()  # computes the axes' size
    return max(1, math.ceil(n * _line_pixels(ax) / getattr(ax.get_window_extent(), side)))


def _line_pixels(ax: Axes) -> float:
    return 1.3 * FONT_SIZE / 72 * ax.figure.dpi


def _draw(ax: Axes, items: list[Timed], bottom: float, top: float, shade: bool) -> None:
    """Draws a bar per item above the plot between bottom and top, and labels above in lanes without overlap.

    shade: also colors the plot below; otherwise thin lines mark starts and ends.
    """
    left_s, right_s = ax.get_xlim()
    items = [item for item in items if item.start < right_s and item.end > left_s]
    height, line, bar = ax.get_window_extent().height, _line_pixels(ax), 0.5 * _line_pixels(ax)
    lanes = _lanes(
        ax, [item for item in items if left_s <= (item.start + item.end) / 2 < right_s], int(LABEL_ROOM * height / line)
    )
    n_lanes = 1 + max((lane for lane, *_ in lanes), default=0)
    pixel = (top - bottom) / max(height - n_lanes * line - bar, 0.2 * height)
    ax.set_ylim(bottom, top + (n_lanes * line + bar) * pixel)
    if not items:
        return
    xranges, colors = (
        [(item.start, item.end - item.start) for item in items],
        _colors(item.probability for item in items),
    )
    ax.broken_barh(xranges, (top, bar * pixel), facecolors=colors, edgecolors=FAINT, linewidth=0.5, label="words")
    if shade:
        ax.broken_barh(xranges, (bottom, top - bottom), facecolors=colors, alpha=0.35, linewidth=0, zorder=0)
    else:
        ax.vlines([t for i in items for t in (i.start, i.end)], bottom, top, color="white", alpha=0.5, linewidth=0.6)
    for lane, text, middle_s in lanes:
        y = top + (bar + (lane + 0.5) * line) * pixel
        text.set_y(y)
        if lane:
            ax.plot([middle_s, middle_s], [top + bar * pixel, y], color=FAINT, linewidth=0.6, zorder=1)


def _lanes(ax: Axes, items: list[Timed], n_lanes: int) -> list[tuple[int, Any, float]]:
    """Draws the labels that fit; returns (lane from the bottom, label, middle of its item in s) of each."""
    left_s, right_s = ax.get_xlim()
    extent, family = ax.get_window_extent(), _family(item.text for item in items)
    seconds = (right_s - left_s) / extent.width  # per pixel
    place: dict[str, Any] = {
        "ha": "center",
        "va": "center",
        "size": FONT_SIZE,
        "family": family,
        "color": "#1b2530",
        "clip_on": True,
    }
    ends: list[float] = []  # of the last label in each lane
    found = []
    for item in sorted(items, key=lambda item: item.start):
        middle_s = (item.start + item.end) / 2
        text = ax.text(middle_s, 0, _literal(item.text), gid="label", zorder=3, **place)
        half = text.get_window_extent().width / 2 * seconds
        x = min(max(middle_s, left_s + half), right_s - half)
        lane = next((i for i, end in enumerate(ends) if end <= x - half), len(ends))
        if lane >= max(1, n_lanes):
            text.remove()
            continue
        ends[lane : lane + 1] = [x + half + 3 * seconds]
        text.set_x(x)
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.5})
        found.append((lane, text, middle_s))
    return found


def _literal(text: str) -> str:
    """Escapes dollar signs, which matplotlib would read as mathematics."""
    return text.replace("$", r"\$")


def _family(texts: Iterable[str]) -> list[str]:
    """Returns installed fonts that together cover all characters of the texts, matplotlib's default first.

    Warns about characters that no font has.
    """
    from matplotlib import font_manager as fonts

    default = fonts.FontProperties()
    missing = {ord(letter) for text in texts for letter in text if letter.isprintable()} - _letters(
        fonts.findfont(default)
    )
    family = list(default.get_family())

    def preference(font: Any) -> tuple:
        return LAST_RESORT in font.name, font.style != "normal", font.weight not in (400, "normal"), font.name

    for font in sorted(fonts.fontManager.ttflist, key=preference) if missing else ():
        if LAST_RESORT in font.name or not missing:
            break
        if found := missing & _letters(font.fname):
            family.append(font.name)
            missing -= found
    if missing:
        letters = "".join(sorted(map(chr, missing))[:10])
        warnings.warn(f"no installed font has {letters!r}; install one such as Noto Sans", stacklevel=4)
        family += [font.name for font in fonts.fontManager.ttflist if LAST_RESORT in font.name]
    return family


@cache
def _letters(path: str) -> frozenset[int]:
    """Returns a font's code points."""
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(path).get_charmap())
