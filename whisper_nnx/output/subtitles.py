"""Splits transcripts into timed cues, shared by all subtitle formats."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from whisper_nnx.runtime.options import explained, option

Result = Mapping[str, Any]  # a Transcript, or one read back from JSON
Segment = Mapping[str, Any]
Cue = tuple[float, float, str]  # start, end in s; text

SPEAKER, TURN = "(speaker {}) ", " [SPEAKER_TURN]"  # before and after a text, as in whisper.cpp
_SHORTEST_S = 0.04  # of zero-length spans: one frame of a film
_PAUSE_S = 3.0  # between the starts of two words; longer pauses start a new cue if lines are limited
_UNLIMITED = 1000  # characters per line, words per cue


_option = partial(option, scope="output", group="subtitles", evaluate=False)


@explained
@dataclass(frozen=True)
class SubtitleOptions:
    """How segments are split into cues; by default one cue per segment.

    None and 0 mean no limit; speaker labels do not count. Raises ValueError for negative limits, and for max_len
    combined with limits of lines or words. Sources: openai-whisper's SubtitlesWriter; for max_len, whisper.cpp.
    """

    highlight_words: bool = field(
        default=False,
        metadata=_option(
            "underline each word while it is spoken",
            more="One cue per word, underlined with <u>, and one for each gap between words.",
        ),
    )
    max_line_width: int | None = field(
        default=None,
        metadata=_option("characters per line (default: no limit)", more="A longer line breaks between words."),
    )
    max_line_count: int | None = field(
        default=None,
        metadata=_option(
            "lines per subtitle; needs max_line_width (default: no limit)",
            more="Cues then follow the pauses of speech, not the segments.",
        ),
    )
    max_words_per_line: int | None = field(
        default=None, metadata=_option("words per subtitle; ignored with both limits above (default: no limit)")
    )
    max_len: int | None = field(
        default=None,
        metadata=_option(
            "characters per subtitle; cuts between tokens (token_timestamps=True)",
            more="Subtitles have one line. A token or word that is longer has a cue of its own.",
        ),
    )
    split_on_word: bool = field(default=False, metadata=_option("cut between words instead (word_timestamps=True)"))

    def __post_init__(self):
        for name, limit in vars(self).items():
            if limit is not None and limit < 0:
                raise ValueError(f"{name}={limit} must be at least 1, or None for no limit")
        lines = [name for name in ("max_line_width", "max_line_count", "max_words_per_line") if getattr(self, name)]
        if self.max_len and lines:
            limit = f"{lines[0]}={getattr(self, lines[0])}"
            raise ValueError(f"max_len={self.max_len} and {limit} split cues by different rules; drop one of them")
        if self.split_on_word and not self.max_len:
            raise ValueError("split_on_word=True changes where max_len splits; give max_len too")
        if self.highlight_words and self.max_len and not self.split_on_word:
            raise ValueError(f"highlight_words with max_len={self.max_len} needs whole words; set split_on_word=True")


class Piece(NamedTuple):
    """Timed text (s), its speaker, and whether the speaker changes after it."""

    start_s: float
    end_s: float
    text: str
    speaker: str | None = None
    turn: bool = False


def text_with_speaker(segment: Segment) -> str:
    """Returns a segment's text with speaker labels, if known."""
    return with_speaker(segment["text"].strip(), _of_segment(segment, [(0.0, 0.0, "")]))


def with_speaker(text: str, pieces: Sequence[Piece], label: str = SPEAKER) -> str:
    """Adds the speaker label and the mark of a speaker change, if known, to a cue's text."""
    who = "" if pieces[0].speaker is None else label.format(pieces[0].speaker)
    return f"{who}{text}{TURN if pieces[-1].turn else ''}"


def subtitle_cues(
    result: Result, *, speaker: str = SPEAKER, escape: Callable[[str], str] = str, **options: Any
) -> Iterator[Cue]:
    """Yields (start, end, text) of each cue, in s; no cue is empty or has zero length (see `shown_times`).

    Args:
      result: a transcript.
      speaker: format of speaker labels.
      escape: applied to text but not to labels and tags.
      **options: fields of SubtitleOptions.

    Raises:
      ValueError: the options are invalid, or max_len needs words or tokens that the result lacks.
    """
    chosen = SubtitleOptions(**options)
    by_word = chosen.highlight_words and has_words(result)
    cues: list[Cue] = []
    for found in cue_pieces(result, chosen):
        pieces = [piece._replace(text=escape(piece.text)) for piece in found]
        for start_s, end_s, text in _highlighted(pieces) if by_word else [_joined(pieces)]:
            lines = re.split(r"[\r\n]+", with_speaker(text, pieces, speaker).replace("-->", "->"))  # both end a cue
            cues.append((start_s, end_s, "\n".join(filter(str.strip, lines))))
    times = shown_times([(start_s, end_s) for start_s, end_s, _ in cues], 1000)
    for (start, end), (_, _, text) in zip(times, cues, strict=True):
        yield start / 1000, end / 1000, text


def shown_times(spans: Sequence[tuple[float, float]], steps: int) -> list[tuple[int, int]]:
    """Converts spans in s to (start, end) in 1/steps s, each with a positive length.

    A zero-length span takes time from the gap after it, or else from the next span or, at the end, the previous one.
    Spans that overlap or are out of order do not affect each other.
    """
    times: list[tuple[int, int]] = []
    run: list[tuple[int, int]] = []
    for start_s, end_s in spans:
        start, end = round(start_s * steps), round(end_s * steps)
        if run and start < run[-1][1]:
            times += _with_lengths(run, round(_SHORTEST_S * steps))
            run = []
        run.append((start, max(start, end)))
    return times + _with_lengths(run, round(_SHORTEST_S * steps))


def _with_lengths(run: list[tuple[int, int]], shortest: int) -> list[tuple[int, int]]:
    """Gives each of ordered spans without overlap a positive length."""
    if all(start < end for start, end in run):
        return run
    first, last = run[0][0], run[-1][1]
    needed = [min(end - start, shortest) or shortest for start, end in run]
    if sum(needed) > last - first:  # too little time: all get equal lengths
        each = max(1, (last - first) // len(run)) if last > first else shortest
        return [(first + i * each, first + (i + 1) * each) for i in range(len(run))]
    earliest = first
    shown: list[tuple[int, int]] = []
    for (start, end), length in zip(run, needed, strict=True):
        start = max(start, earliest)
        earliest = max(end, start + length)
        shown.append((start, earliest))
    latest = last
    for i in reversed(range(len(shown))):
        end = min(shown[i][1], latest)
        latest = min(shown[i][0], end - needed[i])
        shown[i] = latest, end
    return shown


def cue_pieces(result: Result, options: SubtitleOptions) -> Iterator[list[Piece]]:
    """Yields the words, tokens or whole segment of each cue; their texts, line breaks included, join to the cue's text.

    Cues without text are skipped.
    """
    segments = result["segments"]
    groups: Iterable[list[Piece]]
    if options.max_len:
        cut = _words if options.split_on_word else _tokens
        groups = (group for segment in segments for group in _groups_by_length(cut(segment), options.max_len))
    elif has_words(result):
        limits = (options.max_line_width or None, options.max_line_count or None, options.max_words_per_line or None)
        groups = _groups_by_lines(segments, *limits)
    else:
        groups = ([_whole(segment)] for segment in segments)
    return (group for group in groups if any(piece.text.strip() for piece in group))


def segments_with_text(result: Result) -> list[Segment]:
    """Returns the segments whose text is not blank."""
    return [segment for segment in result["segments"] if segment["text"].strip()]


def has_words(result: Result) -> bool:
    return bool(result["segments"]) and "words" in result["segments"][0]


def _whole(segment: Segment) -> Piece:
    (piece,) = _of_segment(segment, [(segment["start"], segment["end"], segment["text"].strip())])
    return piece


def _words(segment: Segment) -> list[Piece]:
    if "words" not in segment:
        raise ValueError("max_len with split_on_word=True splits between words; transcribe with word_timestamps=True")
    return _of_segment(segment, [(word["start"], word["end"], word["word"]) for word in segment["words"]])


def _tokens(segment: Segment) -> list[Piece]:
    """Splits the text at token starts. Characters spelled by several tokens stay whole; timestamps have no text."""
    text, at = segment["text"], 0
    if text and "token_details" not in segment:
        raise ValueError(
            "max_len splits between tokens; transcribe with token_timestamps=True, or with word_timestamps=True and "
            "set split_on_word=True"
        )
    pieces: list[Cue] = []
    partial: list[Mapping[str, Any]] = []  # tokens with part of a character
    end = {"text": "", "start": segment["end"], "end": segment["end"]}
    for token in [*segment.get("token_details", []), end]:
        found = len(text) if token is end else text.find(token["text"], at)
        if found < 0:
            if "\ufffd" in token["text"]:
                partial.append(token)
            continue
        if found > at:
            spelling = partial or [token]
            pieces.append((spelling[0]["start"], spelling[-1]["end"], text[at:found]))
        if token["text"]:
            pieces.append((token["start"], token["end"], token["text"]))
        at, partial = found + len(token["text"]), []
    return _of_segment(segment, pieces)


def _of_segment(segment: Segment, pieces: list[Cue]) -> list[Piece]:
    turns = [False] * (len(pieces) - 1) + [bool(segment.get("speaker_turn"))]
    return [Piece(*piece, segment.get("speaker"), turn) for piece, turn in zip(pieces, turns, strict=False)]


def _groups_by_length(pieces: Iterable[Piece], max_len: int) -> Iterator[list[Piece]]:
    group: list[Piece] = []
    width = 0
    for piece in pieces:
        if width and width + len(piece.text.rstrip()) > max_len:
            yield group
            group, width = [], 0
        text = piece.text if width else piece.text.lstrip()
        group.append(piece._replace(text=text))
        width += len(text)
    if group:
        yield group


def _groups_by_lines(
    segments: Iterable[Segment], line_width: int | None, line_count: int | None, words_per_cue: int | None
) -> Iterator[list[Piece]]:
    keep_segments = line_width is None or line_count is None
    group: list[Piece] = []
    lines, width, previous_start_s = 1, 0, float("inf")
    for segment in segments:
        for index, word in enumerate(_words(segment)):
            text = word.text
            speaker_change = bool(group) and (group[-1].turn or group[-1].speaker != word.speaker)
            by_number = bool(group) and keep_segments and index % (words_per_cue or _UNLIMITED) == 0
            new_cue = speaker_change or by_number
            pause = not keep_segments and word.start_s - previous_start_s > _PAUSE_S
            if width > 0 and width + len(text) <= (line_width or _UNLIMITED) and not (pause or new_cue):
                width += len(text)
            else:
                text = text.strip()
                full = line_count is not None and (pause or lines >= line_count)
                if new_cue or (group and full):
                    yield group
                    group, lines = [], 1
                elif width > 0:
                    lines += 1
                    text = f"\n{text}"
                width = len(text.strip())
            group.append(word._replace(text=text))
            previous_start_s = word.start_s
    if group:
        yield group


def _joined(pieces: list[Piece]) -> Cue:
    return pieces[0].start_s, pieces[-1].end_s, "".join(piece.text for piece in pieces)


def _highlighted(words: list[Piece]) -> Iterator[Cue]:
    """Repeats the text with each word underlined while it is spoken, and with none between words."""
    texts = [word.text for word in words]
    shown_until_s = words[0].start_s
    for i, (start_s, end_s, text, *_) in enumerate(words):
        if not text.strip():
            continue
        if milliseconds(shown_until_s) != milliseconds(start_s):
            yield shown_until_s, start_s, "".join(texts)
        underlined = re.sub(r"^(\s*)(.*)$", r"\1<u>\2</u>", text)
        yield start_s, end_s, "".join([*texts[:i], underlined, *texts[i + 1 :]])
        shown_until_s = end_s


def milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
