"""What a batch steps: `Live`, a chain of windows in progress, and `Row`, one of its windows in the batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from whisper_nnx.audio.features import RecordingMel
from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.model.heads import Heads
from whisper_nnx.timing.word_times import Heads as WordHeads
from whisper_nnx.transcription.attempts import Attempt
from whisper_nnx.transcription.fallback import FallbackOptions
from whisper_nnx.transcription.recording import Recording, Window
from whisper_nnx.transcription.windows import EncodedWindows

Place = tuple[int, int]  # a window's first frame, and how many


@dataclass
class Live:
    """A chain of windows in progress: a recording or a piece of one, with its audio and the options of its windows.

    Attributes:
      recording: the state machine that requests the windows.
      mel: its audio.
      options: of its windows; prompt, language and temperature are set for each.
      fallback: the temperatures to try.
      seed: of the samples.
      number: of the recording. Chains with the same number are pieces of one: they fail and are cancelled together.
      heads: that time words and tokens.
      word_heads: that refine the times of words.
      allowed_languages: to choose from for each window; empty: all.
      encoded: windows that are encoded already, from detecting the language.
      on_language: is called with the languages' probabilities in its first window, if the recording's language is
        still to be detected in it.
      retries: how often its windows were tried again, by the threshold that they failed.
    """

    recording: Recording
    mel: RecordingMel
    options: DecodingOptions
    _: KW_ONLY
    fallback: FallbackOptions = field(default_factory=FallbackOptions)
    seed: int = 0
    number: int = 0
    heads: Heads = ()
    word_heads: WordHeads | None = None
    allowed_languages: tuple[str, ...] = ()
    encoded: dict[Place, EncodedWindows] = field(default_factory=dict)
    on_language: Callable[[dict[str, float]], None] | None = None
    retries: Counter[str] = field(default_factory=Counter)


@dataclass
class Row:
    """A row of the batch: a window, at one of the temperatures.

    language: None until it is known. tries: how many attempts have failed. attempt: the present one.
    """

    live: Live
    window: Window
    language: str | None = None
    tries: int = 0
    attempt: Attempt | None = None


@dataclass
class Prepared:
    """A window that waits for a row: the `at`-th of those that were encoded with it.

    languages: their languages' probabilities [B, languages], on the device, if any of them needs them.
    """

    row: Row
    encoded: EncodedWindows
    at: int = 0
    languages: Any = None
