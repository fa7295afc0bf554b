"""Records metrics of a run: metrics.jsonl, TensorBoard scalars, curves.png."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from whisper_nnx.output.writers import write_whole

FILE, CURVES, TENSORBOARD = "metrics.jsonl", "curves.png", "tensorboard"
# The panels of curves.png: title, series, whether the axis is logarithmic.
_PANELS = (
    ("loss", ("loss", "cross_entropy", "ctc", "guide", "kl"), True),
    ("word error rate", ("wer", "cer"), False),
    ("accuracy of the next token", ("accuracy",), False),
    ("learning rate", ("learning_rate",), False),
    ("gradient norm", ("gradient_norm",), True),
)


class Metrics:
    """Context manager for a run's records in the folder `output`; records after the first `keep` are removed.

    A record is {"step": ..., name: number, ...}; evaluations have records of their own.
    """

    def __init__(self, output: Path, keep: int = 0):
        output.mkdir(parents=True, exist_ok=True)
        self.output = output
        self.records = read_records(output / FILE)[:keep]
        text = "".join(json.dumps(record) + "\n" for record in self.records)
        write_whole(output / FILE, text)
        self._file = (output / FILE).open("a", encoding="utf-8")
        # TensorBoard ignores what a killed run wrote from this step on. A writer truncates a file of the same name.
        first = self.records[-1]["step"] + 1 if self.records else 0
        self._board = SummaryWriter(str(output / TENSORBOARD), purge_step=first, filename_suffix=f".{first:09}")

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()
        self._board.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a record and flushes it to the file."""
        record = {"step": step, **values}
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def plot(self) -> None:
        """Plots all records in curves.png."""
        write_whole(self.output / CURVES, draw_curves(self.records))
        self._board.flush()


class Mean:
    """Accumulates means of values until they are taken."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self.count = 0

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._sums[name] += value
        self.count += 1

    def take(self) -> dict[str, float]:
        means = {name: total / self.count for name, total in self._sums.items()}
        self._clear()
        return means


def read_records(file: Path) -> list[dict[str, Any]]:
    """Reads a metrics file, skipping a truncated last line of a killed run; [] if there is no file."""
    records = []
    for line in file.read_text("utf-8").splitlines() if file.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def draw_curves(records: Sequence[Mapping[str, float]]) -> bytes:
    """Plots records over steps, one panel per kind of value; returns a PNG."""
    from io import BytesIO

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for record in records:
        for name, value in record.items():
            series[name].append((record["step"], value))
    panels = [
        (title, [name for name in names if any(y for _, y in series[name])], log) for title, names, log in _PANELS
    ]
    panels = [panel for panel in panels if panel[1]]
    height = 2.2 * max(1, len(panels))  # inches
    figure = Figure(figsize=(8, height))
    FigureCanvasAgg(figure)
    figure.subplots_adjust(0.09, 0.5 / height, 0.98, 1 - 0.35 / height, hspace=0.35)
    axes = figure.subplots(max(1, len(panels)), squeeze=False, sharex=True)[:, 0]
    for ax, (title, names, log) in zip(axes, panels, strict=False):
        for name in names:
            ax.plot(*zip(*series[name], strict=True), label=name, marker="." if len(series[name]) < 30 else "")
        ax.set(title=title, yscale="log" if log else "linear")
        if not log:
            ax.ticklabel_format(axis="y", scilimits=(-3, 4))
        ax.grid(alpha=0.3)
        if len(names) > 1:
            ax.legend()
    axes[-1].set_xlabel("step")
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    return picture.getvalue()
