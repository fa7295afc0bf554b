"""`TranscribeOptions`: all that may be asked of a recording, from keyword arguments. No jax."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from whisper_nnx.audio.loading import MAX_HOURS, check_max_hours
from whisper_nnx.audio.vad import VadOptions, require_detector
from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.text.languages import language_or_none, to_language_code
from whisper_nnx.transcription.fallback import FallbackOptions
from whisper_nnx.transcription.other_names import OTHER_KEYWORDS
from whisper_nnx.transcription.recording import LongformOptions


@dataclass(frozen=True)
class TranscribeOptions:
    """All options of a recording: how windows follow each other, when they are retried, how each is decoded, and these.

    All fields of LongformOptions, FallbackOptions and DecodingOptions are keyword arguments of `of`; `temperature`
    (one, or several to try in turn), beam_size, patience and best_of are those of FallbackOptions.

    Attributes:
      seed: the same seed gives the same samples.
      sampling_rate: of an array, in Hz.
      audio_track: which of a file's audio streams, from 0; None: as ffmpeg chooses.
      follow_timestamps: as in `load_audio`.
      max_hours: as in `load_audio`.
      vad_filter: transcribes only speech, cut into pieces that are recordings of their own and can be decoded together.
      vad_parameters: fields of VadOptions.
      language_detection_segments: 30 s windows to detect the language from; their probabilities are added up.
      language_detection_threshold: a window with a more probable language decides alone.
      allowed_languages: codes or names to choose from.
      diarize: labels segments by the louder channel of a stereo recording.
    """

    longform: LongformOptions
    fallback: FallbackOptions
    decoding: DecodingOptions
    seed: int = 0
    sampling_rate: float | None = None
    audio_track: int | None = None
    follow_timestamps: bool = True
    max_hours: float = MAX_HOURS
    vad_filter: bool = False
    vad_parameters: VadOptions | Mapping[str, Any] | None = None  # normalized to VadOptions, None without vad_filter
    language_detection_segments: int = 1
    language_detection_threshold: float | None = None
    allowed_languages: Sequence[str] | str | None = None
    diarize: bool = False

    @classmethod
    def of(cls, **options: Any) -> TranscribeOptions:
        """Sorts keyword arguments. TypeError for an unknown one, ValueError for what cannot be met.

        ImportError where vad_filter lacks its package.
        """
        if "prompt" in options:  # a field of DecodingOptions
            raise ValueError(f"prompt={options['prompt']!r} is for single windows; use initial_prompt")
        if "temperature" in options:
            given = options.pop("temperature")
            options["temperatures"] = (given,) if isinstance(given, int | float) else tuple(map(float, given))
        if (language := language_or_none(options.pop("language", None))) is not None:
            options["language"] = to_language_code(language)

        kinds: dict[Any, dict[str, Any]] = {LongformOptions: {}, FallbackOptions: {}, DecodingOptions: {}, cls: {}}
        names = {f.name: kind for kind in reversed(kinds) for f in fields(kind)}
        for kind in ("longform", "fallback", "decoding"):
            del names[kind]
        for name, value in options.items():
            if name not in names and name in OTHER_KEYWORDS:
                raise TypeError(f"transcribe() has no option {name!r}: it {OTHER_KEYWORDS[name]}")
            if name not in names:
                near = "".join(f"; do you mean {n}?" for n in difflib.get_close_matches(name, names, 1))
                raise TypeError(f"transcribe() has no option {name!r}{near}")
            kinds[names[name]][name] = value
        own = kinds.pop(cls)
        made = cls(*(kind(**values) for kind, values in kinds.items()), **own)
        if made.longform.word_timestamps and made.decoding.task == "translate":
            warnings.warn("word times of a translation may not be reliable", stacklevel=4)
        return made

    def __post_init__(self):
        """Normalizes and validates; idempotent, since `dataclasses.replace` runs it again on its own result."""
        decoding, longform = self.decoding, self.longform
        object.__setattr__(self, "allowed_languages", self._languages())
        object.__setattr__(self, "vad_parameters", self._vad())
        if decoding.task == "lang_id":
            raise ValueError("task='lang_id' is for windows; of a recording leave language=None and read the result's")
        if longform.multilingual and decoding.language is not None:
            raise ValueError(f"multilingual=True detects each window's language; drop language={decoding.language!r}")
        if self.allowed_languages and decoding.language is not None:
            raise ValueError(
                f"allowed_languages={self.allowed_languages} and language={decoding.language!r} both say it; drop one"
            )
        self._validate_detection()
        check_max_hours(self.max_hours)
        if longform.independent_clips and self.vad_filter:
            raise ValueError("vad_filter=True makes each stretch of speech a recording; drop independent_clips=True")

    def _languages(self) -> tuple[str, ...]:
        given = self.allowed_languages or ()
        names = given.split(",") if isinstance(given, str) else given
        return tuple(to_language_code(name.strip()) for name in names)

    def _vad(self) -> VadOptions | None:
        if not self.vad_filter:
            if self.vad_parameters is not None:
                raise ValueError(f"vad_parameters={self.vad_parameters} need vad_filter=True")
            return None
        require_detector()
        return VadOptions.of(self.vad_parameters)

    def _validate_detection(self):
        segments, threshold = self.language_detection_segments, self.language_detection_threshold
        if isinstance(segments, bool) or segments != int(segments) or segments < 1:
            raise ValueError(f"language_detection_segments={segments} must be a whole number of at least 1")
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"language_detection_threshold={threshold} must be a probability, from 0 to 1")
        if threshold is not None and segments == 1:
            raise ValueError(
                f"language_detection_threshold={threshold} chooses between windows; set language_detection_segments too"
            )
        if segments > 1 and self.decoding.language is not None:
            raise ValueError(
                f"language_detection_segments={segments} detects the language; drop language={self.decoding.language!r}"
            )
