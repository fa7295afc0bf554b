"""Special token ids of a checkpoint's vocabulary."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SpecialTokens:
    """Special token ids of a checkpoint's vocabulary; ids below `eot` are text.

    Timestamps are the ids `timestamp_begin` to `timestamp_end` inclusive, one per 20 ms. `sot_lm` and `no_speech`
    are None if the vocabulary lacks them. `languages` are (code, id) pairs in vocabulary order.
    """

    eot: int
    sot: int
    transcribe: int
    translate: int
    sot_lm: int | None
    sot_prev: int
    no_speech: int | None
    no_timestamps: int
    timestamp_begin: int
    timestamp_end: int
    languages: tuple[tuple[str, int], ...] = ()
