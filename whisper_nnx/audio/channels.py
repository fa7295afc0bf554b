"""Finds the speaker in stereo recordings with one speaker per channel: the louder channel, as in whisper.cpp."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from whisper_nnx.audio.loading import SAMPLE_RATE, AudioError, load_channels

_LOUDER = 1.1  # times the other channel; a smaller ratio is undecided


def load_stereo(source: Any, sampling_rate: float | None = None, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns the samples [N] of `load_audio`, whose options it takes, and its two channels [2, N].

    Raises AudioError if the recording does not have two channels.
    """
    samples, channels = load_channels(source, sampling_rate, **options)
    if len(channels) != 2:
        count = f"{len(channels)} channel{'s' if len(channels) > 1 else ''}"
        raise AudioError(f"the recording has {count}, but diarize compares 2; give a stereo recording or drop diarize")
    return samples, channels


def speakers(stereo: np.ndarray, spans: Iterable[tuple[float, float]]) -> list[str]:
    """Returns the louder channel in each span, "0" or "1", or "?" if undecided.

    stereo: [2, N] at 16 kHz. spans: (start, end) in s. Loudness is the sum of magnitudes; the louder channel must
    exceed the other by a factor of 1.1.
    """
    labels = []
    for start_s, end_s in spans:
        within = slice(*(max(0, round(time_s * SAMPLE_RATE)) for time_s in (start_s, end_s)))
        left, right = np.abs(stereo[:, within]).sum(axis=1, dtype=np.float64)
        labels.append("0" if left > _LOUDER * right else "1" if right > _LOUDER * left else "?")
    return labels
