"""`export`: the transcripts of a job as subtitles, text or tables, parquet, and cuts of Lhotse."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints, is_typeddict

from whisper_nnx.audio.files import choose_stream, open_container
from whisper_nnx.audio.loading import open_binary
from whisper_nnx.audio.remote import is_remote
from whisper_nnx.jobs.inputs import Recording
from whisper_nnx.jobs.job import Job, put_lasting
from whisper_nnx.output.results import Transcript
from whisper_nnx.output.subtitles import SubtitleOptions
from whisper_nnx.output.writers import (
    ESCAPED,
    TOKEN_FORMATS,
    WRITERS,
    make_output_folder,
    output_name,
    parse_formats,
    write_files,
    write_whole,
)
from whisper_nnx.runtime.console import one_line
from whisper_nnx.runtime.packages import require_packages

_NO_FILE = "{} is not a file, which cuts refer to; lhotse needs recordings in files of their own"
EXPORT = "export"  # folder in that of a job
_SUBTITLES = tuple(one.name for one in fields(SubtitleOptions))
_SETTINGS = ("output_format", *_SUBTITLES)  # of a job, on which its transcripts do not depend
_OF_PLAN = ("input", "model", "planned_by", "shard_s", "version")  # settings that are no options of `transcribe`


def export(job: Job, folder: str | os.PathLike[str], formats: str, **options: Any) -> int:
    """Writes the shards that are done -> how many recordings. What is there already is replaced.

    Args:
      job: whose results are written.
      folder: `000012.parquet` and `cuts.000012.jsonl.gz` come in it, a file a shard, and the others in
        `000012/NAME.ID.srt`, a file a recording.
      formats: those of the writers, "parquet" or "lhotse"; "srt,parquet": several.
      options: of subtitles.

    Raises:
      ValueError: an unknown format; results lack what a format or an option needs.
      OSError: a file cannot be written.
      ImportError: parquet needs the package pyarrow.
    """
    export_settings(formats, options, job.settings)
    count = 0
    make_output_folder(folder)
    for shard in job.written("results"):
        if "lhotse" in formats.split(","):
            list(exportable(job.shard(shard), {"output_format": formats}))
        with job.path("results", shard).open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        export_shard(job, shard, rows, Path(folder), formats, **options)
        count += len(rows)
    return count


def export_shard(
    job: Job,
    shard: int,
    rows: list[dict[str, Any]],
    folder: Path,
    formats: str,
    put: Callable[[Path, Path], None] = put_lasting,
    **options: Any,
) -> None:
    """Writes the transcripts of a shard; see `export`, and `write_whole` for `put`."""
    files, tables = split_formats(formats)
    for table in tables:
        name, encode = TABLES[table]
        write_whole(folder / name.format(f"{shard:06d}"), encode(job, rows), put)
    for row in rows if files else ():
        write_files(row, folder / f"{shard:06d}" / _stem(row), ",".join(files), put, **options)


def origin(job: Job) -> dict[str, Any]:
    """How the transcripts of a job were made, for each of them: version, digest of the model, options that were set."""
    model = job.folder / "model.txt"
    options = {name: value for name, value in job.settings.items() if name not in (*_SETTINGS, *_OF_PLAN)}
    about = {"version": job.settings.get("version"), "model": model.read_text("utf-8") if model.exists() else None}
    return {name: value for name, value in (about | {"options": options}).items() if value}


def export_settings(formats: str | None, subtitles: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a job whose workers write these formats, too, with options of subtitles; none without formats.

    Raises ValueError for what is unknown, or needs other options of `transcribe` than these; see also `split_formats`.
    """
    if subtitles and (formats is None or not split_formats(formats)[0]):
        name, value = next(iter(subtitles.items()))
        raise ValueError(f"{name}={value} has no effect without output_format=srt, for example")
    if formats is None:
        return {}
    names = sorted({name for group in split_formats(formats) for name in group})
    SubtitleOptions(**subtitles)
    needed = {f"output_format={name}": "token_timestamps" for name in TOKEN_FORMATS if name in names}
    for name, value in subtitles.items():
        by_token = name == "max_len" and not subtitles.get("split_on_word")
        needed[f"{name}={value}"] = "token_timestamps" if by_token else "word_timestamps"
    for what, option in needed.items():
        if not options.get(option):
            raise ValueError(f"{what} requires {option}=True")
    return {"output_format": ",".join(names), **subtitles}


def exportable(recordings: Iterable[Recording], settings: Mapping[str, Any]) -> Iterator[Recording]:
    """The recordings of a job with these settings. Raises ValueError for one that its formats cannot refer to."""
    needs_files = "lhotse" in settings.get("output_format", "").split(",")
    for one in recordings:
        is_inside = one.part is not None and "start" not in one.part and one.n_bytes
        if needs_files and (is_inside or _is_chained(one.audio)):
            raise ValueError(_NO_FILE.format(one.name))
        yield one


def _is_chained(audio: str) -> bool:
    """Whether it is a URL of fsspec for a file in another one, such as tar://talk.flac::/data/a.tar."""
    return is_remote(audio) and "::" in audio


def export_planned(job: Job, shard: int, rows: list[dict[str, Any]], put: Callable[[Path, Path], None]) -> None:
    """Writes the formats that a job was planned with, if any; see `write_whole` for `put`."""
    if formats := job.settings.get("output_format"):
        (folder := job.folder / EXPORT).mkdir(exist_ok=True)
        options = {name: job.settings[name] for name in _SUBTITLES if name in job.settings}
        export_shard(job, shard, rows, folder, formats, put, **options)


def split_formats(formats: str) -> tuple[list[str], list[str]]:
    """Formats of a file for each recording, and of one for each shard.

    Raises ValueError for an unknown one, and MissingPackageError if that of one is not installed.
    """
    names = formats.split(",")
    if unknown := [name for name in names if name not in (*WRITERS, *TABLES, "all")]:
        raise ValueError(f"format={unknown[0]!r} is unknown; choose {', '.join([*WRITERS, *TABLES, 'all'])}")
    if "parquet" in names:
        require_packages("parquet", "jobs", "pyarrow")
    files = ",".join(name for name in names if name not in TABLES)
    return parse_formats(files) if files else [], [name for name in TABLES if name in names]


def _stem(row: dict[str, Any]) -> str:
    """The name of a recording and its id, which tells it from others of the same name."""
    id_ = row["id"]
    if not re.fullmatch(r"[a-z0-9_-]{1,64}", id_):  # no name of a file, or equal to another where case is ignored
        id_ = hashlib.sha256(id_.encode(errors=ESCAPED)).hexdigest()[:16]
    audio = row["audio"].partition("::")[0] if _is_chained(row["audio"]) else row["audio"]
    name = re.sub(r"[^\w.-]+", "_", output_name(audio))
    return f"{name.encode()[:80].decode(errors='ignore')}.{id_}"  # names of files have at most 255 bytes


def _parquet(job: Job, rows: list[dict[str, Any]]) -> bytes:
    """The rows with the types of `Transcript`, and how they were made, with options as JSON.

    The settings of the job and the model's digest are also in the metadata.
    """
    import pyarrow as pa
    import pyarrow.parquet

    columns = {"id": str, "audio": str, "offset": float, **get_type_hints(Transcript)}
    columns |= dict.fromkeys(("version", "model", "options"), str)
    settings = {name: value for name, value in job.settings.items() if name not in _SETTINGS}
    about = {"settings": json.dumps(settings), "model": origin(job).get("model", "")}
    schema = pa.schema([(name, _arrow_type(hint)) for name, hint in columns.items()], about)
    names = [{key: row[key].encode(errors=ESCAPED).decode() for key in ("id", "audio")} for row in rows]
    others = [
        {"retries": list(row.get("retries", {}).items()), "options": json.dumps(row.get("options", {}))} for row in rows
    ]
    table = pa.Table.from_pylist([row | own | more for row, own, more in zip(rows, names, others, strict=True)], schema)
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def _arrow_type(hint: Any) -> Any:
    import pyarrow as pa

    if is_typeddict(hint):
        return pa.struct([(name, _arrow_type(inner)) for name, inner in get_type_hints(hint).items()])
    if get_origin(hint) is list:
        return pa.list_(_arrow_type(get_args(hint)[0]))
    if get_origin(hint) is dict:
        return pa.map_(*map(_arrow_type, get_args(hint)))
    return {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}[hint]


def _lhotse(job: Job, rows: list[dict[str, Any]]) -> bytes:
    lines = [json.dumps(cut, ensure_ascii=False) + "\n" for cut in _cuts(rows, job.settings.get("audio_track"))]
    return gzip.compress("".join(lines).encode(errors=ESCAPED), mtime=0)


def _cuts(rows: list[dict[str, Any]], track: int | None) -> Iterator[dict[str, Any]]:
    """A cut for each recording that can still be read, and of which Lhotse reads the track that was transcribed."""
    for row in rows:
        try:
            yield _cut(row, track)
        except (OSError, ValueError) as error:
            audio, reason = row["audio"], one_line(error)
            named = reason if audio in reason else f"{audio}: {reason}"
            warnings.warn(f"{named}; lhotse's cuts are without it", stacklevel=2)


def _cut(row: dict[str, Any], track: int | None) -> dict[str, Any]:
    """A cut with a supervision for each segment, whose times count from the start of the cut."""
    recording = _lhotse_recording(row, track)
    every = recording.pop("channel_ids")
    channels = row.get("channels", every)
    several = len(channels) > 1
    cut = {"id": row["id"], "start": row.get("offset", 0.0), "duration": row["duration"]}
    if "offset" not in row:
        cut["duration"] = recording["duration"]
    cut |= {"channel": channels if several else channels[0], "recording": recording}
    cut |= {"supervisions": list(_supervisions(row, cut, channels))}
    return cut | {"type": "MultiCut" if several else "MonoCut"}


def _supervisions(row: dict[str, Any], cut: dict[str, Any], channels: list[int]) -> Iterator[dict[str, Any]]:
    for number, segment in enumerate(row["segments"]):
        start, end = (min(segment[key], cut["duration"]) for key in ("start", "end"))
        if not start < end:
            continue
        found = {"id": f"{row['id']}-{number}", "recording_id": cut["recording"]["id"]}
        found |= {"start": start, "duration": round(end - start, 8), "channel": cut["channel"]}
        found |= {"text": segment["text"].strip(), "language": segment.get("language", row["language"])}
        found |= {"speaker": segment["speaker"]} if "speaker" in segment else {}
        found["custom"] = {"avg_logprob": segment["avg_logprob"], "no_speech_prob": segment["no_speech_prob"]}
        if words := segment.get("words"):
            spans = [(w["word"].strip(), w["start"], round(w["end"] - w["start"], 8), w["probability"]) for w in words]
            found["alignment"] = {"word": spans}
        yield found


def _lhotse_recording(row: dict[str, Any], track: int | None) -> dict[str, Any]:
    """As Lhotse describes a file: from its header, or by the duration that was found where it states none.

    track: that was transcribed.
    """
    audio, duration_s = row["audio"], row["duration"]
    with open_binary(audio) as (file, name), open_container(file) as container:
        stream = choose_stream(container, name, None)
        if choose_stream(container, name, track) != stream:
            raise ValueError(f"{name}: audio_track={track} was transcribed, but lhotse would read another track")
        rate, channels = stream.rate, list(range(stream.channels))
        if stream.duration and stream.time_base:
            duration_s = float(stream.duration * stream.time_base)
    source = {"type": "url" if is_remote(name) else "file", "channels": channels, "source": audio}
    n_samples = round(duration_s * rate)
    recording = {"id": row["id"], "sources": [source], "sampling_rate": rate, "num_samples": n_samples}
    return recording | {"duration": n_samples / rate, "channel_ids": channels}


# Name of a shard's file, and what is in it.
TABLES: dict[str, tuple[str, Callable[[Job, list[dict[str, Any]]], bytes]]] = {
    "parquet": ("{}.parquet", _parquet),
    "lhotse": ("cuts.{}.jsonl.gz", _lhotse),
}
