"""The temperature ladder: a window whose text fails a threshold is decoded again, at the next temperature."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from whisper_nnx.decoding.options import DecodingOptions, whole_number

if TYPE_CHECKING:
    from whisper_nnx.transcription.windows import DecodingResult


@dataclass(frozen=True)
class FallbackOptions:
    """The temperatures to try in turn, and when an attempt fails (paper, section 4.5). None switches a threshold off.

    An attempt that looped (see `DecodingOptions.max_repeats`) has failed.

    Attributes:
      temperatures: in `transcribe` the option is `temperature`: one, or several.
      beam_size: at temperature 0.
      patience: at temperature 0.
      best_of: at temperatures above 0.
      compression_ratio_threshold: text that compresses better fails: it repeats itself.
      logprob_threshold: a lower average log-probability fails.
      no_speech_threshold: an improbable window with a higher probability of no speech is silence.
      n_best: candidates to keep; attempts with fewer beams or samples keep what they have.
    """

    temperatures: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    beam_size: int | None = None
    patience: float | None = None
    best_of: int | None = None
    compression_ratio_threshold: float | None = 2.4
    logprob_threshold: float | None = -1.0
    no_speech_threshold: float | None = 0.6
    n_best: int = 1

    def __post_init__(self):
        if not self.temperatures:
            raise ValueError("temperature=() names no temperature; give at least one, for example 0.0")
        whole_number("n_best", self.n_best, 1)
        for temperature in self.temperatures:
            self.options_at(temperature, DecodingOptions())  # what cannot be done is said before work begins
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

    def needs_another_try(self, result: DecodingResult) -> bool:
        """It repeats itself or is improbable, unless it is improbable because nobody speaks."""
        threshold = self.compression_ratio_threshold
        repeats = result.looped or (threshold is not None and result.compression_ratio > threshold)
        silent = self.no_speech_threshold is not None and result.no_speech_prob > self.no_speech_threshold
        improbable = self.is_improbable(result)
        return (repeats or improbable) and not (silent and improbable)

    def is_silence(self, result: DecodingResult) -> bool:
        """Nobody speaks in the window, and what was decoded is not probable enough to say otherwise."""
        if self.no_speech_threshold is None or not result.no_speech_prob > self.no_speech_threshold:
            return False
        return self.logprob_threshold is None or not result.avg_logprob > self.logprob_threshold
