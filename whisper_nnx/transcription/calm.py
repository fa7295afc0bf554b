"""`hallucination="calm"`: discards text without speech. No jax.

Four signs, of which none is enough by itself: voice activity, the probability of no speech, phrases that Whisper is
known to invent (`assets/invented_phrases.json`, measured by benchmarks/invented.py), and loops.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from whisper_nnx.audio.options import VadOptions

if TYPE_CHECKING:
    from whisper_nnx.output.results import Segment

MAX_REPEATS = 4  # `max_repeats` of windows, unless another is given
# Short sounds that resemble a voice are no speech; pads allow for timestamps that miss the speech by half a second.
VAD = VadOptions(min_speech_duration_ms=250, min_silence_duration_ms=500, speech_pad_ms=500)
NO_SPEECH_PROB = 0.3  # from which an invented phrase is believed to be one
MOSTLY = 0.5  # of a segment without speech, likewise


@dataclass(frozen=True)
class Calm:
    """Decides which windows are decoded, and which segments are kept.

    spans: (start, end) in s of all speech. is_translated: the text is English.
    """

    spans: Sequence[tuple[float, float]]
    is_translated: bool = False

    def has_speech(self, start_s: float, end_s: float) -> bool:
        """Whether anybody speaks between these times."""
        return self._speech_s(start_s, end_s) > 0

    def _speech_s(self, start_s: float, end_s: float) -> float:
        return sum(max(0.0, min(end, end_s) - max(start, start_s)) for start, end in self.spans)

    def kept(self, segments: Sequence[Segment], language: str | None) -> list[Segment]:
        """The segments without those that are invented. language: of those that have none of their own."""
        return [segment for segment in segments if not self._is_invented(segment, language)]

    def _is_invented(self, segment: Segment, language: str | None) -> bool:
        start, end = segment["start"], segment["end"]
        speech_s = self._speech_s(start, max(end, start + 0.02))
        if not speech_s:
            return True
        spoken = "en" if self.is_translated else segment.get("language", language)
        if plain(segment["text"]) not in invented_phrases(spoken):
            return False
        return segment["no_speech_prob"] > NO_SPEECH_PROB or speech_s < MOSTLY * (end - start)


@cache
def invented_phrases(language: str | None) -> frozenset[str]:
    """What Whisper writes in this language without speech, as `plain` text; empty if it was not measured."""
    text = files("whisper_nnx").joinpath("assets", "invented_phrases.json").read_text(encoding="utf-8")
    return frozenset(json.loads(text)["phrases"].get(language, ()))


def plain(text: str) -> str:
    """Letters and digits in lower case, with single spaces; a phrase that is repeated, once."""
    letters = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text.lower())
    words = letters.split()
    for size in range(1, len(words) // 2 + 1):
        if len(words) % size == 0 and words == words[:size] * (len(words) // size):
            return " ".join(words[:size])
    return " ".join(words)
