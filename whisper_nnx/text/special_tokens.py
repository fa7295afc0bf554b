"""The ids with a meaning of their own, as a checkpoint's vocabulary has them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SpecialTokens:
    """The ids with a meaning of their own, as a checkpoint's vocabulary has them; ids up to `eot` are text.

    Timestamps are the ids `timestamp_begin` to `timestamp_end`, both included, one per 20 ms. `sot_lm` and `no_speech`
    are None where the vocabulary lacks them. `languages` are (code, id) pairs in the vocabulary's order.
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
