"""Which programs are compiled for which chips, and the table of their figures: JSON lines in `results/`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parent / "results" / "accelerators.compiled.jsonl"
CHIPS = ("v5e", "v6e", "h200")
SIZES = ("tiny", "base", "large-v3", "large-v3-turbo")
FIGURES = ("arguments_mb", "temporary_mb", "peak_mb", "gflop", "mb", "mcycles")
# Windows of a decoding step: on each chip what fits into its memory with large-v3; the smaller sizes have one number.
BATCHES = {"v5e": 16, "v6e": 64, "h200": 128}
SMALL_BATCH = 64
ENCODED = 16  # windows that are encoded together on accelerators
SCALED = {"v5e": (1, 2), "v6e": (1, 2), "h200": (2, 4)}  # layers; compiling for a TPU takes longer
_WORSE = 1.1


@dataclass(frozen=True)
class Row:
    """A program of a size on a chip, for a batch of windows.

    layers: 0 means all; two numbers: by their difference. cross: dtype of the audio keys and values, None: bfloat16.
    """

    chip: str
    size: str
    program: str
    batch: int
    layers: tuple[int, ...] = (0,)
    cross: str | None = None


CHECKED = (  # what CI compiles again
    Row("v5e", "base", "step", 64),
    Row("h200", "base", "step", 64),
    Row("v5e", "base", "advance beam", 16),
    Row("h200", "base", "encode", 16),
    Row("h200", "base", "beam", 16),
    Row("h200", "large-v3-turbo", "step", 128, cross="int8"),
)


def plan() -> Iterator[Row]:
    """The rows of the table."""
    for chip in CHIPS:
        for size in SIZES:
            is_large = size.startswith("large")
            batch = BATCHES[chip] if is_large else SMALL_BATCH
            for program in ("encode", "prompt", "step", "beam", "align", "begin", "advance", "advance beam"):
                windows = {"encode": ENCODED, "beam": batch // 4, "advance beam": batch // 4}.get(program, batch)
                whole = not is_large or (size == "large-v3-turbo" and program != "encode")
                row = Row(chip, size, program, windows, (0,) if whole else SCALED[chip])
                yield row
                if is_large and program in ("step", "beam"):
                    yield replace(row, cross="int8")
            if chip == "h200":  # whose attention reads what is written
                yield Row(chip, size, "move up", batch)
    yield Row("h200", "large-v3", "generate", 128)
    yield Row("h200", "large-v3", "generate beam", 32)


def read(table: Path = TABLE) -> dict[Row, dict[str, Any]]:
    """The rows of a table; of several for the same program, the last."""
    lines = table.read_text().splitlines() if table.exists() else []
    found = [json.loads(line) for line in lines]
    names = ("chip", "size", "program", "batch", "layers", "cross")
    return {Row(**{name: f[name] for name in names} | {"layers": tuple(f["layers"])}): f for f in found}


def worse(found: dict[str, float], expected: dict[str, Any]) -> list[str]:
    """Figures that are more than a tenth above those of the table, in words."""
    return [
        f"{name} is {value:.1f}, {100 * (value / expected[name] - 1):.0f} % above {expected[name]:.1f}"
        for name, value in found.items()
        if value > _WORSE * expected[name]
    ]
