"""`LongformOptions`: how the windows of a recording follow each other. No numpy, so that --help stays quick."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from whisper_nnx.audio.constants import FRAMES_PER_SECOND
from whisper_nnx.runtime.options import explained, option
from whisper_nnx.timing.words import APPENDED, PREPENDED

_option = partial(option, scope="window", group="long recordings")
_part = partial(option, scope="recording", group="long recordings", evaluate=False)
_timed = partial(option, scope="window", group="word timestamps")


@explained
@dataclass(frozen=True)
class LongformOptions:
    """How windows follow each other. Names and meaning of openai-whisper's options are the same."""

    initial_prompt: str | None = field(
        default=None, metadata=_option("text before the first window: names, spelling, style")
    )
    carry_initial_prompt: bool = field(
        default=False, metadata=_option("put it before every window, not only the first")
    )
    hotwords: str | None = field(
        default=None,
        metadata=_option("words that may occur, put before every window", more="They precede all other text."),
    )
    condition_on_previous_text: bool | None = field(
        default=None,
        metadata=_option(
            "put the previous text before each window (default: as the checkpoint prescribes)",
            kind="flag",
            more="None: unless the checkpoint prescribes otherwise (`WhisperConfig.condition_on_prev_tokens`).",
        ),
    )
    max_context: int | None = field(
        default=None,
        metadata=_option(
            "most tokens of previous text (default: half the model's context)",
            more="In openai-whisper it is bounded only by the context.",
        ),
    )
    clip_timestamps: str | Sequence[float] = field(
        default="0",
        metadata=_part(
            "what to transcribe, in seconds: start,end,start,end,...",
            kind="text",
            more="Text or numbers; a missing last end is the recording's.",
        ),
    )
    offset_s: float = field(default=0.0, metadata=_part("where to start, in seconds"))
    duration_s: float | None = field(default=None, metadata=_part("how much to transcribe, in seconds (default: all)"))
    independent_clips: bool = field(
        default=False,
        metadata=_part(
            "decode clips as separate recordings, which can share a batch",
            more="No clip has previous text from another.",
        ),
    )
    multilingual: bool = field(
        default=False,
        metadata=_option(
            "detect the language of every window",
            group="task",
            after="allowed_languages",
            detection=True,
            more="Segments name it.",
        ),
    )
    word_timestamps: bool = field(
        default=False,
        metadata=_timed(
            "time every word, and refine the segments by it",
            more="Segments have words, and the next window starts after the last one.",
        ),
    )
    refine_word_times: bool = field(
        default=False,
        metadata=_timed(
            "time words more closely, without pauses (word_timestamps=True)",
            more="By a second pass over short pieces of the text.",
        ),
    )
    token_timestamps: bool = field(
        default=False,
        metadata=_timed(
            "time every token, too, for json, json_full, score and max_len",
            evaluate=False,
            more="Segments have token_details.",
        ),
    )
    alignment_heads: int | tuple[tuple[int, int], ...] | None = field(
        default=None,
        metadata=_timed(
            "heads that time words: 1:0,2:1 (layer:head); 3: all of the top 3 layers",
            kind="heads",
            accepts="int | Sequence[tuple[int, int]] | None",
            more="In Python (layer, head) pairs, or how many top layers. None: the checkpoint's.",
        ),
    )
    prepend_punctuations: str = field(
        default=PREPENDED, metadata=_timed("punctuation that belongs to the following word")
    )
    append_punctuations: str = field(
        default=APPENDED, metadata=_timed("punctuation that belongs to the preceding word")
    )
    hallucination_silence_threshold: float | None = field(
        default=None, metadata=_timed("skip longer silences, in s, next to text that looks hallucinated")
    )

    def __post_init__(self):
        for name in ("clip_timestamps", "alignment_heads"):
            object.__setattr__(self, name, as_tuples(getattr(self, name)))
        self._validate_clips()
        if self.max_context is not None and not self.max_context >= 0:
            raise ValueError(f"max_context={self.max_context} must be 0 tokens or more, or None for no limit")
        if self.alignment_heads is not None and not self.timed:
            raise ValueError(
                f"alignment_heads={self.alignment_heads} time words or tokens; set word_timestamps=True as well"
            )
        if self.refine_word_times and not self.word_timestamps:
            raise ValueError("refine_word_times=True refines the times of words; set word_timestamps=True as well")
        threshold_s = self.hallucination_silence_threshold
        if threshold_s is not None and not threshold_s >= 0:
            raise ValueError(f"hallucination_silence_threshold={threshold_s} must be 0 s or more, or None")
        if threshold_s is not None and not self.word_timestamps:
            raise ValueError(
                f"hallucination_silence_threshold={threshold_s} goes by word times; set word_timestamps=True as well"
            )

    def _validate_clips(self):
        parse_clips(self.clip_timestamps, content_frames=0)
        if not (self.offset_s >= 0 and math.isfinite(self.offset_s)):
            raise ValueError(f"offset_s={self.offset_s} must be 0 s or more")
        if self.duration_s is not None and not (self.duration_s > 0 and math.isfinite(self.duration_s)):
            raise ValueError(f"duration_s={self.duration_s} must be above 0 s, or None for all")
        one_clip = bool(self.offset_s) or self.duration_s is not None
        if one_clip and self.clip_timestamps != "0":
            raise ValueError(
                f"offset_s={self.offset_s}, duration_s={self.duration_s} and clip_timestamps={self.clip_timestamps!r} "
                "all say what to transcribe; drop one or the other"
            )

    @property
    def timed(self) -> bool:
        """Words or tokens get times."""
        return self.word_timestamps or self.token_timestamps

    def clips(self, content_frames: int) -> list[tuple[int, int]]:
        """First and last frame (exclusive) of each clip of a recording."""
        if not self.offset_s and self.duration_s is None:
            return parse_clips(self.clip_timestamps, content_frames)
        end = [] if self.duration_s is None else [self.offset_s + self.duration_s]
        return parse_clips([self.offset_s, *end], content_frames)


def as_tuples(value: Any) -> Any:
    """Lists and arrays as tuples, which are hashable, to any depth."""
    if isinstance(value, Iterable) and not isinstance(value, str):
        return tuple(map(as_tuples, value))
    return value


def parse_clips(clips: str | Sequence[float], content_frames: int) -> list[tuple[int, int]]:
    """start,end,... in s -> pairs of frames within the recording.

    Raises ValueError for what is no number, negative, or ends before it starts. A clip that ends past the recording
    ends with it (in the reference it never ends).
    """
    try:
        times = [float(part) for part in (clips.split(",") if isinstance(clips, str) else clips) if part != ""]
    except (TypeError, ValueError):
        raise ValueError(f"clip_timestamps={clips!r} must be seconds: start,end,start,end,...") from None
    if bad := [t for t in times if not (t >= 0 and math.isfinite(t))]:
        raise ValueError(f"clip_timestamps has {bad[0]}; each must be 0 s or more")
    for start, end in zip(times[::2], times[1::2], strict=False):
        if end < start:
            raise ValueError(f"clip_timestamps has a clip that ends before it starts: {start} to {end}; exchange them")
    frames = [min(round(t * FRAMES_PER_SECOND), content_frames) for t in times] or [0]
    if len(frames) % 2:
        frames.append(content_frames)
    return list(zip(frames[::2], frames[1::2], strict=True))
