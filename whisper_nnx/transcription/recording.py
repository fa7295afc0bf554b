"""`Recording`: a long recording as a chain of 30 s windows. It knows the text so far and where to resume; no JAX."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, cast

from whisper_nnx.audio.constants import FRAMES_PER_SECOND
from whisper_nnx.output.results import Candidate, Segment, Transcript, WindowAlternatives
from whisper_nnx.timing.words import WordTiming, add_words, token_details
from whisper_nnx.transcription.hallucination import find_hallucination, last_end_s, leading_silence_s
from whisper_nnx.transcription.longform import LongformOptions
from whisper_nnx.transcription.segments import ends_in_single_timestamp, place_segments, split_at_timestamps

if TYPE_CHECKING:
    from whisper_nnx.text.tokenizer import Tokenizer
    from whisper_nnx.transcription.attempts import DecodingResult
    from whisper_nnx.transcription.calm import Calm

SHORTEST_REST = 10  # frames; a shorter rest of a clip or recording contains no word and is not decoded


@dataclass(frozen=True)
class Window:
    """A part of a recording to decode: n_frames of 10 ms from start_frame on, and the ids of the previous text."""

    start_frame: int
    n_frames: int
    prompt: tuple[int, ...]

    @property
    def place(self) -> tuple[int, int]:
        """What the audio depends on."""
        return self.start_frame, self.n_frames


@dataclass
class Draft:
    """Segments of a window that are not yet added. seek: the frame at which the next window starts.

    texts, logprobs: the text ids of each segment, and the log-probability of each of its tokens.
    """

    segments: list[Segment]
    texts: list[list[int]]
    logprobs: list[tuple[float, ...]]
    seek: int
    single_ending: bool
    alternatives: WindowAlternatives | None = None

    @property
    def temperature(self) -> float:
        return self.segments[0]["temperature"]

    @property
    def text_tokens(self) -> list[int]:
        """The text ids of the whole window."""
        return [token for text in self.texts for token in text]


@dataclass
class Recording:
    """Requests one window at a time (`next_window`) and receives what was decoded in it (`draft`, then `accept`).

    Attributes:
      tokenizer: of the model.
      language: code of the transcript's language; None until it is detected in the first window.
      content_frames: length in frames of 10 ms.
      options: how windows follow each other.
      window_frames: frames of a window.
      positions: encoder positions of a window.
      context: positions of the decoder.
      prompt_room: the most tokens of previous text; by default half the context less one.
      piece: the only clip; by default all clips of the options.
      calm: discards text without speech; None: all text is kept.
    """

    tokenizer: Tokenizer
    language: str | None
    content_frames: int
    options: LongformOptions
    _: KW_ONLY
    window_frames: int = 3000
    positions: int = 1500
    context: int = 448
    prompt_room: int | None = None
    piece: tuple[int, int] | None = None
    calm: Calm | None = None
    seek: int = field(default=0, init=False)
    segments: list[Segment] = field(default_factory=list, init=False)
    alternatives: list[WindowAlternatives] = field(default_factory=list, init=False)
    skipped_windows: int = field(default=0, init=False)

    def __post_init__(self):
        self._clips = [self.piece] if self.piece else self.options.clips(self.content_frames)
        self._ends = [*itertools.accumulate(end - start for start, end in self._clips)]
        self._clip = 0
        self._hotwords = self._ids(self.options.hotwords)
        self._initial = self._ids(self.options.initial_prompt)
        self._history = list(self._initial)  # ids of all text so far
        self._forgotten = 0  # how many of them the next window no longer receives
        self._last_speech_s = 0.0

    def _ids(self, text: str | None) -> list[int]:
        return self.tokenizer.encode(" " + text.strip()) if text and text.strip() else []

    @property
    def progress(self) -> tuple[int, int]:
        """Frames of its clips that are done, and of all its clips."""
        whole = self._ends[-1]
        if self._clip == len(self._clips):
            return whole, whole
        start, end = self._clips[self._clip]
        return self._ends[self._clip] - end + min(max(self.seek, start), end), whole

    def next_window(self) -> Window | None:
        """The next window to decode; None at the end. The same until `accept` or `skip` is called."""
        while self._clip < len(self._clips):
            start, end = self._clips[self._clip]
            self.seek = max(self.seek, start)
            if end - self.seek >= (SHORTEST_REST if self.seek > start else 1):
                window = Window(self.seek, min(self.window_frames, end - self.seek), self._prompt())
                if self._is_silent(window):
                    self.skip(window)
                    continue
                return window
            self.seek = max(self.seek, end)
            self._clip += 1
            if self._clip < len(self._clips):
                self.seek = self._clips[self._clip][0]
        return None

    def _is_silent(self, window: Window) -> bool:
        start_s, length_s = window.start_frame / FRAMES_PER_SECOND, window.n_frames / FRAMES_PER_SECOND
        return self.calm is not None and not self.calm.has_speech(start_s, start_s + length_s)

    def _prompt(self) -> tuple[int, ...]:
        """Hotwords, the carried initial prompt and history, in this order; where room is short, the last is cut first.

        Hotwords lose their end, the others their beginning. An initial prompt that is not carried is part of history.
        """
        room = self.context // 2 - 1 if self.prompt_room is None else self.prompt_room
        hotwords = self._hotwords[:room]
        room -= len(hotwords)
        carried = len(self._initial) if self.options.carry_initial_prompt else 0
        initial = _last(self._initial[:carried], room)
        room -= len(initial)
        if self.options.max_context is not None:
            room = min(room, self.options.max_context)
        return (*hotwords, *initial, *_last(self._history[max(self._forgotten, carried) :], room))

    @property
    def _step_frames(self) -> int:
        return self.window_frames // self.positions

    def skip(self, window: Window) -> None:
        """The window contains no speech."""
        self.skipped_windows += 1
        self.seek += window.n_frames

    def draft(self, window: Window, result: DecodingResult) -> Draft:
        """Makes segments of a window's tokens, which `accept` then adds."""
        offset_s = window.start_frame / FRAMES_PER_SECOND
        special, step_s = self.tokenizer.special, self._step_frames / FRAMES_PER_SECOND
        pieces, advance = split_at_timestamps(result.tokens, special, step_s, window.n_frames / FRAMES_PER_SECOND)
        texts = [self.tokenizer.text_tokens(piece.tokens) for piece in pieces]
        ends = [0, *itertools.accumulate(len(piece.tokens) for piece in pieces)]
        logprobs = [tuple(result.token_logprobs[a:b]) for a, b in itertools.pairwise(ends)]
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
        for segment in segments:
            if self.options.multilingual:
                segment["language"] = result.language
            if special.sot_lm in segment["tokens"]:  # sampled with tinydiarize only
                segment["speaker_turn"] = True
        # Without TimestampRule (without_timestamps), sampled timestamps may not advance: the same window would repeat
        # forever.
        seek = window.start_frame + (advance * self._step_frames if advance else window.n_frames)
        alternatives: WindowAlternatives | None = None
        if result.alternatives:
            candidates = [
                {"text": a.text, "tokens": list(a.tokens), "avg_logprob": a.avg_logprob} for a in result.alternatives
            ]
            alternatives = {"seek": window.start_frame, "candidates": cast(list[Candidate], candidates)}
        single_ending = ends_in_single_timestamp(result.tokens, special)
        return Draft(segments, texts, logprobs, seek, single_ending, alternatives)

    def accept(
        self,
        window: Window,
        draft: Draft,
        words: list[WordTiming] | None = None,
        begins_s: Sequence[float] | None = None,
    ) -> list[Segment]:
        """Adds a window's segments and returns them.

        words: if words were timed. begins_s: if tokens were timed, the start of each text token in the window and the
        end of the last. All times are within the window's audio and before the next window (see `place_segments`).
        """
        segments, self.seek = draft.segments, draft.seek
        if draft.alternatives is not None:
            self.alternatives.append(draft.alternatives)
        if begins_s is not None:
            self._add_token_details(window, draft, begins_s)
        if words is not None:
            offset_s = window.start_frame / FRAMES_PER_SECOND
            add_words(
                segments,
                words,
                draft.texts,
                offset_s=offset_s,
                last_speech_s=self._last_speech_s,
                prepended=self.options.prepend_punctuations,
                appended=self.options.append_punctuations,
                refined=self.options.refine_word_times,
            )
            kept = self._correct_seek(window, draft)
            if kept is None:
                return []
            segments = kept
            if (end_s := last_end_s(segments)) is not None:
                self._last_speech_s = end_s

        if self.calm is not None:
            segments = self.calm.kept(segments, self.language)
        end = min(self.seek, window.start_frame + window.n_frames)
        segments = place_segments(segments, window.start_frame / FRAMES_PER_SECOND, end / FRAMES_PER_SECOND)
        for number, segment in enumerate(segments, start=len(self.segments)):
            segment["id"] = number
        self.segments += segments
        self._history += [token for segment in segments for token in segment["tokens"]]
        if self.options.condition_on_previous_text is False or draft.temperature > 0.5:
            # Text sampled at a high temperature misleads more than it helps.
            self._forgotten = len(self._history)
        return segments

    def _correct_seek(self, window: Window, draft: Draft) -> list[Segment] | None:
        """Sets `seek` by the words -> the segments to keep; None if the window is discarded and a later one decoded."""
        segments, threshold_s = draft.segments, self.options.hallucination_silence_threshold
        start, offset_s = window.start_frame, window.start_frame / FRAMES_PER_SECOND
        end_s = last_end_s(segments)
        if not draft.single_ending and end_s is not None and end_s > offset_s:
            self.seek = round(end_s * FRAMES_PER_SECOND)
            rest_s = (start + self.window_frames) / FRAMES_PER_SECOND - end_s
            # If the last word ends at the window's start, the same window would repeat forever.
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

    def _add_token_details(self, window: Window, draft: Draft, begins_s: Sequence[float]) -> None:
        offset_s, step_s = window.start_frame / FRAMES_PER_SECOND, self._step_frames / FRAMES_PER_SECOND
        first = 0
        for segment, text, logprobs in zip(draft.segments, draft.texts, draft.logprobs, strict=True):
            own = begins_s[first : first + len(text) + 1]
            segment["token_details"] = token_details(self.tokenizer, segment["tokens"], logprobs, own, offset_s, step_s)
            first += len(text)

    def transcript(self) -> Transcript:
        """The transcript of all windows accepted so far."""
        tokens = self._history[len(self._initial) :]
        text = self.tokenizer.decode(token for token in tokens if token != self.tokenizer.special.sot_lm)
        transcript: Transcript = {"text": text, "segments": self.segments, "language": self.language or ""}
        if self.alternatives:
            transcript["alternatives"] = self.alternatives
        return transcript


def _last(ids: list[int], n: int) -> list[int]:
    return ids[max(0, len(ids) - n) :]
