"""`DecodingOptions`: how one 30 s window is decoded; fields and meaning are those of openai-whisper."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

TASKS = ("transcribe", "translate", "lang_id")


@dataclass(frozen=True)
class DecodingOptions:
    """All that may be asked of a window; validated, hashable.

    task: "transcribe", "translate" (to English), or "lang_id" (only the language is told).
    language: a code; None detects it.
    temperature: 0 takes the most probable token, more samples from softmax(logits / temperature).
    sample_len: how many tokens to sample at most; None means half the context.
    best_of: independent samples of which the most probable is kept; needs a temperature above 0.
    beam_size, patience (arXiv:2204.05424): beam search; needs temperature 0.
    length_penalty: alpha of arXiv:1609.08144 (0 to 1) for ranking; None divides by the length.
    prompt: text or ids of what was said before; prefix: text or ids that the transcript begins with.
    suppress_tokens: ids (or "1,2,3") never to sample; -1 stands for the tokenizer's non-speech tokens. Those that
        are no part of a transcript (task, start, previous text) are suppressed in any case, also with None or nothing.
    suppress_blank: the first token may be neither a space nor the end.
    without_timestamps: text alone; max_initial_timestamp: the latest first timestamp in s, None for no limit.

    Raises ValueError, with the value and the way out, for what cannot be done.
    """

    task: str = "transcribe"
    language: str | None = None
    temperature: float = 0.0
    sample_len: int | None = None
    best_of: int | None = None
    beam_size: int | None = None
    patience: float | None = None
    length_penalty: float | None = None
    prompt: str | tuple[int, ...] | None = None
    prefix: str | tuple[int, ...] | None = None
    suppress_tokens: str | tuple[int, ...] | None = "-1"
    suppress_blank: bool = True
    without_timestamps: bool = False
    max_initial_timestamp: float | None = 1.0

    def __post_init__(self):
        for name in ("prompt", "prefix", "suppress_tokens"):
            value = getattr(self, name)
            if isinstance(value, Iterable) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(int(i) for i in value))
        object.__setattr__(self, "suppress_tokens", _parse_ids(self.suppress_tokens))
        self._validate()

    def _validate(self):
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} is not one of {', '.join(TASKS)}")
        for name in ("sample_len", "best_of", "beam_size"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool | str) or not math.isfinite(value) or value != int(value) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1, or None")
            object.__setattr__(self, name, int(value))
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature={self.temperature} must be 0 or more, and finite")
        if self.beam_size is not None and self.best_of is not None:
            raise ValueError(f"beam_size={self.beam_size} and best_of={self.best_of} exclude each other; drop one")
        if self.beam_size is not None and self.temperature > 0:
            raise ValueError(
                f"beam_size={self.beam_size} needs temperature 0, got {self.temperature}; drop one of them"
            )
        if self.best_of is not None and self.temperature == 0:
            raise ValueError(f"best_of={self.best_of} needs a temperature above 0: at 0 all samples are the same")
        if self.patience is not None and self.beam_size is None:
            raise ValueError(f"patience={self.patience} belongs to beam search; give beam_size too")
        if self.patience is not None and not (self.patience > 0 and math.isfinite(self.patience)):
            raise ValueError(f"patience={self.patience} must be above 0, and finite")
        if self.beam_size is not None and self.max_candidates < 1:
            raise ValueError(f"patience={self.patience} with beam_size={self.beam_size} keeps no candidate; raise it")
        if self.length_penalty is not None and not 0 <= self.length_penalty <= 1:
            raise ValueError(f"length_penalty={self.length_penalty} must lie between 0 and 1, or be None")
        if self.max_initial_timestamp is not None and not self.max_initial_timestamp >= 0:
            raise ValueError(f"max_initial_timestamp={self.max_initial_timestamp} must be 0 s or more, or None")

    @property
    def max_candidates(self) -> int:
        """How many ended sequences finish a beam search."""
        return round((self.beam_size or 1) * (1.0 if self.patience is None else self.patience))


def _parse_ids(ids: str | tuple[int, ...] | None) -> tuple[int, ...]:
    if not isinstance(ids, str):
        return ids or ()
    try:
        return tuple(int(part) for part in ids.split(",") if part.strip())
    except ValueError:
        raise ValueError(
            f"suppress_tokens={ids!r} must be ids with commas between them, as in '-1' or '220,50257'"
        ) from None
