"""Decoder inputs and labels in Whisper's multitask format (Radford et al. 2022, section 2.3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest

import numpy as np

from whisper_nnx.data.manifest import Span
from whisper_nnx.text.tokenizer import UNSPACED, Tokenizer
from whisper_nnx.timing.words import APPENDED, PREPENDED

STEP_S = 0.02  # of a timestamp, and of an encoder position
CTC_UNITS_PER_SECOND = 20  # at most; fast speech has about 15 letters
_EOT_POSITIONS = 3  # after the last word, to which the end token should attend
_PAUSE_S = 1.0  # longest part of a pause that belongs to the punctuation before it
_MARKS = PREPENDED + APPENDED


Unit = tuple[int, tuple[float, float] | None]  # CTC label and its time in the clip in s, if known


@dataclass(frozen=True)
class TargetSegment:
    """A segment of the clip. start, end: in s; end None: it continues after the clip, and its text is omitted.

    spans: the time of each token in s, or None if unknown. text, byte_spans: the same per byte.
    """

    start: float
    end: float | None
    tokens: tuple[int, ...] = ()
    spans: tuple[tuple[float, float] | None, ...] = ()
    text: bytes = b""
    byte_spans: tuple[tuple[float, float] | None, ...] = ()


@dataclass(frozen=True)
class Target:
    """One window's row of a batch; see `encode_target`."""

    ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    spans: np.ndarray
    ctc: np.ndarray
    ctc_weight: float
    frames: np.ndarray


class TooLong(ValueError):
    """The text has more tokens than fit."""


def spoken_tokens(
    tokenizer: Tokenizer, language: str, task: str, span: Span, words: Iterable[Span] = ()
) -> TargetSegment:
    """Tokenizes a segment and times each token; a word's time is divided evenly among its bytes.

    Punctuation after a word gets the time of the pause, since `transcribe` joins it to the word without its time;
    otherwise words would end early and the next ones start in the pause. The pause after the last word has zero length
    until `_content` determines it.

    Args:
      tokenizer: the model's.
      language, task: its code; "transcribe" or "translate".
      span: the segment, in s.
      words: of the segment, in order, spelled as in its text; tokens outside words have no time.
    """
    spaced = task == "translate" or language not in UNSPACED
    text = (" " if spaced else "") + span.text.strip()
    tokens = tokenizer.encode(text)
    raw, offset = text.encode(), 0
    byte_spans: list[tuple[float, float] | None] = [None] * len(raw)
    found: list[tuple[int, int, Span]] = []  # words: first byte, byte after the last
    for word in words:
        spelled = (word.text.strip().strip(_MARKS) or word.text.strip()).encode()
        if spelled and (first := raw.find(spelled, offset)) >= 0:
            offset = first + len(spelled)
            byte_spans[first:offset] = pairwise(np.linspace(word.start, word.end, len(spelled) + 1).tolist())
            found.append((first, offset, word))
    for (_, first, before), (end, _, after) in pairwise([(0, 0, None), *found, (len(raw), 0, None)]):
        appended, _, prepended = raw[first:end].partition(b" ")
        if before and not appended.decode().strip(_MARKS):
            pause = (before.end, after.start if after else before.end)
            byte_spans[first : first + len(appended)] = [pause] * len(appended)
        if after and not prepended.decode().strip(_MARKS):
            byte_spans[end - len(prepended) : end] = [(after.start, after.start)] * len(prepended)
    spans: list[tuple[float, float] | None] = []
    end = 0
    for piece in tokenizer.token_bytes(tokens):
        begin, end = end, end + len(piece)
        known = [part for part in byte_spans[begin:end] if part]
        spans.append((known[0][0], known[-1][1]) if known else None)
    if end != len(raw):  # a small vocabulary drops bytes
        spans = [None] * len(tokens)
    return TargetSegment(span.start, span.end, tuple(tokens), tuple(spans), raw, tuple(byte_spans))


def blank_of(tokenizer: Tokenizer, ctc_units: str) -> int:
    """Returns CTC's blank, the class after all units: the 256 bytes, or the text tokens (the id of eot)."""
    return 256 if ctc_units == "bytes" else tokenizer.special.eot


@dataclass(frozen=True)
class Format:
    """Format shared by all windows. positions: of the clip, 20 ms each; length: S."""

    tokenizer: Tokenizer
    positions: int
    length: int
    max_prompt: int
    ctc_units: str = "tokens"

    @property
    def ctc_length(self) -> int:
        return round(self.positions * STEP_S * CTC_UNITS_PER_SECOND)

    @property
    def room(self) -> int:
        """Tokens available for segments, timestamps included, after sot, language, task and no_timestamps."""
        return self.length - (4 if self.tokenizer.is_multilingual else 2)


def encode_target(
    form: Format,
    language: str,
    task: str,
    segments: Sequence[TargetSegment],
    *,
    timestamps: bool,
    first_position: int = 0,
    previous_text: str = "",
    previous: Sequence[Sequence[TargetSegment]] = (),
    no_speech: bool = False,
) -> Target:
    """Encodes a window's decoder inputs and labels.

    Args:
      form: the format.
      language, task: its code; "transcribe" or "translate".
      segments: of the window.
      timestamps: whether the transcript has timestamps.
      first_position: position of the clip in the model's window, 20 ms each.
      previous_text: prompt as plain text.
      previous: prompt as segments of earlier windows, encoded like this one, as `transcribe` does.
      no_speech: sot's label is no_speech, and the transcript is empty.

    Returns:
      ids, labels i32 [S], weights f32 [S], spans i32 [S,2], ctc i32 [ctc_length], frames i32 [positions].

    Raises:
      TooLong: the segments do not fit.
    """
    tokenizer, special = form.tokenizer, form.tokenizer.special
    content = [(special.timestamp_begin, (0, 0))] if timestamps else []
    if not no_speech:
        content = _content(form, segments, timestamps, first_position)
    start = tokenizer.sot_sequence(language, task, timestamps)
    if len(start) + len(content) > form.length:
        raise TooLong(f"its text has {len(start) + len(content)} tokens, max_label_length is {form.length}; raise it")
    before = tokenizer.encode(" " + previous_text.strip()) if previous_text.strip() else []
    before += [token for window in previous for token, _ in _content(form, window, timestamps, 0)]
    prompt = _prompt(form, before, form.length - len(start) - len(content) - 1)

    ids = [*prompt, *start, *(token for token, _ in content)]
    labels = [*ids[1:], special.eot]
    spans = [(0, 0)] * (len(prompt) + len(start) - 1) + [span for _, span in content]
    spans.append(_end_span(form, segments, no_speech))
    weights = [0.0] * len(prompt) + [1.0] * (len(ids) - len(prompt))
    if no_speech:
        _label_no_speech(form, len(prompt), labels, weights)
    units = _units(form, task, segments)
    ctc, ctc_weight = _ctc(form, segments, units, no_speech)
    missing = form.length - len(ids)
    return Target(
        ids=np.array(ids + [special.eot] * missing, np.int32),
        labels=np.array(labels + [special.eot] * missing, np.int32),
        weights=np.array(weights + [0.0] * missing, np.float32),
        spans=np.array(spans + [(0, 0)] * missing, np.int32),
        ctc=ctc,
        ctc_weight=ctc_weight,
        frames=_frames(form, units, no_speech),
    )


def _prompt(form: Format, before: list[int], room: int) -> list[int]:
    """The latest tokens of the previous text, after their start token."""
    keep = min(form.max_prompt, room)
    return [form.tokenizer.special.sot_prev, *before[-keep:]] if before and keep > 0 else []


def _label_no_speech(form: Format, sot: int, labels: list[int], weights: list[float]) -> None:
    """The start of transcript, at `sot`, is followed by no_speech, where the vocabulary has it."""
    no_speech = form.tokenizer.special.no_speech
    labels[sot] = labels[sot] if no_speech is None else no_speech
    weights[sot] = float(no_speech is not None)
    if form.tokenizer.is_multilingual:
        weights[sot + 1] = 0.0  # the language is arbitrary, so its next token is not trained


def position(time_s: float) -> int:
    """Rounds a time to a 20 ms position."""
    return round(time_s / STEP_S)


def _content(
    form: Format, segments: Sequence[TargetSegment], timestamps: bool, first_position: int
) -> list[tuple[int, tuple[int, int]]]:
    """Returns (token, span in positions of the clip) of all segments; times never decrease."""
    content: list[tuple[int, tuple[int, int]]] = []
    last = 0

    def add_timestamp(at: int) -> None:
        token = form.tokenizer.special.timestamp_begin + first_position + at
        content.append((token, (max(at - 1, 0), min(at + 2, form.positions))))

    for segment, after in zip_longest(segments, segments[1:]):
        begin = min(max(position(segment.start), last), form.positions)
        if timestamps:
            add_timestamp(begin)
        if segment.end is None:
            break
        spans = [_span(form, span) for span in segment.spans]
        if segment.text.decode().endswith(tuple(_MARKS)) and (mark := segment.spans[-1]) and mark[0] == mark[1]:
            pause_s = min((after.start if after else np.inf) - mark[0], _PAUSE_S)
            spans[-1] = _span(form, (mark[0], mark[0] + pause_s))
        content += zip(segment.tokens, spans, strict=True)
        last = min(max(position(segment.end), begin + 1), form.positions)
        if timestamps:
            add_timestamp(last)
    return content


def _span(form: Format, span: tuple[float, float] | None) -> tuple[int, int]:
    """Converts a span in s to positions [first, end), at least one; (0, 0) if unknown."""
    if span is None:
        return 0, 0
    first = min(max(int(span[0] / STEP_S + 1e-6), 0), form.positions - 1)
    return first, min(max(int(np.ceil(span[1] / STEP_S - 1e-6)), first + 1), form.positions)


def _end_span(form: Format, segments: Sequence[TargetSegment], no_speech: bool) -> tuple[int, int]:
    """Returns the positions after the last word; unknown without word times, or if the segment exceeds the clip."""
    if no_speech or not segments or segments[-1].end is None:
        return 0, 0
    ends = [span[1] for span in segments[-1].spans if span is not None]
    if not ends:
        return 0, 0
    first = min(int(np.ceil(ends[-1] / STEP_S - 1e-6)), form.positions - 1)
    return first, min(first + _EOT_POSITIONS, form.positions)


def _units(form: Format, task: str, segments: Sequence[TargetSegment]) -> list[Unit]:
    """Returns CTC's labels with their times; none for translations."""
    if task != "transcribe":
        return []
    if form.ctc_units == "tokens":
        return [unit for segment in segments for unit in zip(segment.tokens, segment.spans, strict=True)]
    text = b"".join(segment.text for segment in segments).lower()
    return list(zip(text, (span for segment in segments for span in segment.byte_spans), strict=True))


def _ctc(
    form: Format, segments: Sequence[TargetSegment], units: Sequence[Unit], no_speech: bool
) -> tuple[np.ndarray, float]:
    """Returns (units [ctc_length], weight); the weight is 0 if units are missing or a segment is cut."""
    ctc = np.full(form.ctc_length, -1, np.int32)
    if no_speech:
        return ctc, 1.0
    if not units or len(units) > len(ctc) or segments[-1].end is None:
        return ctc, 0.0
    ctc[: len(units)] = [unit for unit, _ in units]
    return ctc, 1.0


def _frames(form: Format, units: Sequence[Unit], no_speech: bool) -> np.ndarray:
    """Returns the unit at each position, [positions]; the blank if there is no speech, -1 if unknown."""
    frames = np.full(form.positions, blank_of(form.tokenizer, form.ctc_units) if no_speech else -1, np.int32)
    for unit, span in units:
        if span is not None:
            first, end = _span(form, span)
            frames[first:end] = unit
    return frames
