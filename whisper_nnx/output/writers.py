"""Transcripts as files: txt, vtt, srt, tsv and json with openai-whisper's content; csv, lrc, ass and json_full."""

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
    marked,
    shown_times,
    spoken_segments,
    spoken_text,
    subtitle_cues,
)

UNFINISHED = ".whisper_nnx-"  # what the names of files begin with that are being written
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
    """`[hours:]minutes:seconds.milliseconds`; hours where there are any, or always. ValueError below zero."""
    hours, minutes, whole_s, thousandths = _clock(seconds, 1000)
    prefix = f"{hours:02d}:" if hours or always_include_hours else ""
    return f"{prefix}{minutes:02d}:{whole_s:02d}{decimal_marker}{thousandths:03d}"


def _clock(seconds: float, steps: int) -> tuple[int, int, int, int]:
    """Hours, minutes, seconds, and the rest in `steps` per second. ValueError below zero."""
    if seconds < 0:
        raise ValueError(f"timestamp {seconds} s is negative; times count from the recording's begin")
    whole_s, rest = divmod(round(seconds * steps), steps)
    return whole_s // 3600, whole_s // 60 % 60, whole_s % 60, rest


def to_txt(result: Result, **_: Any) -> str:
    """One line per segment."""
    return "".join(f"{_one_line(spoken_text(segment))}\n" for segment in spoken_segments(result))


def to_vtt(result: Result, **options: Any) -> str:
    """WebVTT, whose own mark says who speaks; `&`, `<` and `>` are escaped. For the options see SubtitleOptions."""
    escaped = subtitle_cues(result, speaker="<v Speaker{}>", escape=partial(html.escape, quote=False), **options)
    cues = (
        f"{format_timestamp(start_s)} --> {format_timestamp(end_s)}\n{text}\n\n" for start_s, end_s, text in escaped
    )
    return "".join(["WEBVTT\n\n", *cues])


def to_srt(result: Result, **options: Any) -> str:
    """SubRip: numbered cues, hours always, a comma before the milliseconds; for the options see SubtitleOptions."""

    def time(seconds: float) -> str:
        return format_timestamp(seconds, always_include_hours=True, decimal_marker=",")

    cues = enumerate(subtitle_cues(result, **options), start=1)
    return "".join(f"{i}\n{time(start_s)} --> {time(end_s)}\n{text}\n\n" for i, (start_s, end_s, text) in cues)


def to_lrc(result: Result, **options: Any) -> str:
    """Lyrics: `[minutes:seconds.hundredths]text`, a line per cue; for the options see SubtitleOptions.

    Cues have no end there and one line; minutes go on after 59. highlight_words puts a word's time before it, `<...>`.
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
            _behind(f"<{time(at)}>", p.text) if by_word else p.text for at, p in zip(own, pieces, strict=True)
        )
        line = _one_line(marked(text, pieces))
        apart = " " if line.startswith("[") else ""  # what would be another time, if it looked like one
        lines.append(f"[{time(own[0])}]{apart}{line}\n")
    return "".join(lines)


def to_ass(result: Result, **options: Any) -> str:
    """Advanced SubStation Alpha; the words, where there are any, light up as they are spoken (karaoke, \\k).

    For the options see SubtitleOptions. What would be a command there is replaced by what looks like it: braces by
    their full-width forms, and behind a backslash comes U+2060, which is invisible.
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
        text = marked(_karaoke(pieces, start, end) if timed else _ass_text(pieces[0].text), pieces)
        events.append(f"Dialogue: 0,{time(start)},{time(end)},Default,,0,0,0,,{text}\n")
    return "".join([_ASS_HEAD, *events])


def _karaoke(pieces: list[Piece], first: int, last: int) -> str:
    """The texts, each behind the hundredths of a second that it takes, from `first` to `last`; silence has no text."""
    inside = [
        (min(max(p.start_s, first / 100), last / 100), min(max(p.end_s, first / 100), last / 100)) for p in pieces
    ]
    parts, until = [], first
    for piece, (start, end) in zip(pieces, shown_times(inside, 100), strict=True):
        start, end = max(until, start), max(until, end)
        if start > until:
            parts.append(f"{{\\k{start - until}}}")
        parts.append(_behind(f"{{\\k{end - start}}}", _ass_text(piece.text)))
        until = end
    return "".join(parts)


def _ass_text(text: str) -> str:
    return text.translate({ord("\\"): "\\\u2060", ord("{"): "｛", ord("}"): "｝", ord("\n"): "\\N", ord("\r"): " "})


def _behind(tag: str, text: str) -> str:
    """The tag before the text, but behind the text's first space."""
    word = text.lstrip(" ")
    return f"{text[: len(text) - len(word)]}{tag}{word}"


def _timed_segments(result: Result) -> list[tuple[tuple[int, int], Segment]]:
    """Those that have a text, with start and end in milliseconds."""
    segments = spoken_segments(result)
    return list(zip(shown_times([(s["start"], s["end"]) for s in segments], 1000), segments, strict=True))


def to_tsv(result: Result, **_: Any) -> str:
    """Tab-separated start and end, in whole milliseconds, and text, under a line of headings."""
    rows = []
    for (start, end), segment in _timed_segments(result):
        text = _one_line(spoken_text(segment)).replace("\t", " ")
        rows.append(f"{start}\t{end}\t{text}\n")
    return "".join(["start\tend\ttext\n", *rows])


def to_csv(result: Result, **_: Any) -> str:
    """Start and end, in whole milliseconds, and text, quoted, under a line of headings; with speakers, these too."""
    segments = result["segments"]
    with_speakers = any("speaker" in segment for segment in segments)
    file = io.StringIO()
    file.write("start,end,speaker,text\n" if with_speakers else "start,end,text\n")
    writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    for times, segment in _timed_segments(result):
        speaker = [segment.get("speaker", "")] if with_speakers else []
        writer.writerow([*times, *speaker, spoken_text({**segment, "speaker": None})])
    return file.getvalue()


def to_json(result: Result, **_: Any) -> str:
    """The whole result; characters beyond ASCII are escaped."""
    return json.dumps(result)


def to_json_full(result: Result, **_: Any) -> str:
    """The whole result, to be read by people too, with id, text, probability and times of each token.

    Raises ValueError for a result without these.
    """
    segments = []
    for segment in result["segments"]:
        if segment["tokens"] and "token_details" not in segment:
            raise ValueError(
                "json_full tells each token's probability and times; transcribe with token_timestamps=True"
            )
        details = [{**t, "probability": math.exp(t["logprob"])} for t in segment.get("token_details", [])]
        segments.append({**segment, "token_details": details})
    return json.dumps({**result, "segments": segments}, ensure_ascii=False, indent=2) + "\n"


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
}
OPENAI_FORMATS = ("txt", "vtt", "srt", "tsv", "json")  # which "all" means there, and here
_ENDINGS = {"json_full": "full.json"}  # of the others, their own name


def parse_formats(formats: str) -> list[str]:
    """ "srt,json" -> ["srt", "json"]; "all" stands for openai-whisper's five. ValueError for an unknown one."""
    names: list[str] = []
    for name in formats.split(","):
        if name != "all" and name not in WRITERS:
            raise ValueError(f"format={name!r} is unknown; choose {', '.join(WRITERS)} or all")
        names += OPENAI_FORMATS if name == "all" else [name]
    return list(dict.fromkeys(names))


def output_files(stem: str | os.PathLike[str], formats: str) -> list[str]:
    """The files that a recording gets, in the formats' order; stem: their path without extension."""
    return [f"{os.fspath(stem)}.{_ENDINGS.get(name, name)}" for name in parse_formats(formats)]


def write_files(result: Result, stem: str | os.PathLike[str], formats: str, **options: Any) -> list[Path]:
    """Writes `stem.FORMAT` for each format, as `get_writer` does; folders are made."""
    contents = [WRITERS[name](result, **options) for name in parse_formats(formats)]
    paths = [Path(file) for file in output_files(stem, formats)]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for path, content in zip(paths, contents, strict=True):
        write_whole(path, content)
    return paths


def get_writer(format: str, output_dir: str | os.PathLike[str]) -> Callable[..., list[Path]]:
    """A function `(result, audio_path, **options) -> paths` that writes `output_dir/NAME.format`.

    format: one, several ("srt,json"), or "all", which means openai-whisper's: txt, vtt, srt, tsv and json. NAME is that
    of the audio without folder and extension; json_full is written to NAME.full.json. Options are those of
    SubtitleOptions. A file is written as a whole or not at all, in UTF-8 with "\\n" at line ends; an older one of the
    name is replaced.
    Raises ValueError for an unknown format; the writer raises OSError where it cannot write, and ValueError where the
    result lacks what a format or option needs.
    """
    parse_formats(format)

    def write(result: Result, audio_path: str | os.PathLike[str], **options: Any) -> list[Path]:
        return write_files(result, Path(output_dir) / output_name(audio_path), format, **options)

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


def write_whole(path: Path, content: str | bytes) -> None:
    """Replaces the file by `content` (text as UTF-8) or, if that fails, leaves it as it was.

    Raises OSError with the path and what to do.
    """
    # Not a tempfile: those are readable by their owner alone, while the output is to have the user's usual permissions.
    unfinished = path.with_name(f"{UNFINISHED}{secrets.token_hex(8)}.tmp")
    try:
        with open(unfinished, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.replace(unfinished, path)
    except OSError as error:
        raise type(error)(
            f"cannot write {path}: {error.strerror}; make room there, or choose another folder"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)


def _one_line(text: str) -> str:
    return " ".join(re.split(r"[\r\n]+", text))
