"""Reads and validates manifests, which list recordings and their texts."""

from __future__ import annotations

import base64
import csv
import json
import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whisper_nnx.audio.files import open_container
from whisper_nnx.audio.loading import SAMPLE_RATE, load_audio, open_binary
from whisper_nnx.audio.remote import is_remote
from whisper_nnx.text.languages import to_language_code

if TYPE_CHECKING:
    from whisper_nnx.text.tokenizer import Tokenizer

TASKS = ("transcribe", "translate")
# Column names; the first one found is used. `sentence`, `locale` and `path` are Common Voice's.
_TEXT_KEYS = ("text", "sentence", "transcription")
_LANGUAGE_KEYS = ("language", "locale")
_AUDIO_KEYS = ("audio", "file_name", "path")
_CLIPS = "clips"  # Common Voice's folder of recordings
_SHOWN_LINES = 5
_SHOWN_KINDS = 20
_SLACK_S = 0.1  # by which times may exceed the recording's duration


@dataclass(frozen=True)
class Span:
    """Timed text of a recording; start and end in s."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class StoredAudio:
    """A recording in a saved Hugging Face dataset, which `load_audio` reads like a file."""

    folder: str
    index: int

    @property
    def name(self) -> str:
        """Name for messages."""
        return f"row {self.index + 1} of {self.folder}"

    def read(self, size: int = -1) -> bytes:
        """Returns the whole encoded recording."""
        return open_dataset(self.folder)[self.index]["audio"]["bytes"]


@dataclass(frozen=True)
class Row:
    """One recording. audio: what `load_audio` takes (str: a URL); duration: in s; line: in the manifest, from 1."""

    audio: Path | str | bytes | StoredAudio
    text: str
    language: str  # a code; "" if there is no speech and none is given
    duration: float
    line: int
    task: str = "transcribe"
    segments: tuple[Span, ...] | None = None
    words: tuple[Span, ...] | None = None
    previous_text: str = ""
    source: str = ""
    no_speech: bool = False
    manifest: str = ""  # its path


@dataclass(frozen=True)
class Problem:
    """Why a line of a manifest cannot be used."""

    line: int
    reason: str

    @property
    def kind(self) -> str:
        """The reason without this line's values: equal for lines with the same fault."""
        return re.sub(r"^.*?: (?=file not found|cannot be read)|'.*?'|\".*?\"|[\d.]+", "", self.reason)


@dataclass(frozen=True)
class Manifest:
    rows: list[Row]
    problems: list[Problem]


def problem_lines(manifest: str | Path, problems: Sequence[Problem]) -> list[str]:
    """Summarizes problems, one line per kind, the most frequent first: the first reason and the other line numbers."""
    kinds: dict[str, list[Problem]] = {}
    for problem in problems:
        kinds.setdefault(problem.kind, []).append(problem)
    lines = []
    groups = sorted(kinds.values(), key=len, reverse=True)
    for first, *others in groups[:_SHOWN_KINDS]:
        numbers = ", ".join(str(other.line) for other in others[:_SHOWN_LINES])
        more = ", ..." if len(others) > _SHOWN_LINES else ""
        rows = (
            f"; {len(others):,} more such row{'s' * (len(others) > 1)}: line{'s' * (len(others) > 1)} {numbers}{more}"
        )
        lines.append(f"{manifest}:{first.line}: {first.reason}{rows if others else ''}")
    if rest := sum(map(len, groups[_SHOWN_KINDS:])):
        lines.append(f"{manifest}: {rest:,} more rows cannot be used, for other reasons")
    return lines


def limits_of(tokenizer: Tokenizer, language: str = "") -> dict[str, Any]:
    """Arguments of `read_manifest` for a model: its languages and tasks, and the language of rows without one."""
    if tokenizer.is_multilingual:
        return {"languages": tokenizer.languages, "language": language or None}
    return {"languages": ("en",), "tasks": TASKS[:1], "language": language or "en"}


def read_manifest(
    path: str | Path,
    languages: Collection[str] | None = None,
    max_duration_s: float | None = None,
    *,
    language: str | None = None,
    needs_language: bool = True,
    tasks: Collection[str] = TASKS,
) -> Manifest:
    """Reads a manifest into usable rows, and a problem for each row that cannot be used.

    Args:
      path: JSON lines or a .csv or .tsv table, with audio paths relative to its folder (or its `clips`, as in Common
        Voice); or a folder: a dataset saved to disk by `datasets`, or recordings with a metadata.jsonl or metadata.csv.
      languages: allowed language codes; None: all that Whisper knows.
      max_duration_s: longest recording.
      language: of rows without one.
      needs_language: whether a row with speech but without a language is a problem.
      tasks: allowed tasks.

    Raises:
      FileNotFoundError: `path` does not exist.
      ValueError: the folder or table cannot be read, or `language` is unknown.
    """
    path = Path(path)
    rows: list[Row] = []
    problems: list[Problem] = []
    allowed = _Allowed(
        None if languages is None else frozenset(languages),
        None if language is None else to_language_code(language),
        needs_language,
        tasks,
    )
    for line, entry in _entries(path):
        try:
            row = _row(entry, line, path, allowed)
            if max_duration_s is not None and row.duration > max_duration_s:
                raise ValueError(f"lasts {row.duration:.1f} s, at most {max_duration_s:g} s can be used; cut it")
            rows.append(row)
        except (ValueError, OSError) as error:
            problems.append(Problem(line, str(error)))
    return Manifest(rows, problems)


@dataclass(frozen=True)
class _Allowed:
    """Allowed values of rows; see `read_manifest`."""

    languages: Collection[str] | None
    language: str | None
    needs_language: bool
    tasks: Collection[str]


def _entries(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields (line number, a dict or the bytes of a line of JSON)."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: manifest not found; check the path")
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            raise ValueError(f"{path} contains several splits; give the folder of one, such as {path / 'train'}")
        if (path / "dataset_info.json").is_file():
            yield from enumerate(_stored_entries(path), 1)
            return
        names = [path / name for name in ("metadata.jsonl", "metadata.csv") if (path / name).is_file()]
        if not names:
            raise ValueError(
                f"{path} is not a dataset: it lacks dataset_info.json, metadata.jsonl and metadata.csv; "
                "give a file of JSON lines, a .csv or .tsv table, or a folder with one of these files"
            )
        path = names[0]
    if path.suffix in (".csv", ".tsv"):
        yield from _table_entries(path)
    else:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line


def _table_entries(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields (line number, non-empty columns by name). Quotes in a .tsv are literal, as in Common Voice's."""
    tabs: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, **tabs)
        try:
            for entry in reader:
                yield reader.line_num, {key: value for key, value in entry.items() if value}  # key None: surplus fields
        except (csv.Error, UnicodeDecodeError) as error:
            fix = "save it as UTF-8 with a column header"
            raise ValueError(
                f"{path} cannot be read as a table after line {reader.line_num} ({error}); {fix}"
            ) from None


@lru_cache(maxsize=8)
def open_dataset(folder: str) -> Any:
    """Opens a saved dataset, memory-mapped, with its audio left encoded."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{folder}: reading a saved dataset needs the package datasets; install it") from None
    data = datasets.load_from_disk(folder)
    if "audio" in data.column_names and isinstance(data.features["audio"], datasets.Audio):
        data = data.cast_column("audio", datasets.Audio(decode=False))
    return data


def _stored_entries(path: Path) -> Iterator[dict[str, Any]]:
    for index, entry in enumerate(open_dataset(str(path))):
        entry = {key: value for key, value in entry.items() if value is not None}
        audio = entry.get("audio")
        if isinstance(audio, dict):  # the bytes are read when needed
            entry["audio"] = StoredAudio(str(path), index) if audio.get("bytes") else audio.get("path")
        yield entry


def _row(entry: Any, line: int, manifest: Path, allowed: _Allowed) -> Row:
    """Validates an entry; raises ValueError or OSError with the reason if it cannot be used."""
    if isinstance(entry, bytes):
        try:
            entry = json.loads(entry)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"is not valid JSON ({error})") from None
    if not isinstance(entry, dict):
        raise ValueError(f"must be a JSON object, not {type(entry).__name__}")
    if None in entry:
        raise ValueError("has more fields than the header; quote texts that contain the delimiter")
    entry = {key: value for key, value in entry.items() if value is not None}
    no_speech = _flag(entry, "no_speech")
    segments = _spans(entry, "segments", "text")
    text = next((entry[key] for key in _TEXT_KEYS if key in entry), None)
    if text is None and segments:
        text = " ".join(segment.text.strip() for segment in segments)
    text = _text(text or "", "text")
    if bool(text.strip()) == no_speech:
        raise ValueError(
            f"has no_speech and the text {text[:40]!r}; drop one of the two"
            if no_speech
            else 'has no text; give one, or "no_speech": true if there is no speech'
        )
    task = entry.get("task", "transcribe")
    if task not in TASKS:
        raise ValueError(f"task {task!r} is unknown; choose 'transcribe' or 'translate'")
    if task not in allowed.tasks:
        raise ValueError(f"task {task!r} is not supported: the model only transcribes English; use a multilingual one")
    language = _language(entry, allowed, optional=no_speech)
    audio = _audio(entry, manifest if manifest.is_dir() else manifest.parent)
    duration = _number(entry["duration"], "duration") if "duration" in entry else _duration_s(audio)
    if "offset" in entry and (_number(entry["offset"], "offset") or _duration_s(audio) > duration + _SLACK_S):
        raise ValueError(f"is a part of a recording, from {entry['offset']} s (its offset); give a file of its own")
    words = _spans(entry, "words", "word", "text")
    for spans in (segments, words):
        if spans and spans[-1].end > duration + _SLACK_S:
            raise ValueError(f"times reach {spans[-1].end:g} s, but the recording lasts {duration:.2f} s")
    return Row(
        audio=audio,
        text=text,
        language=language,
        duration=duration,
        line=line,
        task=task,
        segments=segments or None,
        words=words or None,
        previous_text=_text(entry.get("previous_text", ""), "previous_text"),
        source=_text(entry.get("source", ""), "source"),
        no_speech=no_speech,
        manifest=str(manifest),
    )


def _flag(entry: dict[str, Any], key: str) -> bool:
    value = entry.get(key, False)
    value = value.lower() if isinstance(value, str) else value  # pandas writes "True"
    if value not in (False, True, "", "true", "false"):
        raise ValueError(f"{key} is {value!r}; give true or false")
    return value in (True, "true")


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key} is {value!r}; give a string")
    return value


def _number(value: Any, key: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"{key} is {value!r}; give seconds, at least 0")
    return number


def _language(entry: dict[str, Any], allowed: _Allowed, optional: bool) -> str:
    named = next((entry[key] for key in _LANGUAGE_KEYS if entry.get(key)), "")
    named = _text(named, "language") or allowed.language or ""
    if not named:
        if optional or not allowed.needs_language:
            return ""
        raise ValueError('has no language; give its code, such as "en", or a language for all rows without one')
    languages = allowed.languages
    code = named if languages is not None and named in languages else to_language_code(named)
    if languages is not None and code not in languages:
        raise ValueError(f"language {named!r} is not one of the model's; use another model or drop the row")
    return code


def _spans(entry: dict[str, Any], key: str, *text_keys: str) -> tuple[Span, ...]:
    """Reads a list of spans; raises ValueError unless they are in order of time and each has text."""
    listed = entry.get(key, ())
    spans: list[Span] = []
    try:
        if isinstance(listed, str):  # a column of a CSV file
            listed = json.loads(listed)
        for item in listed:
            text = next(item[name] for name in text_keys if name in item)
            start, end = (_number(item[name], f"{key}: {name}") for name in ("start", "end"))
            spans.append(Span(start, end, _text(text, f"{key}: {text_keys[0]}")))
    except (TypeError, KeyError, StopIteration, json.JSONDecodeError):
        raise ValueError(f'{key} must be a list of {{"start", "end", "{text_keys[0]}"}}') from None
    for span in spans:
        if span.end < span.start or not span.text.strip():
            raise ValueError(
                f"{key}: {span.text[:40]!r} lasts from {span.start:g} to {span.end:g} s; give text and times"
            )
    for before, after in pairwise(spans):
        if after.start < before.start or (key == "segments" and after.start < before.end - _SLACK_S):
            raise ValueError(f"{key}: {after.text[:40]!r} starts at {after.start:g} s, before the previous one ends")
    return tuple(spans)


def _audio(entry: dict[str, Any], folder: Path) -> Path | str | bytes | StoredAudio:
    audio = next((entry[key] for key in _AUDIO_KEYS if key in entry), None)
    if isinstance(audio, StoredAudio):
        return audio
    if isinstance(audio, dict) and isinstance(audio.get("bytes"), str):
        try:
            return base64.b64decode(audio["bytes"], validate=True)
        except ValueError as error:
            raise ValueError(f"its audio's bytes are not base64 ({error})") from None
    if not isinstance(audio, str) or not audio:
        raise ValueError('has no audio; give a path, or {"bytes": "..."} in base64')
    if is_remote(audio):
        return audio
    path = folder / audio
    for place in (path, folder / _CLIPS / audio):
        if place.is_file():
            return place
    raise FileNotFoundError(f"{path}: file not found; check the path")


def _duration_s(audio: Path | str | bytes | StoredAudio) -> float:
    """Reads the duration from the file's header, or decodes the file if it is not stated or excludes a late start."""
    import av

    with open_binary(audio if isinstance(audio, Path | str) else _encoded(audio)) as (file, _):
        try:
            with open_container(file) as container:
                (stream,) = container.streams.audio
                alone = len(container.streams) == 1
                if alone and stream.duration and stream.time_base and (stream.start_time or 0) * stream.time_base < 0.1:
                    return float(stream.duration * stream.time_base)
        except (av.FFmpegError, ValueError):
            pass  # load_audio gives the reason
    return len(load_audio(audio)) / SAMPLE_RATE


def _encoded(audio: bytes | StoredAudio) -> bytes:
    return audio if isinstance(audio, bytes) else audio.read()
