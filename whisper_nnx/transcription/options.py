"""`TranscribeOptions` and `CallOptions`: all that `transcribe` takes, as keyword arguments or made before. No jax."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

from whisper_nnx.audio.constants import MAX_HOURS
from whisper_nnx.audio.options import VadOptions, check_max_hours, require_detector
from whisper_nnx.decoding.options import DecodingOptions, whole_number
from whisper_nnx.runtime.options import explained, option
from whisper_nnx.text.languages import language_or_none, to_language_code
from whisper_nnx.transcription.calm import MAX_REPEATS
from whisper_nnx.transcription.fallback import FallbackOptions
from whisper_nnx.transcription.longform import LongformOptions, as_tuples
from whisper_nnx.transcription.other_names import OTHER_KEYWORDS

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from whisper_nnx.model.whisper import Whisper
    from whisper_nnx.transcription.changes import RecordingChanges

_call = partial(option, scope="call")
_option = partial(option, scope="recording")
_detection = partial(_option, group="task", detection=True)


NGRAM = "ngram"


@explained
@dataclass(frozen=True)
class CallOptions:
    """Options of one call of `transcribe`, for all of its recordings together."""

    batch_size: int = field(
        default=1,
        metadata=_call(
            "recordings, or pieces of them, to decode together",
            group="performance",
            kind="some",
            after="",
            more="The windows of one recording follow each other, unless vad_filter or independent_clips cut it into "
            "pieces, which are recordings of their own.",
        ),
    )
    devices: int | str | Mesh | None = field(
        default=None,
        metadata=_call(
            'devices among which the rows of a batch are divided: a number, "all", or a mesh (`make_mesh`)',
            python_only="the command's own loads the model to the devices",
            more="batch_size is rounded up to a multiple of them. The call copies the model there; `shard_model`, or "
            "load_model(..., mesh=...), does so once for many calls.",
        ),
    )
    audio_ctx: int | None = field(
        default=None,
        metadata=_call(
            "encoder positions of a window, 20 ms each: 500 makes windows of 10 s (default: all, 30 s)",
            group="performance",
            kind="count or none",
            more="Shorter windows cost less; longer recordings take more of them, and lose accuracy where the model "
            "was not trained for it. 0: all. Each number has its own programs (for `warmup`: `with_audio_ctx`).",
        ),
    )
    masked_heads: str | tuple[tuple[int, int], ...] | None = field(
        default=None,
        metadata=_call(
            "heads of the decoder that are left out: 0:2,1:7 (layer:head)",
            group="long recordings",
            kind="name",
            accepts="str | Sequence[tuple[int, int]] | None",
            more="Some invent text without speech, but speech may need them (`with_masked_heads`). In Python also "
            "(layer, head) pairs.",
        ),
    )
    draft: Whisper | str | None = field(
        default=None,
        metadata=_call(
            "a smaller model that proposes tokens to this one, or ngram: the same text, sooner (needs beam_size=None)",
            group="performance",
            kind="name",
            after="batch_size",
            more="The smaller model has the same vocabulary; with the same encoder, it uses this one's encoder output. "
            '"ngram" needs no model: it proposes what followed the latest tokens where they occurred before, in the '
            "prompt or in the window. Attempts at temperatures above 0 are decoded without a draft.",
        ),
    )
    readers: int | None = field(
        default=None,
        metadata=_call(
            "processes that decode files ahead; 0: threads of this process (default: 0 on CPUs, which are busy with "
            "the model, else three for every four cores, at most 16)",
            group="performance",
            after="batch_size",
            more="Of several recordings, at most one for each row of the batch. Threads decode no faster together than "
            "one, as they wait for each other. A file that ends its process twice (memory, a fault in a codec) fails "
            "by itself.",
        ),
    )
    verbose: bool | None = field(
        default=None,
        metadata=_call(
            "print the text as it is decoded, or (False) show a progress bar; None: neither",
            group="input and output",
            on_command=True,
            more="With several recordings, each line starts with the recording's name.",
        ),
    )
    print_colors: bool = field(
        default=False,
        metadata=_call(
            "color what is printed from red to green, by its probability", group="input and output", evaluate=False
        ),
    )
    print_special: bool = field(
        default=False,
        metadata=_call(
            "print timestamps and other special tokens, too, as in <|1.08|>",
            group="input and output",
            evaluate=False,
        ),
    )
    progress: Callable[[float, float], None] | None = field(
        default=None,
        metadata=_call(
            "called after each window with the finished and the total seconds of audio of all recordings",
            python_only="it is a function",
            more="Lengths come from the headers; an unknown length counts as the average of the others. "
            "Where the number of recordings is unknown, the total is infinite.",
        ),
    )

    def __post_init__(self):
        object.__setattr__(self, "batch_size", whole_number("batch_size", self.batch_size, 1))
        object.__setattr__(self, "audio_ctx", whole_number("audio_ctx", self.audio_ctx, 0, or_none=True))
        object.__setattr__(self, "readers", whole_number("readers", self.readers, 0, or_none=True))
        object.__setattr__(self, "masked_heads", as_tuples(self.masked_heads))
        if isinstance(self.draft, str) and self.draft != NGRAM:
            raise ValueError(f"draft={self.draft!r} must be a model (load_model), or {NGRAM!r}")
        if self.progress is not None and not callable(self.progress):
            raise ValueError(f"progress={self.progress!r} must be a function; verbose=False shows a progress bar")

    def check(self, options: TranscribeOptions) -> None:
        """Raises ValueError for options of recordings with which the draft would never be used."""
        beam_size, temperatures = options.fallback.beam_size, options.fallback.temperatures
        if self.draft is None:
            return
        if beam_size is not None and 0 in temperatures:
            raise ValueError(
                f"beam_size={beam_size}: a draft needs greedy decoding; set beam_size=None, or drop the draft"
            )
        if 0 not in temperatures:
            raise ValueError(f"temperature={temperatures}: a draft needs greedy decoding; include 0, or drop the draft")

    @classmethod
    def split(cls, changes: Mapping[str, Any]) -> tuple[CallOptions, dict[str, Any]]:
        """The options of the call, and the others."""
        own = {f.name for f in fields(cls)}
        others = {name: value for name, value in changes.items() if name not in own}
        return cls(**{name: value for name, value in changes.items() if name in own}), others


@explained
@dataclass(frozen=True)
class TranscribeOptions:
    """All options of a recording: how windows follow each other, when they are retried, how each is decoded, and these.

    All options of LongformOptions, FallbackOptions and DecodingOptions are keyword arguments of `of`; `temperature`
    (one, or several to try in turn), beam_size, patience, best_of and n_best are those of FallbackOptions.
    """

    longform: LongformOptions = field(default_factory=LongformOptions)
    fallback: FallbackOptions = field(default_factory=FallbackOptions)
    decoding: DecodingOptions = field(default_factory=DecodingOptions)
    seed: int = field(
        default=0,
        metadata=_option("the same seed samples the same text", python_only="a command's result can be reproduced"),
    )
    sampling_rate: float | None = field(
        default=None, metadata=_option("sampling rate of an array, in Hz", python_only="files name theirs")
    )
    audio_track: int | None = field(
        default=None,
        metadata=_option(
            "which of a file's audio tracks, from 0 (default: as ffmpeg chooses)",
            group="input and output",
            after="recursive",
        ),
    )
    follow_timestamps: bool = field(
        default=True,
        metadata=_option(
            "insert silence where a video's audio starts late or pauses; False: no gaps", group="long recordings"
        ),
    )
    max_hours: float = field(
        default=MAX_HOURS,
        metadata=_option("longest recording that is decoded, in hours", group="long recordings", on_command=None),
    )
    allowed_languages: Sequence[str] | str | None = field(
        default=None,
        metadata=_detection(
            "languages to detect from: de,French", kind="languages", more="Codes or names, as a list or with commas."
        ),
    )
    language_detection_segments: int = field(
        default=1,
        metadata=_detection(
            "windows of 30 s to detect the language from", kind="some", more="Their probabilities are added up."
        ),
    )
    language_detection_threshold: float | None = field(
        default=None, metadata=_detection("a window with a more probable language decides alone (default: 0.5)")
    )
    diarize: bool = field(
        default=False,
        metadata=_option("label speakers by the louder channel of a stereo recording", group="task", evaluate=False),
    )
    hallucination: str | None = field(
        default=None,
        metadata=_option(
            "calm: discard text where there is no speech, as far as it is detected",
            group="long recordings",
            kind="hallucination",
            more="By voice activity (it needs the extra `vad`), the probability of no speech, phrases that Whisper is "
            "known to invent, and loops (`max_repeats`, 4 unless given). Windows without speech are not decoded.",
        ),
    )
    vad_filter: bool = field(
        default=False,
        metadata=_option(
            "transcribe only speech, in pieces of up to 30 s, which can share a batch",
            group="voice activity",
            more="Pieces are recordings of their own, without previous text from others.",
        ),
    )
    vad_parameters: VadOptions | Mapping[str, Any] | None = field(  # normalized to VadOptions, None without vad_filter
        default=None,
        metadata=_option("fields of VadOptions", python_only="each of VadOptions's fields is an option there"),
    )

    @classmethod
    def of(cls, options: TranscribeOptions | None = None, /, **changes: Unpack[RecordingChanges]) -> TranscribeOptions:
        """`options`, or the defaults, with changes: keyword arguments of `transcribe`.

        TypeError for an unknown one, ValueError for what cannot be met, ImportError where vad_filter lacks its package.
        """
        if not isinstance(options, cls | None):
            raise TypeError(f"options={options!r} must be TranscribeOptions; give others as keyword arguments")
        made = cls.changed(options or cls(), {**changes})
        for doubt in made.doubts:
            warnings.warn(doubt, stacklevel=4)
        return made

    @property
    def window_options(self) -> DecodingOptions:
        """The options of windows, with what `hallucination` adds: nothing to a grammar that allows no other text."""
        own = self.decoding
        is_bound = own.constraint is not None and own.grammar_penalty is None
        if self.hallucination is None or own.max_repeats is not None or is_bound:
            return own
        return replace(self.decoding, max_repeats=MAX_REPEATS)

    @property
    def doubts(self) -> list[str]:
        """What the user should know of a combination of options that is possible."""
        if self.longform.word_timestamps and self.decoding.task == "translate":
            return ["word times of a translation may not be reliable"]
        return []

    @classmethod
    def changed(cls, options: TranscribeOptions, changes: dict[str, Any]) -> TranscribeOptions:
        """Like `of`, without warnings."""
        if "prompt" in changes:  # a field of DecodingOptions
            raise ValueError(f"prompt={changes['prompt']!r} is for single windows; use initial_prompt")
        if "temperature" in changes:
            changes["temperatures"] = changes.pop("temperature")
        if (language := language_or_none(changes.get("language"))) is not None:
            changes["language"] = to_language_code(language)
        parts = {"longform": LongformOptions, "fallback": FallbackOptions, "decoding": DecodingOptions}
        part_of = {f.name: "" for f in fields(cls) if f.name not in parts}
        for part, kind in reversed(parts.items()):
            part_of |= {f.name: part for f in fields(kind)}
        sorted_: dict[str, dict[str, Any]] = {"": {}, **{part: {} for part in parts}}
        for name, value in changes.items():
            if name not in part_of:
                raise TypeError(f"a recording has no option {name!r}{_hint(name, list(part_of))}")
            sorted_[part_of[name]][name] = value
        own = sorted_.pop("")
        if not own.get("vad_filter", options.vad_filter):
            own = {"vad_parameters": None, **own}  # of options that had vad_filter
        changed = {part: replace(getattr(options, part), **values) for part, values in sorted_.items()}
        return replace(options, **changed, **own)

    def __post_init__(self):
        # As of all options classes, idempotent: `dataclasses.replace` runs it again on its own result.
        decoding, longform = self.decoding, self.longform
        segments = whole_number("language_detection_segments", self.language_detection_segments, 1)
        object.__setattr__(self, "language_detection_segments", segments)
        object.__setattr__(self, "allowed_languages", self._languages())
        object.__setattr__(self, "vad_parameters", self._vad())
        if self.hallucination not in (None, "calm"):
            raise ValueError(f"hallucination={self.hallucination!r} must be 'calm', or None for all text")
        if self.hallucination is not None:
            require_detector()
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


RECORDING = (FallbackOptions, DecodingOptions, LongformOptions, TranscribeOptions)  # the keyword arguments of `of`


def _hint(name: str, known: list[str]) -> str:
    if name in OTHER_KEYWORDS:
        return f": it {OTHER_KEYWORDS[name]}"
    return "".join(f"; did you mean {near}?" for near in difflib.get_close_matches(name, known, 1))
