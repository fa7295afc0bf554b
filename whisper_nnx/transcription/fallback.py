"""The temperature ladder: a window whose text fails a threshold is decoded again, at the next temperature."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from whisper_nnx.decoding.options import DecodingOptions, whole_number
from whisper_nnx.runtime.options import explained, option

if TYPE_CHECKING:
    from whisper_nnx.transcription.attempts import DecodingResult


ENTROPY_TOKENS = 32  # a number of whisper.cpp

_option = partial(option, scope="window", group="decoding")
_threshold = partial(option, scope="window", group="retries of a window")


@explained
@dataclass(frozen=True)
class FallbackOptions:
    """The temperatures to try in turn, and when an attempt fails (paper, section 4.5). None switches a threshold off.

    An attempt that looped (see `DecodingOptions.max_repeats`) has failed.
    """

    temperatures: tuple[float, ...] = field(
        default=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
        metadata=_option(
            "0 takes the most probable tokens; above 0, they are sampled",
            name="temperature",
            accepts="float | Sequence[float]",
            kind="number",
            on_command=0.0,
            more="One, or several to try in turn.",
        ),
    )
    best_of: int | None = field(
        default=None,
        metadata=_option(
            "samples of which the best is kept, at temperatures above 0", kind="whole or none", on_command=5
        ),
    )
    beam_size: int | None = field(
        default=None,
        metadata=_option(
            "beams of the search, at temperature 0; None decodes greedily", kind="whole or none", on_command=5
        ),
    )
    patience: float | None = field(
        default=None,
        metadata=_option(
            "finished beams to wait for, times beam_size (default: 1.0)", more="At temperature 0. arXiv:2204.05424."
        ),
    )
    n_best: int = field(
        default=1,
        metadata=_option(
            "candidates of each window to keep in the JSON, at most beam_size or best_of",
            kind="some",
            evaluate=False,
            more="Attempts with fewer beams or samples keep what they have.",
        ),
    )
    compression_ratio_threshold: float | None = field(
        default=2.4, metadata=_threshold("retry if the text compresses better than this: it repeats itself")
    )
    logprob_threshold: float | None = field(
        default=-1.0, metadata=_threshold("retry if the average log-probability of the tokens is lower")
    )
    entropy_threshold: float | None = field(
        default=None,
        metadata=_threshold(
            "retry if the entropy of the last 32 tokens is lower: they repeat each other (whisper.cpp: 2.4)",
            more="In nats, of how often each token occurs among them, timestamps included; texts of up to 32 tokens "
            "pass. whisper.cpp's entropy_thold.",
        ),
    )
    no_speech_threshold: float | None = field(
        default=0.6,
        metadata=_threshold("improbable text counts as silence if the probability of no speech is higher"),
    )

    def __post_init__(self):
        given = self.temperatures
        ladder = [given] if isinstance(given, int | float) else given
        object.__setattr__(self, "temperatures", tuple(map(float, ladder)))
        object.__setattr__(self, "n_best", whole_number("n_best", self.n_best, 1))
        if not self.temperatures:
            raise ValueError("temperature=() names no temperature; give at least one, for example 0.0")
        for temperature in self.temperatures:
            self.options_at(temperature, DecodingOptions())  # raises before work starts
        if self.n_best > max(map(self._candidates, self.temperatures)):
            raise ValueError(
                f"n_best={self.n_best} needs beam_size (temperature 0) or best_of (above) of at least {self.n_best}, "
                f"got {self.beam_size} and {self.best_of} for temperature={self.temperatures}"
            )

    def _candidates(self, temperature: float) -> int:
        return (self.best_of if temperature > 0 else self.beam_size) or 1

    def options_at(self, temperature: float, options: DecodingOptions) -> DecodingOptions:
        common: dict[str, Any] = {"temperature": temperature, "n_best": min(self.n_best, self._candidates(temperature))}
        if temperature > 0:
            return replace(options, **common, best_of=self.best_of)
        return replace(options, **common, beam_size=self.beam_size, patience=self.patience)

    def is_improbable(self, result: DecodingResult) -> bool:
        return self.logprob_threshold is not None and result.avg_logprob < self.logprob_threshold

    def failed_threshold(self, result: DecodingResult) -> str | None:
        """Why to try again: "compression_ratio" or "entropy" (it repeats itself), "logprob" (improbable), or None.

        Improbable text is accepted if there is no speech.
        """
        threshold = self.compression_ratio_threshold
        repeats = result.looped or (threshold is not None and result.compression_ratio > threshold)
        monotonous = self.entropy_threshold is not None and last_entropy(result.tokens) < self.entropy_threshold
        silent = self.no_speech_threshold is not None and result.no_speech_prob > self.no_speech_threshold
        improbable = self.is_improbable(result)
        if silent and improbable:
            return None
        return "compression_ratio" if repeats else "entropy" if monotonous else "logprob" if improbable else None

    def is_silence(self, result: DecodingResult) -> bool:
        """The window has no speech, and its text is not probable enough to contradict that."""
        if self.no_speech_threshold is None or not result.no_speech_prob > self.no_speech_threshold:
            return False
        return self.logprob_threshold is None or not result.avg_logprob > self.logprob_threshold


def last_entropy(tokens: Sequence[int]) -> float:
    """Entropy in nats of the distribution of the last 32 tokens, as in whisper.cpp; infinite for up to 32 tokens."""
    if len(tokens) <= ENTROPY_TOKENS:
        return math.inf
    shares = [n / ENTROPY_TOKENS for n in Counter(tokens[-ENTROPY_TOKENS:]).values()]
    return -sum(p * math.log(p) for p in shares)


def temperature_ladder(first: float, increment: float | None) -> tuple[float, ...]:
    """Temperatures from `first` to 1, exactly those of the reference."""
    import numpy as np

    steps = [] if increment is None or not math.isfinite(first) else np.arange(first, 1.0 + 1e-6, increment).tolist()
    return tuple(steps) or (first,)
