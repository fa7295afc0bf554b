"""What a recording must meet, be it an array or a file."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

SAMPLE_RATE = 16_000
_RATES = range(1_000, 1_000_001)  # Hz; at 1 Hz, a few bytes would become hours
_LOUD = 10  # times full scale: floats beyond are integers that were not scaled
_TOO_LOUD = 1e10  # times full scale: no integers are so large, and a spectrum's power has to fit in float32


class AudioError(ValueError):
    """A recording that cannot be used; the message is one line: what is wrong, then what to do."""


def check_rate(rate: Any, name: str) -> int:
    """Hz; floats from a library that has them are taken where they are whole."""
    whole = isinstance(rate, int | np.integer) or (isinstance(rate, float | np.floating) and float(rate).is_integer())
    if isinstance(rate, bool) or not whole or int(rate) not in _RATES:
        raise AudioError(f"{name}: sampling_rate={rate!r} must be a whole number of Hz, 1,000 to 1,000,000")
    return int(rate)


def check_duration(duration_s: float, max_s: float, name: str) -> None:
    if duration_s > max_s:
        raise AudioError(f"{name} lasts longer than max_hours={max_s / 3600:g}; set max_hours higher, or cut it")


def check_samples(samples: np.ndarray, name: str, first: int = 0) -> float:
    """Floats [..., N], the first of which has the index `first` -> their peak."""
    peak = float(max(samples.max(), -samples.min()))  # NaN where a sample is
    if not peak < _TOO_LOUD:
        *channel, at = np.argwhere(~(np.abs(samples) < _TOO_LOUD))[0]
        value, where = samples[*channel, at], ", ".join(map(str, [*channel, at + first]))
        fix = "scale it to [-1, 1]" if np.isfinite(value) else "replace what is not finite"
        raise AudioError(f"sample {where} of {name} is {value}; {fix}")
    return peak


def warn_if_loud(peak: float, name: str, stacklevel: int) -> None:
    if peak > _LOUD:
        message = f"{name} reaches {peak:.0f}, but floats are taken to be in [-1, 1]; scale it"
        warnings.warn(message, stacklevel=stacklevel + 1)
