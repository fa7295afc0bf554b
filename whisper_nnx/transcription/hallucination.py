"""Detects hallucinated words and where to resume after silence.

Source: `hallucination_silence_threshold` of the reference's transcribe(), whose results these equal.
"""

from __future__ import annotations

from collections.abc import Sequence

from whisper_nnx.audio.loading import FRAMES_PER_SECOND
from whisper_nnx.output.results import Segment, Word
from whisper_nnx.timing.words import APPENDED, PREPENDED


def last_end_s(segments: Sequence[Segment]) -> float | None:
    """The end of the last word, or where there are no words of the last segment."""
    words = [word for segment in segments for word in segment["words"]]
    if words:
        return words[-1]["end"]
    return segments[-1]["end"] if segments else None


def _strangeness(word: Word) -> float:
    """Invented words are improbable, very short or very long."""
    duration_s = word["end"] - word["start"]
    improbable = 1.0 if word["probability"] < 0.15 else 0.0
    return improbable + 15 * max(0.0, 0.133 - duration_s) + max(0.0, duration_s - 2.0)


def is_anomaly(segment: Segment | None) -> bool:
    """Most of the first eight words are strange."""
    if segment is None or not segment["words"]:
        return False
    words = [word for word in segment["words"] if word["word"] not in PREPENDED + APPENDED][:8]
    score = sum(map(_strangeness, words))
    return score >= 3 or score + 0.01 >= len(words)


def _first_with_words(segments: Sequence[Segment]) -> Segment | None:
    return next((segment for segment in segments if segment["words"]), None)


def leading_silence_s(segments: Sequence[Segment], offset_s: float, threshold_s: float) -> float | None:
    """The silence before an anomalous first segment if it is long: the window should start after it."""
    first = _first_with_words(segments)
    if first is None or not is_anomaly(first) or not first["start"] - offset_s > threshold_s:
        return None
    return first["start"] - offset_s


def find_hallucination(
    segments: Sequence[Segment],
    start_frame: int,
    n_frames: int,
    window_frames: int,
    last_speech_s: float,
    threshold_s: float,
) -> int | None:
    """The first anomalous segment with silence, or more anomalies, on both sides; None where there is none.

    start_frame: the window's start; n_frames: of its audio, of window_frames; last_speech_s: where speech ended before.
    """
    offset_s = start_frame / FRAMES_PER_SECOND
    window_end_s = (start_frame + window_frames) / FRAMES_PER_SECOND
    for i, segment in enumerate(segments):
        if not segment["words"]:
            continue
        if is_anomaly(segment):
            following = _first_with_words(segments[i + 1 :])
            next_start_s = following["words"][0]["start"] if following else offset_s + n_frames / FRAMES_PER_SECOND
            silence_before = (
                segment["start"] - last_speech_s > threshold_s
                or segment["start"] < threshold_s
                or segment["start"] - offset_s < 2.0
            )
            silence_after = (
                next_start_s - segment["end"] > threshold_s
                or is_anomaly(following)
                or window_end_s - segment["end"] < 2.0
            )
            if silence_before and silence_after:
                return i
        last_speech_s = segment["end"]
    return None
