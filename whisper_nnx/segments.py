"""From the tokens of a window to timed segments, and to where the next window begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from whisper_nnx.config import SpecialTokens


@dataclass(frozen=True)
class TimedTokens:
    """Tokens that belong together; start and end in s from the window's begin."""

    start_s: float
    end_s: float
    tokens: tuple[int, ...]


def split_at_timestamps(
    tokens: Sequence[int], special: SpecialTokens, step_s: float, duration_s: float
) -> tuple[list[TimedTokens], int | None]:
    """(segments, timestamp steps from here to the next window's begin, or None: it begins where this window ends).

    Two timestamps side by side end one segment and begin the next; what follows the last such pair was cut off by the
    window's end and is heard again in the next window, unless a single timestamp closes it. step_s: s per timestamp
    step; duration_s: of the window's sound. Source: the reference's transcribe().
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
    """Nobody speaks after the last timestamp: it closes a segment and opens none."""
    is_time = [special.timestamp_begin <= token <= special.timestamp_end for token in tokens[-2:]]
    return is_time == [False, True]
