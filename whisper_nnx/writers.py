"""Transcripts as files: txt, vtt, srt, tsv and json, with the content that openai-whisper gives them."""

from __future__ import annotations

import json
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]  # a Transcript, or what was read back from its json
Cue = tuple[float, float, str]  # start, end in s; text

_PAUSE_S = 3.0  # between the starts of two words: a new cue begins, where lines are limited
_UNLIMITED = 1000  # characters of a line, words of a cue


def format_timestamp(seconds: float, always_include_hours: bool = False, decimal_marker: str = ".") -> str:
    """`[hours:]minutes:seconds.milliseconds`; hours where there are any, or always. ValueError below zero."""
    if seconds < 0:
        raise ValueError(f"timestamp {seconds} s is negative; times count from the recording's begin")
    minutes, milliseconds = divmod(_milliseconds(seconds), 60_000)
    hours, minutes = divmod(minutes, 60)
    whole_s, milliseconds = divmod(milliseconds, 1000)
    prefix = f"{hours:02d}:" if hours or always_include_hours else ""
    return f"{prefix}{minutes:02d}:{whole_s:02d}{decimal_marker}{milliseconds:03d}"


def subtitle_cues(
    result: Result,
    *,
    highlight_words: bool = False,
    max_line_width: int | None = None,
    max_line_count: int | None = None,
    max_words_per_line: int | None = None,
) -> Iterator[Cue]:
    """What is to be seen on the screen, and when: one cue per segment or, of segments with words, by the options.

    max_line_width: characters after which a line breaks. max_line_count: lines after which a new cue begins; together
      with max_line_width, cues then follow the pauses of speech, not the segments.
    max_words_per_line: words after which a new cue begins, unless cues go by lines.
    highlight_words: one cue per word, underlined with <u>, and one for each gap between words.
    None and 0 mean no limit. Raises ValueError for negative limits. Source: openai-whisper's SubtitlesWriter.
    """
    limits = {"line_width": max_line_width, "line_count": max_line_count, "words_per_line": max_words_per_line}
    for name, limit in limits.items():
        if limit is not None and limit < 0:
            raise ValueError(f"max_{name}={limit} must be at least 1, or None for no limit")
    segments = result["segments"]
    if not segments or "words" not in segments[0]:
        for segment in segments:
            yield segment["start"], segment["end"], segment["text"].strip().replace("-->", "->")
        return
    for words in _word_groups(segments, max_line_width or None, max_line_count or None, max_words_per_line or None):
        if highlight_words:
            yield from _highlighted(words)
        else:
            yield words[0][0], words[-1][1], "".join(text for _, _, text in words)


def _word_groups(
    segments: Iterable[Mapping[str, Any]], line_width: int | None, line_count: int | None, words_per_cue: int | None
) -> Iterator[list[Cue]]:
    """The words of each cue; their texts, joined, are the cue's: with spaces, and line breaks where lines begin."""
    keep_segments = line_width is None or line_count is None
    group: list[Cue] = []
    lines, width, previous_start_s = 1, 0, float("inf")
    for segment in segments:
        for index, word in enumerate(segment["words"]):
            text = word["word"]
            new_cue = bool(group) and keep_segments and index % (words_per_cue or _UNLIMITED) == 0
            pause = not keep_segments and word["start"] - previous_start_s > _PAUSE_S
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
            group.append((word["start"], word["end"], text))
            previous_start_s = word["start"]
    if group:
        yield group


def _highlighted(words: list[Cue]) -> Iterator[Cue]:
    """The same text over and over: each word underlined while it is spoken, none between two words."""
    texts = [text for _, _, text in words]
    shown_until_s = words[0][0]
    for i, (start_s, end_s, text) in enumerate(words):
        if _milliseconds(shown_until_s) != _milliseconds(start_s):
            yield shown_until_s, start_s, "".join(texts)
        underlined = re.sub(r"^(\s*)(.*)$", r"\1<u>\2</u>", text)
        yield start_s, end_s, "".join([*texts[:i], underlined, *texts[i + 1 :]])
        shown_until_s = end_s


def to_txt(result: Result, **_: Any) -> str:
    """One line per segment."""
    return "".join(f"{segment['text'].strip()}\n" for segment in result["segments"])


def to_vtt(result: Result, **options: Any) -> str:
    """WebVTT; for the options see `subtitle_cues`."""
    cues = (
        f"{format_timestamp(start_s)} --> {format_timestamp(end_s)}\n{text}\n\n"
        for start_s, end_s, text in subtitle_cues(result, **options)
    )
    return "".join(["WEBVTT\n\n", *cues])


def to_srt(result: Result, **options: Any) -> str:
    """SubRip: numbered cues, hours always, a comma before the milliseconds; for the options see `subtitle_cues`."""

    def time(seconds: float) -> str:
        return format_timestamp(seconds, always_include_hours=True, decimal_marker=",")

    cues = enumerate(subtitle_cues(result, **options), start=1)
    return "".join(f"{i}\n{time(start_s)} --> {time(end_s)}\n{text}\n\n" for i, (start_s, end_s, text) in cues)


def to_tsv(result: Result, **_: Any) -> str:
    """Tab-separated start and end, in whole milliseconds, and text, under a line of headings."""
    rows = (
        f"{round(1000 * segment['start'])}\t{round(1000 * segment['end'])}\t{_one_cell(segment['text'])}\n"
        for segment in result["segments"]
    )
    return "".join(["start\tend\ttext\n", *rows])


def to_json(result: Result, **_: Any) -> str:
    """The whole result; characters beyond ASCII are escaped."""
    return json.dumps(result)


WRITERS: dict[str, Callable[..., str]] = {
    "txt": to_txt,
    "vtt": to_vtt,
    "srt": to_srt,
    "tsv": to_tsv,
    "json": to_json,
}


def get_writer(format: str, output_dir: str | os.PathLike[str]) -> Callable[..., list[Path]]:
    """A function `(result, audio_path, **options) -> paths` that writes `output_dir/NAME.format`; "all" writes all.

    NAME is that of the audio without folder and extension; options are those of `subtitle_cues`. A file is written as a
    whole or not at all, in UTF-8 with "\\n" at line ends; an older one of the name is replaced.
    Raises ValueError for an unknown format; the writer raises OSError where it cannot write.
    """
    if format != "all" and format not in WRITERS:
        raise ValueError(f"format={format!r} is unknown; choose {', '.join(WRITERS)} or all")
    formats = list(WRITERS) if format == "all" else [format]

    def write(result: Result, audio_path: str | os.PathLike[str], **options: Any) -> list[Path]:
        contents = {name: WRITERS[name](result, **options) for name in formats}
        paths = [Path(output_dir) / f"{output_name(audio_path)}.{name}" for name in contents]
        for path, content in zip(paths, contents.values(), strict=True):
            _write_whole(path, content)
        return paths

    return write


def output_name(audio_path: str | os.PathLike[str]) -> str:
    """The name of a recording's outputs, without extension; "-", standard input, gives "stdin"."""
    name = os.path.basename(audio_path)
    return "stdin" if name == "-" else os.path.splitext(name)[0]


def make_output_folder(folder: str | os.PathLike[str]) -> None:
    """Creates the folder where it is missing, and tries it out; OSError, in one line, where it cannot be written to."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = "it is not a folder" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise type(error)(f"cannot write to output folder {os.fspath(folder)!r}: {why}; choose another") from None


def _write_whole(path: Path, content: str) -> None:
    # Not a tempfile: those are readable by their owner alone, while the output is to have the user's usual permissions.
    unfinished = path.with_name(f".whisper_nnx-{secrets.token_hex(8)}.tmp")
    try:
        with open(unfinished, "x", encoding="utf-8", newline="\n") as file:
            file.write(content)
        os.replace(unfinished, path)
    except OSError as error:
        raise type(error)(
            f"cannot write {path}: {error.strerror}; make room there, or choose another folder"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _one_cell(text: str) -> str:
    return text.strip().replace("\t", " ")
