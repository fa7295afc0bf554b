"""Writes transcripts as txt, vtt, srt, tsv and json (openai-whisper's content), csv, lrc, ass, json_full and score."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import os
import re
import secrets
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from whisper_nnx.output.subtitles import (
    Piece,
    Result,
    Segment,
    SubtitleOptions,
    cue_pieces,
    has_words,
    segments_with_text,
    shown_times,
    subtitle_cues,
    text_with_speaker,
    with_speaker,
)

ESCAPED = "backslashreplace"  # what UTF-8 does not have: bytes in names of files
UNFINISHED = ".whisper_nnx-"  # prefix of temporary files
_ASS_HEAD = """\
[Script Info]
ScriptType: v4.00+
PlayResX: 1920
PlayResY: 1080
ScaledBorderAndShadow: yes

[V4+ Styles]
Format: Name, Fontname, Fontsize, PrimaryColour, SecondaryColour, OutlineColour, BackColour, Bold, Italic, Underline, \
StrikeOut, ScaleX, ScaleY, Spacing, Angle, BorderStyle, Outline, Shadow, Alignment, MarginL, MarginR, MarginV, Encoding
Style: Default,Arial,64,&H00FFFFFF,&H00909090,&H00000000,&H80000000,0,0,0,0,100,100,0,0,1,3,1,2,60,60,50,1

[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
"""


def format_timestamp(seconds: float, always_include_hours: bool = False, decimal_marker: str = ".") -> str:
    """Formats `[hours:]minutes:seconds.milliseconds`; zero hours only on request. ValueError if negative."""
    hours, minutes, whole_s, thousandths = _clock(seconds, 1000)
    prefix = f"{hours:02d}:" if hours or always_include_hours else ""
    return f"{prefix}{minutes:02d}:{whole_s:02d}{decimal_marker}{thousandths:03d}"


def _clock(seconds: float, steps: int) -> tuple[int, int, int, int]:
    """Splits into hours, minutes, seconds and a remainder in 1/steps s. ValueError if negative."""
    if seconds < 0:
        raise ValueError(f"timestamp {seconds} s is negative; times count from the start of the recording")
    whole_s, rest = divmod(round(seconds * steps), steps)
    return whole_s // 3600, whole_s // 60 % 60, whole_s % 60, rest


def to_txt(result: Result, **_: Any) -> str:
    """Plain text, one line per segment."""
    return "".join(f"{_one_line(text_with_speaker(segment))}\n" for segment in segments_with_text(result))


def to_vtt(result: Result, **options: Any) -> str:
    """WebVTT with voice tags for speakers; `&`, `<` and `>` are escaped. For the options see SubtitleOptions."""
    escaped = subtitle_cues(result, speaker="<v Speaker{}>", escape=partial(html.escape, quote=False), **options)
    cues = (
        f"{format_timestamp(start_s)} --> {format_timestamp(end_s)}\n{text}\n\n" for start_s, end_s, text in escaped
    )
    return "".join(["WEBVTT\n\n", *cues])


def to_srt(result: Result, **options: Any) -> str:
    """SubRip: numbered cues, times with hours and a decimal comma. For the options see SubtitleOptions."""

    def time(seconds: float) -> str:
        return format_timestamp(seconds, always_include_hours=True, decimal_marker=",")

    cues = enumerate(subtitle_cues(result, **options), start=1)
    return "".join(f"{i}\n{time(start_s)} --> {time(end_s)}\n{text}\n\n" for i, (start_s, end_s, text) in cues)


def to_lrc(result: Result, **options: Any) -> str:
    """Lyrics: one line `[minutes:seconds.hundredths]text` per cue. For the options see SubtitleOptions.

    Cues have no end time; minutes may exceed 59. highlight_words writes each word's time before it, `<...>`.
    """

    def time(at: int) -> str:
        hours, minutes, whole_s, hundredths = _clock(at / 100, 100)
        return f"{60 * hours + minutes:02d}:{whole_s:02d}.{hundredths:02d}"

    chosen = SubtitleOptions(**options)
    by_word = chosen.highlight_words and has_words(result)
    lines = []
    cues = list(cue_pieces(result, chosen))
    every = shown_times([(p.start_s, p.end_s) for pieces in cues for p in pieces], 100)
    starts = iter([start for start, _ in every])
    for pieces in cues:
        own = [next(starts) for _ in pieces]
        text = "".join(
            _insert_tag(f"<{time(at)}>", p.text) if by_word else p.text for at, p in zip(own, pieces, strict=True)
        )
        line = _one_line(with_speaker(text, pieces))
        space = " " if line.startswith("[") else ""  # otherwise the text could be read as a time
        lines.append(f"[{time(own[0])}]{space}{line}\n")
    return "".join(lines)


def to_ass(result: Result, **options: Any) -> str:
    """Advanced SubStation Alpha, with words highlighted as they are spoken (karaoke, \\k) if there are word times.

    For the options see SubtitleOptions. Text that would be a command is replaced: braces by their full-width forms,
    and an invisible U+2060 is added after each backslash.
    """

    def time(at: int) -> str:
        hours, minutes, whole_s, hundredths = _clock(at / 100, 100)
        return f"{hours}:{minutes:02d}:{whole_s:02d}.{hundredths:02d}"

    chosen = SubtitleOptions(**options)
    timed = bool(chosen.max_len) or has_words(result)
    events = []
    cues = list(cue_pieces(result, chosen))
    times = shown_times([(pieces[0].start_s, pieces[-1].end_s) for pieces in cues], 100)
    for (start, end), pieces in zip(times, cues, strict=True):
        text = with_speaker(_karaoke(pieces, start, end) if timed else _ass_text(pieces[0].text), pieces)
        events.append(f"Dialogue: 0,{time(start)},{time(end)},Default,,0,0,0,,{text}\n")
    return "".join([_ASS_HEAD, *events])


def _karaoke(pieces: list[Piece], first: int, last: int) -> str:
    """Prefixes each text with its duration in hundredths of a second, from `first` to `last`; silence has no text."""
    inside = [
        (min(max(p.start_s, first / 100), last / 100), min(max(p.end_s, first / 100), last / 100)) for p in pieces
    ]
    parts, until = [], first
    for piece, (start, end) in zip(pieces, shown_times(inside, 100), strict=True):
        start, end = max(until, start), max(until, end)
        if start > until:
            parts.append(f"{{\\k{start - until}}}")
        parts.append(_insert_tag(f"{{\\k{end - start}}}", _ass_text(piece.text)))
        until = end
    return "".join(parts)


def _ass_text(text: str) -> str:
    return text.translate({ord("\\"): "\\\u2060", ord("{"): "｛", ord("}"): "｝", ord("\n"): "\\N", ord("\r"): " "})


def _insert_tag(tag: str, text: str) -> str:
    """Inserts the tag before the text, after its leading spaces."""
    word = text.lstrip(" ")
    return f"{text[: len(text) - len(word)]}{tag}{word}"


def _timed_segments(result: Result) -> list[tuple[tuple[int, int], Segment]]:
    """Returns the segments with text and their (start, end) in milliseconds."""
    segments = segments_with_text(result)
    return list(zip(shown_times([(s["start"], s["end"]) for s in segments], 1000), segments, strict=True))


def to_tsv(result: Result, **_: Any) -> str:
    """Tab-separated start, end (whole milliseconds) and text, with a header."""
    rows = []
    for (start, end), segment in _timed_segments(result):
        text = _one_line(text_with_speaker(segment)).replace("\t", " ")
        rows.append(f"{start}\t{end}\t{text}\n")
    return "".join(["start\tend\ttext\n", *rows])


def to_csv(result: Result, **_: Any) -> str:
    """Comma-separated start, end (whole milliseconds), speaker if known, and quoted text, with a header."""
    segments = result["segments"]
    with_speakers = any("speaker" in segment for segment in segments)
    file = io.StringIO()
    file.write("start,end,speaker,text\n" if with_speakers else "start,end,text\n")
    writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    for times, segment in _timed_segments(result):
        speaker = [segment.get("speaker", "")] if with_speakers else []
        writer.writerow([*times, *speaker, text_with_speaker({**segment, "speaker": None})])
    return file.getvalue()


def to_json(result: Result, **_: Any) -> str:
    """The whole result as JSON, with non-ASCII characters escaped."""
    return json.dumps(result)


def to_json_full(result: Result, **_: Any) -> str:
    """The whole result as indented JSON, with id, text, probability and times of each token.

    Raises ValueError if the result lacks token details.
    """
    segments = [{**segment, "token_details": _details(segment, "json_full")} for segment in result["segments"]]
    return json.dumps({**result, "segments": segments}, ensure_ascii=False, indent=2) + "\n"


def to_score(result: Result, **_: Any) -> str:
    """The text and the probability of each token, tab-separated, one per line, as whisper.cpp's log_score.

    Raises ValueError if the result lacks token details.
    """
    tokens = [token for segment in result["segments"] for token in _details(segment, "score")]
    texts = [_one_line(token["text"]).replace("\t", " ") for token in tokens]
    return "".join(f"{text}\t{t['probability']:.6g}\n" for text, t in zip(texts, tokens, strict=True))


def _details(segment: Segment, format: str) -> list[dict[str, Any]]:
    if segment["tokens"] and "token_details" not in segment:
        raise ValueError(f"{format} needs each token's probability and times; transcribe with token_timestamps=True")
    return [{**token, "probability": math.exp(token["logprob"])} for token in segment.get("token_details", [])]


WRITERS: dict[str, Callable[..., str]] = {
    "txt": to_txt,
    "vtt": to_vtt,
    "srt": to_srt,
    "tsv": to_tsv,
    "json": to_json,
    "csv": to_csv,
    "lrc": to_lrc,
    "ass": to_ass,
    "json_full": to_json_full,
    "score": to_score,
}
OPENAI_FORMATS = ("txt", "vtt", "srt", "tsv", "json")  # "all", as in openai-whisper
TOKEN_FORMATS = ("json_full", "score")  # need token_details
_ENDINGS = {"json_full": "full.json", "score": "score.txt"}  # others: their name


def parse_formats(formats: str) -> list[str]:
    """Splits "srt,json"; "all" stands for openai-whisper's five formats. ValueError for an unknown format."""
    names: list[str] = []
    for name in formats.split(","):
        if name != "all" and name not in WRITERS:
            raise ValueError(f"format={name!r} is unknown; choose {', '.join(WRITERS)} or all")
        names += OPENAI_FORMATS if name == "all" else [name]
    return list(dict.fromkeys(names))


def output_files(stem: str | os.PathLike[str], formats: str) -> list[str]:
    """Returns the output files of a recording in the order of `formats`; stem: their path without extension."""
    return [f"{os.fspath(stem)}.{_ENDINGS.get(name, name)}" for name in parse_formats(formats)]


def write_files(
    result: Result,
    stem: str | os.PathLike[str],
    formats: str,
    put: Callable[[Path, Path], None] | None = None,
    **options: Any,
) -> list[Path]:
    """Writes `stem.FORMAT` for each format, as `get_writer` does; creates folders. put: see `write_whole`."""
    contents = [WRITERS[name](result, **options) for name in parse_formats(formats)]
    paths = [Path(file) for file in output_files(stem, formats)]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for path, content in zip(paths, contents, strict=True):
        write_whole(path, content, put)
    return paths


def get_writer(format: str, output_dir: str | os.PathLike[str]) -> Callable[..., list[Path]]:
    """Returns a function `(result, audio_path, **options) -> paths` that writes `output_dir/NAME.format`.

    format: one, several ("srt,json"), or "all", openai-whisper's txt, vtt, srt, tsv and json. NAME is the audio's name
    without folder and extension; json_full is written to NAME.full.json, score to NAME.score.txt. The options are those
    of SubtitleOptions.
    Files are written completely or not at all, in UTF-8 with "\\n" line ends, and replace existing files.
    Raises ValueError for an unknown format. The returned function raises OSError if it cannot write, and ValueError if
    the result lacks what a format or option needs.
    """
    parse_formats(format)

    def write(result: Result, audio_path: str | os.PathLike[str], **options: Any) -> list[Path]:
        return write_files(result, Path(output_dir) / output_name(audio_path), format, **options)

    return write


def output_name(audio_path: str | os.PathLike[str]) -> str:
    """Returns the name of a recording's outputs without extension; "stdin" for "-" (standard input)."""
    name = os.path.basename(audio_path)
    return "stdin" if name == "-" else os.path.splitext(name)[0]


def make_output_folder(folder: str | os.PathLike[str]) -> None:
    """Creates the folder if needed and checks that it is writable; OSError, in one line, if not."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = "it is not a folder" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise type(error)(f"cannot write to output folder {os.fspath(folder)!r}: {why}; choose another") from None


def write_whole(path: Path, content: str | bytes, put: Callable[[Path, Path], None] | None = None) -> None:
    """Replaces the file with `content` (text as UTF-8), or leaves it unchanged if writing fails.

    In text, bytes of a file's name that are not UTF-8 are escaped, as JSON does: `\\udce9`.

    put: moves the finished temporary file to its place; default: `os.replace`.

    Raises OSError with the path and what to do.
    """
    # Not a tempfile, which only its owner may read: outputs have the user's usual permissions.
    unfinished = path.with_name(f"{UNFINISHED}{secrets.token_hex(8)}.tmp")
    try:
        with open(unfinished, "xb") as file:
            file.write(content.encode(errors=ESCAPED) if isinstance(content, str) else content)
        (put or os.replace)(unfinished, path)
    except OSError as error:
        raise type(error)(f"cannot write {path}: {error.strerror}; free some space or choose another folder") from error
    finally:
        with suppress(OSError):  # that of writing is reported
            unfinished.unlink(missing_ok=True)


def _one_line(text: str) -> str:
    return " ".join(re.split(r"[\r\n]+", text))
