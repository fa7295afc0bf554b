"""What the decoder is given and what it is to say: Whisper's format (Radford et al. 2022, section 2.3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest

import numpy as np

from whisper_nnx.data.manifest import Span
from whisper_nnx.text.tokenizer import UNSPACED, Tokenizer
from whisper_nnx.timing.words import APPENDED, PREPENDED

STEP_S = 0.02  # of a timestamp, and of an encoder position
CTC_UNITS_PER_SECOND = 20  # at most; quick speech has about 15 letters
_EOT_POSITIONS = 3  # after the last word, in which the end can be heard
_PAUSE_S = 1.0  # of a longer one the mark before it has the beginning
_MARKS = PREPENDED + APPENDED


Unit = tuple[int, tuple[float, float] | None]  # of CTC: its id, and s of the clip in which it is spoken


@dataclass(frozen=True)
class Said:
    """A segment of the clip. start, end: s of the clip; end None: it goes on behind the clip, its text is not told.

    spans: of each token, s of the clip in which it is spoken; None: unknown. text, heard: the same of its bytes.
    """

    start: float
    end: float | None
    tokens: tuple[int, ...] = ()
    spans: tuple[tuple[float, float] | None, ...] = ()
    text: bytes = b""
    heard: tuple[tuple[float, float] | None, ...] = ()


@dataclass(frozen=True)
class Target:
    """One window's part of a batch; see `encode_target`."""

    ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    spans: np.ndarray
    ctc: np.ndarray
    ctc_weight: float
    frames: np.ndarray


class TooLong(ValueError):
    """The text takes more tokens than there is room for."""


def spoken_tokens(tokenizer: Tokenizer, language: str, task: str, span: Span, words: Iterable[Span] = ()) -> Said:
    """A segment with its tokens, and where each is spoken: words share their time among their letters.

    A mark behind a word is where the pause is, since `transcribe` joins it to the word without its time: else words
    would end early, and the next begin in the pause. The pause behind the last word is a moment, until `_content`
    knows how long it is.

    span: s. words: of the segment, in order, written as in its text; a token that belongs to none has no time.
    """
    spaced = task == "translate" or language not in UNSPACED
    text = (" " if spaced else "") + span.text.strip()
    tokens = tokenizer.encode(text)
    raw, at = text.encode(), 0
    heard: list[tuple[float, float] | None] = [None] * len(raw)  # of each byte
    found: list[tuple[int, int, Span]] = []  # words: first byte, the one behind the last
    for word in words:
        spelled = (word.text.strip().strip(_MARKS) or word.text.strip()).encode()
        if spelled and (first := raw.find(spelled, at)) >= 0:
            at = first + len(spelled)
            heard[first:at] = pairwise(np.linspace(word.start, word.end, len(spelled) + 1).tolist())
            found.append((first, at, word))
    for (_, first, before), (end, _, after) in pairwise([(0, 0, None), *found, (len(raw), 0, None)]):
        behind, _, ahead = raw[first:end].partition(b" ")
        if before and not behind.decode().strip(_MARKS):
            heard[first : first + len(behind)] = [(before.end, after.start if after else before.end)] * len(behind)
        if after and not ahead.decode().strip(_MARKS):
            heard[end - len(ahead) : end] = [(after.start, after.start)] * len(ahead)
    spans: list[tuple[float, float] | None] = []
    end = 0
    for piece in tokenizer.token_bytes(tokens):
        begin, end = end, end + len(piece)
        known = [part for part in heard[begin:end] if part]
        spans.append((known[0][0], known[-1][1]) if known else None)
    if end != len(raw):  # a small vocabulary leaves bytes out
        spans = [None] * len(tokens)
    return Said(span.start, span.end, tuple(tokens), tuple(spans), raw, tuple(heard))


def blank_of(tokenizer: Tokenizer, ctc_units: str) -> int:
    """CTC's class for nothing, behind all of its units: the 256 bytes, or the text tokens (where the end's id is)."""
    return 256 if ctc_units == "bytes" else tokenizer.special.eot


@dataclass(frozen=True)
class Format:
    """What is the same for all windows. positions: of the clip, 20 ms each; length: S."""

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
        """Tokens that segments may take, timestamps included, behind sot, language, task and no_timestamps."""
        return self.length - (4 if self.tokenizer.is_multilingual else 2)


def encode_target(
    form: Format,
    language: str,
    task: str,
    said: Sequence[Said],
    *,
    timestamps: bool,
    first_position: int = 0,
    previous_text: str = "",
    previous: Sequence[Sequence[Said]] = (),
    no_speech: bool = False,
) -> Target:
    """ids, labels i32 [S], weights f32 [S], spans i32 [S,2], ctc i32 [ctc_length], frames i32 [positions], as the batch
    has them.

    first_position: where the clip lies in the model's window, 20 ms each. previous: what was said in the windows
    before, told as this one is, as `transcribe` does it; or previous_text. no_speech: the label of sot is no_speech,
    and the transcript is empty. Raises TooLong where the segments do not fit.
    """
    tokenizer, special = form.tokenizer, form.tokenizer.special
    content = [] if no_speech else _content(form, said, timestamps, first_position)
    start = tokenizer.sot_sequence(language, task, timestamps)
    if no_speech and timestamps:
        content = [(special.timestamp_begin, (0, 0))]
    if len(start) + len(content) > form.length:
        raise TooLong(f"its text takes {len(start) + len(content)} tokens, max_label_length is {form.length}; raise it")
    before = tokenizer.encode(" " + previous_text.strip()) if previous_text.strip() else []
    before += [token for window in previous for token, _ in _content(form, window, timestamps, 0)]
    keep = min(form.max_prompt, form.length - len(start) - len(content) - 1)
    prompt = [special.sot_prev, *before[-keep:]] if before and keep > 0 else []

    told = [token for token, _ in content]
    ids = [*prompt, *start, *told]
    labels = [*ids[1:], special.eot]
    where = [
        *[(0, 0)] * (len(prompt) + len(start) - 1),
        *(span for _, span in content),
        _end_span(form, said, no_speech),
    ]
    weights = [0.0] * len(prompt) + [1.0] * (len(ids) - len(prompt))
    if no_speech:
        at = len(prompt)  # sot's
        labels[at] = labels[at] if special.no_speech is None else special.no_speech
        weights[at] = float(special.no_speech is not None)
        if tokenizer.is_multilingual:
            weights[at + 1] = 0.0  # of a language that nobody speaks here, no task follows
    units = _units(form, task, said)
    ctc, ctc_weight = _ctc(form, said, units, no_speech)
    missing = form.length - len(ids)
    return Target(
        ids=np.array(ids + [special.eot] * missing, np.int32),
        labels=np.array(labels + [special.eot] * missing, np.int32),
        weights=np.array(weights + [0.0] * missing, np.float32),
        spans=np.array(where + [(0, 0)] * missing, np.int32),
        ctc=ctc,
        ctc_weight=ctc_weight,
        frames=_frames(form, units, no_speech),
    )


def position(time_s: float) -> int:
    """Of a time, on the grid of 20 ms."""
    return round(time_s / STEP_S)


def _content(
    form: Format, said: Sequence[Said], timestamps: bool, first_position: int
) -> list[tuple[int, tuple[int, int]]]:
    """(token, its span in positions of the clip) of all segments; times never go back."""
    content: list[tuple[int, tuple[int, int]]] = []
    last = 0

    def tell(at: int) -> None:
        token = form.tokenizer.special.timestamp_begin + first_position + at
        content.append((token, (max(at - 1, 0), min(at + 2, form.positions))))

    for segment, after in zip_longest(said, said[1:]):
        begin = min(max(position(segment.start), last), form.positions)
        if timestamps:
            tell(begin)
        if segment.end is None:
            break
        spans = [_span(form, span) for span in segment.spans]
        if segment.text.decode().endswith(tuple(_MARKS)) and (mark := segment.spans[-1]) and mark[0] == mark[1]:
            pause_s = min((after.start if after else np.inf) - mark[0], _PAUSE_S)
            spans[-1] = _span(form, (mark[0], mark[0] + pause_s))
        content += zip(segment.tokens, spans, strict=True)
        last = min(max(position(segment.end), begin + 1), form.positions)
        if timestamps:
            tell(last)
    return content


def _span(form: Format, span: tuple[float, float] | None) -> tuple[int, int]:
    """s -> [first, end) of at least one position; (0, 0): unknown, or not in the clip."""
    if span is None:
        return 0, 0
    first = min(max(int(span[0] / STEP_S + 1e-6), 0), form.positions - 1)
    return first, min(max(int(np.ceil(span[1] / STEP_S - 1e-6)), first + 1), form.positions)


def _end_span(form: Format, said: Sequence[Said], no_speech: bool) -> tuple[int, int]:
    """Where one can hear that no more is said; unknown without words, or where a segment goes on behind the clip."""
    if no_speech or not said or said[-1].end is None:
        return 0, 0
    ends = [span[1] for span in said[-1].spans if span is not None]
    if not ends:
        return 0, 0
    first = min(int(np.ceil(ends[-1] / STEP_S - 1e-6)), form.positions - 1)
    return first, min(first + _EOT_POSITIONS, form.positions)


def _units(form: Format, task: str, said: Sequence[Said]) -> list[Unit]:
    """What CTC spells, and where it is spoken; nothing of translations."""
    if task != "transcribe":
        return []
    if form.ctc_units == "tokens":
        return [unit for segment in said for unit in zip(segment.tokens, segment.spans, strict=True)]
    text = b"".join(segment.text for segment in said).lower()
    return list(zip(text, (span for one in said for span in one.heard), strict=True))


def _ctc(form: Format, said: Sequence[Said], units: Sequence[Unit], no_speech: bool) -> tuple[np.ndarray, float]:
    """([ctc_length] units, whether they are what is heard, which they are not where a segment is cut)."""
    ctc = np.full(form.ctc_length, -1, np.int32)
    if no_speech:
        return ctc, 1.0
    if not units or len(units) > len(ctc) or said[-1].end is None:
        return ctc, 0.0
    ctc[: len(units)] = [unit for unit, _ in units]
    return ctc, 1.0


def _frames(form: Format, units: Sequence[Unit], no_speech: bool) -> np.ndarray:
    """[positions] the unit that is spoken there; CTC's blank where nobody speaks; -1 where it is unknown."""
    frames = np.full(form.positions, blank_of(form.tokenizer, form.ctc_units) if no_speech else -1, np.int32)
    for unit, span in units:
        if span is not None:
            first, end = _span(form, span)
            frames[first:end] = unit
    return frames
