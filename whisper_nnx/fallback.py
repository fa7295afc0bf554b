"""The temperature ladder: a window whose text fails a threshold is decoded again, at the next temperature."""

from __future__ import annotations

from dataclasses import dataclass, replace

from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.windows import DecodingResult


@dataclass(frozen=True)
class FallbackOptions:
    """temperatures to try in turn, and what makes a try fail; None switches a threshold off. Paper, section 4.5.

    beam_size and patience hold for temperature 0, best_of for those above.
    """

    temperatures: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    beam_size: int | None = None
    patience: float | None = None
    best_of: int | None = None
    compression_ratio_threshold: float | None = 2.4
    logprob_threshold: float | None = -1.0
    no_speech_threshold: float | None = 0.6

    def __post_init__(self):
        if not self.temperatures:
            raise ValueError("temperature=() names no temperature; give at least one, for example 0.0")
        for temperature in self.temperatures:
            self.options_at(temperature, DecodingOptions())  # what cannot be done is said before work begins

    def options_at(self, temperature: float, options: DecodingOptions) -> DecodingOptions:
        if temperature > 0:
            return replace(options, temperature=temperature, best_of=self.best_of)
        return replace(options, temperature=temperature, beam_size=self.beam_size, patience=self.patience)

    def is_improbable(self, result: DecodingResult) -> bool:
        return self.logprob_threshold is not None and result.avg_logprob < self.logprob_threshold

    def needs_another_try(self, result: DecodingResult) -> bool:
        """It repeats itself or is improbable, unless it is improbable because nobody speaks."""
        repeats = (
            self.compression_ratio_threshold is not None and result.compression_ratio > self.compression_ratio_threshold
        )
        silent = self.no_speech_threshold is not None and result.no_speech_prob > self.no_speech_threshold
        improbable = self.is_improbable(result)
        return (repeats or improbable) and not (silent and improbable)

    def is_silence(self, result: DecodingResult) -> bool:
        """Nobody speaks in the window, and what was decoded is not probable enough to say otherwise."""
        if self.no_speech_threshold is None or not result.no_speech_prob > self.no_speech_threshold:
            return False
        return self.logprob_threshold is None or not result.avg_logprob > self.logprob_threshold
