"""`Recording`: a long recording as a chain of 30 s windows. It knows what was said and where to go on, and no JAX."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from whisper_nnx.audio import FRAMES_PER_SECOND
from whisper_nnx.hallucination import find_hallucination, last_end_s, leading_silence_s
from whisper_nnx.results import Segment, Transcript
from whisper_nnx.segments import ends_in_single_timestamp, split_at_timestamps
from whisper_nnx.words import APPENDED, PREPENDED, WordTiming, add_words

if TYPE_CHECKING:
    from whisper_nnx.tokenizer import Tokenizer
    from whisper_nnx.windows import DecodingResult


@dataclass(frozen=True)
class LongformOptions:
    """How windows follow each other; meaning and names are openai-whisper's.

    condition_on_previous_text: each window is told what the ones before it said. initial_prompt: text before the first
    window; with carry_initial_prompt before every one. clip_timestamps: start,end,start,end,... in s (text or numbers)
    of what to transcribe; a missing last end is that of the recording. word_timestamps: segments have words, and the
    next window begins after the last one; prepend_punctuations and append_punctuations join the word behind or before
    them. hallucination_silence_threshold: silences longer than that, in s, are skipped beside what looks invented.
    """

    condition_on_previous_text: bool = True
    initial_prompt: str | None = None
    carry_initial_prompt: bool = False
    clip_timestamps: str | Sequence[float] = "0"
    word_timestamps: bool = False
    prepend_punctuations: str = PREPENDED
    append_punctuations: str = APPENDED
    hallucination_silence_threshold: float | None = None

    def __post_init__(self):
        parse_clips(self.clip_timestamps, content_frames=0)  # what cannot be done is said before work begins
        threshold_s = self.hallucination_silence_threshold
        if threshold_s is not None and not threshold_s >= 0:
            raise ValueError(f"hallucination_silence_threshold={threshold_s} must be 0 s or more, or None")
        if threshold_s is not None and not self.word_timestamps:
            raise ValueError(
                f"hallucination_silence_threshold={threshold_s} goes by word times; set word_timestamps=True as well"
            )


@dataclass(frozen=True)
class Window:
    """A stretch of a recording to decode: n_frames of 10 ms from start_frame on, and the ids of the previous text."""

    start_frame: int
    n_frames: int
    prompt: tuple[int, ...]


@dataclass
class Draft:
    """Segments of a window that are not yet added; texts: the text ids of each; seek: where to go on after them."""

    segments: list[Segment]
    texts: list[list[int]]
    seek: int
    single_ending: bool

    @property
    def temperature(self) -> float:
        return self.segments[0]["temperature"]

    @property
    def text_tokens(self) -> list[int]:
        """The text ids of the whole window."""
        return [token for text in self.texts for token in text]


@dataclass
class Recording:
    """Asks for one window at a time (`next_window`) and is told what it said (`draft`, then `accept`).

    content_frames: its length in frames of 10 ms. window_frames, positions: frames and encoder positions of a window.
    context: the decoder's positions, of which previous text gets half.
    """

    tokenizer: Tokenizer
    language: str
    content_frames: int
    options: LongformOptions
    window_frames: int = 3000
    positions: int = 1500
    context: int = 448
    seek: int = field(default=0, init=False)
    segments: list[Segment] = field(default_factory=list, init=False)

    def __post_init__(self):
        self._clips = parse_clips(self.options.clip_timestamps, self.content_frames)
        self._clip = 0
        prompt = (self.options.initial_prompt or "").strip()
        self._initial: list[int] = self.tokenizer.encode(" " + prompt) if prompt else []
        self._history = list(self._initial)  # ids of all that was said so far
        self._forgotten = 0  # how many of them are no longer told to the next window
        self._last_speech_s = 0.0

    def next_window(self) -> Window | None:
        """What to decode next; None when all is done. The same until `accept` or `skip` is called."""
        while self._clip < len(self._clips):
            start, end = self._clips[self._clip]
            self.seek = max(self.seek, start)
            if self.seek < end:
                return Window(self.seek, min(self.window_frames, end - self.seek), self._prompt())
            self._clip += 1
            if self._clip < len(self._clips):
                self.seek = self._clips[self._clip][0]
        return None

    def _prompt(self) -> tuple[int, ...]:
        """Half the context less one; a carried initial prompt comes first, the latest history gets what it leaves."""
        room = self.context // 2 - 1
        if not self.options.carry_initial_prompt:
            return tuple(self._history[self._forgotten :][-room:])
        initial = self._initial[-room:]
        said = self._history[max(self._forgotten, len(self._initial)) :]
        return (*initial, *said[max(0, len(said) - (room - len(initial))) :])

    def skip(self, window: Window) -> None:
        """Nobody speaks in the window."""
        self.seek += window.n_frames

    def draft(self, window: Window, result: DecodingResult) -> Draft:
        """The segments that a window's tokens make, which `accept` then adds."""
        offset_s = window.start_frame / FRAMES_PER_SECOND
        step_frames = self.window_frames // self.positions
        special, step_s = self.tokenizer.special, step_frames / FRAMES_PER_SECOND
        pieces, advance = split_at_timestamps(result.tokens, special, step_s, window.n_frames / FRAMES_PER_SECOND)
        texts = [self.tokenizer.text_tokens(piece.tokens) for piece in pieces]
        segments: list[Segment] = [
            {
                "id": 0,
                "seek": window.start_frame,
                "start": offset_s + piece.start_s,
                "end": offset_s + piece.end_s,
                "text": self.tokenizer.decode(text),
                "tokens": list(piece.tokens),
                "temperature": result.temperature,
                "avg_logprob": result.avg_logprob,
                "compression_ratio": result.compression_ratio,
                "no_speech_prob": result.no_speech_prob,
            }
            for piece, text in zip(pieces, texts, strict=True)
        ]
        # Timestamps that no rule orders (without_timestamps) may lead nowhere: the same window would come for ever.
        seek = window.start_frame + (advance * step_frames if advance else window.n_frames)
        return Draft(segments, texts, seek, ends_in_single_timestamp(result.tokens, special))

    def accept(self, window: Window, draft: Draft, words: list[WordTiming] | None = None) -> list[Segment]:
        """Adds what the window says, with its words where they were timed -> the new segments.

        Segments without text or length stay in the list, emptied, as in the reference.
        """
        segments, self.seek = draft.segments, draft.seek
        if words is not None:
            offset_s = window.start_frame / FRAMES_PER_SECOND
            marks = (self.options.prepend_punctuations, self.options.append_punctuations)
            add_words(segments, words, draft.texts, offset_s, self._last_speech_s, *marks)
            kept = self._correct_seek(window, draft)
            if kept is None:
                return []
            segments = kept
            if (end_s := last_end_s(segments)) is not None:
                self._last_speech_s = end_s

        for number, segment in enumerate(segments, start=len(self.segments)):
            segment["id"] = number
            if segment["start"] == segment["end"] or not segment["text"].strip():
                segment.update({"text": "", "tokens": []})
                if words is not None:
                    segment["words"] = []
        self.segments += segments
        self._history += [token for segment in segments for token in segment["tokens"]]
        if not self.options.condition_on_previous_text or draft.temperature > 0.5:
            # What was found at a high temperature misleads more than it helps.
            self._forgotten = len(self._history)
        return segments

    def _correct_seek(self, window: Window, draft: Draft) -> list[Segment] | None:
        """Sets `seek` by the words -> the segments to keep; None if the window is to be begun later, without any."""
        segments, threshold_s = draft.segments, self.options.hallucination_silence_threshold
        start, offset_s = window.start_frame, window.start_frame / FRAMES_PER_SECOND
        end_s = last_end_s(segments)
        if not draft.single_ending and end_s is not None and end_s > offset_s:
            self.seek = round(end_s * FRAMES_PER_SECOND)
            rest_s = (start + self.window_frames) / FRAMES_PER_SECOND - end_s
            # Where the last word ends at the very begin, the same window would come again and again.
            if self.seek == start or (threshold_s is not None and rest_s <= threshold_s):
                self.seek = start + window.n_frames
        if threshold_s is None:
            return segments

        if (silence_s := leading_silence_s(segments, offset_s, threshold_s)) is not None:
            self.seek = start + round(silence_s * FRAMES_PER_SECOND)
            return None
        last_speech_s = self._last_speech_s
        at = find_hallucination(segments, start, window.n_frames, self.window_frames, last_speech_s, threshold_s)
        if at is None:
            return segments
        self.seek = round(max(offset_s + 1, segments[at]["start"]) * FRAMES_PER_SECOND)
        if self.content_frames / FRAMES_PER_SECOND - segments[at]["end"] < threshold_s:
            self.seek = self.content_frames
        return segments[:at]

    def transcript(self) -> Transcript:
        """All that was accepted so far."""
        text = self.tokenizer.decode(self._history[len(self._initial) :])
        return {"text": text, "segments": self.segments, "language": self.language}


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
