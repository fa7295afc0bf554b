"""Checks that apply to recordings from arrays and files."""

from __future__ import annotations

from typing import Any

import numpy as np

from whisper_nnx.audio.background import warn

_RATES = range(1_000, 1_000_001)  # Hz; at 1 Hz, a few bytes would last hours
_LOUD = 10  # times full scale; larger floats are integers that were not scaled
_TOO_LOUD = 1e10  # times full scale; beyond any integer, and the power spectrum must fit in float32


class AudioError(ValueError):
    """The recording cannot be used; the message is one line with the fault and the fix."""


def check_rate(rate: Any, name: str) -> int:
    """Validates a sampling rate in Hz; accepts whole floats."""
    whole = isinstance(rate, int | np.integer) or (isinstance(rate, float | np.floating) and float(rate).is_integer())
    if isinstance(rate, bool) or not whole or int(rate) not in _RATES:
        raise AudioError(f"{name}: sampling_rate={rate!r} must be a whole number of Hz, 1,000 to 1,000,000")
    return int(rate)


def check_duration(duration_s: float, max_s: float, name: str) -> None:
    if duration_s > max_s:
        raise AudioError(f"{name} is longer than max_hours={max_s / 3600:g}; increase max_hours or split the recording")


def check_samples(samples: np.ndarray, name: str, first: int = 0) -> float:
    """Returns the peak of floats [..., N]; AudioError for invalid values, counting samples from `first`."""
    peak = float(max(samples.max(), -samples.min()))  # NaN if any sample is
    if not peak < _TOO_LOUD:
        *channel, at = np.argwhere(~(np.abs(samples) < _TOO_LOUD))[0]
        value, where = samples[*channel, at], ", ".join(map(str, [*channel, at + first]))
        fix = "scale it to [-1, 1]" if np.isfinite(value) else "replace non-finite values"
        raise AudioError(f"sample {where} of {name} is {value}; {fix}")
    return peak


def warn_if_loud(peak: float, name: str, stacklevel: int) -> None:
    if peak > _LOUD:
        message = f"{name} reaches {peak:.0f}, but floats must be in [-1, 1]; scale it"
        warn(message, stacklevel=stacklevel + 1)
