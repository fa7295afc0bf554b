"""From the tokens of a window to timed segments, and to the start of the next window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from whisper_nnx.output.results import Segment, TokenDetails, Word
from whisper_nnx.text.special_tokens import SpecialTokens

_INSTANT_S = 0.005  # all times are multiples of 10 ms or more: what is shorter has no length


@dataclass(frozen=True)
class TimedTokens:
    """Tokens that belong together; start and end in s from the window's start."""

    start_s: float
    end_s: float
    tokens: tuple[int, ...]


def split_at_timestamps(
    tokens: Sequence[int], special: SpecialTokens, step_s: float, duration_s: float
) -> tuple[list[TimedTokens], int | None]:
    """(segments, timestamp steps from here to the next window's start, or None: it starts where this window ends).

    Two consecutive timestamps end one segment and start the next; what follows the last such pair was cut off by the
    window's end and is decoded again in the next window, unless a single timestamp closes it. step_s: s per timestamp
    step; duration_s: of the window's audio. Source: the reference's transcribe().
    """
    is_time = [special.timestamp_begin <= token <= special.timestamp_end for token in tokens]
    steps = [token - special.timestamp_begin if time else None for token, time in zip(tokens, is_time, strict=True)]
    cuts = [i for i in range(1, len(tokens)) if is_time[i - 1] and is_time[i]]
    if not cuts:
        last = next((step for step in reversed(steps) if step is not None), None)
        return [TimedTokens(0.0, last * step_s if last else duration_s, tuple(tokens))], None

    if closed := ends_in_single_timestamp(tokens, special):
        cuts.append(len(tokens))
    # Where a given prefix stands in for the first timestamp, the segment starts with the window.
    segments = [
        TimedTokens((steps[a] or 0) * step_s, (steps[b - 1] or 0) * step_s, tuple(tokens[a:b]))
        for a, b in zip([0, *cuts], cuts, strict=False)
    ]
    return segments, None if closed else steps[cuts[-1] - 1]


def ends_in_single_timestamp(tokens: Sequence[int], special: SpecialTokens) -> bool:
    """Nothing is spoken after the last timestamp: it closes a segment and opens none."""
    is_time = [special.timestamp_begin <= token <= special.timestamp_end for token in tokens[-2:]]
    return is_time == [False, True]


def place_segments(segments: Sequence[Segment], start_s: float, end_s: float) -> list[Segment]:
    """The segments of a window, changed in place: in order, from start_s to end_s, none without text or length.

    Segments that have no text or no length are dropped; the reference leaves them in its list, emptied. Its times may
    also overlap or exceed the audio: here they are moved to the end of the previous segment, or to end_s. A segment
    left without length joins the previous one, or the next one if it is the first: no text is lost.
    """
    placed: list[Segment] = []
    for segment in segments:
        if segment["start"] == segment["end"] or not segment["text"].strip():
            continue
        _fit([segment], placed[-1]["end"] if placed else start_s, end_s)
        _fit(segment.get("token_details", []), start_s, end_s, ordered=False)
        if placed and (_is_instant(placed[-1]) or _is_instant(segment)):
            _join(placed[-1], segment)
        else:
            placed.append(segment)
    if placed and _is_instant(placed[0]):  # then it is the only one
        placed[0].update({"start": start_s, "end": end_s})
    _fit([word for segment in placed for word in segment.get("words", [])], start_s, end_s)
    return placed


def _fit(
    spans: Sequence[Segment] | Sequence[Word] | Sequence[TokenDetails],
    start_s: float,
    end_s: float,
    ordered: bool = True,
) -> None:
    """Moves spans between start_s and end_s and, if they are ordered, none before the end of the one before it."""
    for span in spans:
        span["start"] = min(max(span["start"], start_s), end_s)
        span["end"] = min(max(span["end"], span["start"]), end_s)
        if ordered:
            start_s = span["end"]


def _is_instant(segment: Segment) -> bool:
    return segment["end"] - segment["start"] < _INSTANT_S


def _join(segment: Segment, following: Segment) -> None:
    segment["end"] = following["end"]
    segment["text"] += following["text"]
    segment["tokens"] += following["tokens"]
    if "words" in segment:
        segment["words"] += following.get("words", [])
    if "token_details" in segment:
        segment["token_details"] += following.get("token_details", [])
    if "speaker_turn" in following:
        segment["speaker_turn"] = following["speaker_turn"]
