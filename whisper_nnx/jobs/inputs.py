"""What a job transcribes: the recordings of a folder, a pattern, a list, or JSON lines, one after the other."""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import stat
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whisper_nnx.audio.remote import is_remote, remote_errors
from whisper_nnx.audio.suffixes import SUFFIXES
from whisper_nnx.jobs.lhotse import is_lhotse, lhotse_part
from whisper_nnx.jobs.parts import AUDIO_KEYS, TAR, beside, is_container, open_file, parts, read_part

_LISTS, _TABLES = (".txt", ".lst"), (".jsonl", ".json", ".jsonl.gz")

_REQUESTS, _AHEAD = 16, 256  # of servers for sizes: how many at once, and for how many recordings ahead
_BYTES_PER_S = 16_000  # assumed of recordings whose duration is not known


@dataclass(frozen=True)
class Recording:
    """A recording of a job.

    Attributes:
      id: that of its row, or of its path and size.
      audio: path of the file.
      size: of the file, in bytes; -1 if it does not exist.
      modified: when a local file was modified, in whole s since 1970; None if that is not known.
      duration: in s, if the input states it.
      part: where the recording is in that file, if it is not the whole: see `parts`.
    """

    id: str
    audio: str
    size: int
    duration: float | None = None
    part: dict[str, Any] | None = None
    modified: int | None = None

    @property
    def name(self) -> str:
        """Of a file its path, of a member of a tar its URL (as fsspec reads it), of a row PATH#ROW, from 0."""
        part = self.part or {}
        if "member" in part:
            return f"tar://{part['member']}::{self.audio}"
        return f"{self.audio}#{part['row']}" if "row" in part else self.audio

    @property
    def is_cut(self) -> bool:
        """Whether it is a part of a recording, which is decoded as a whole."""
        return self.part is not None and "start" in self.part

    @property
    def n_bytes(self) -> int:
        """About how many bytes it has."""
        return self.size if self.part is None else self.part.get("size", self.size)

    @property
    def about_s(self) -> float:
        """About how long it is, in s: 16,000 bytes a second if the input does not state it."""
        return max(self.n_bytes, 0) / _BYTES_PER_S if self.duration is None else self.duration

    def read(self, **options: Any) -> Any:
        """What `transcribe` takes for it. Raises OSError or ValueError if it cannot be read.

        options: of `load_audio`, for a part of a recording, which is decoded here.
        """
        return self.audio if self.part is None else read_part(self.audio, self.part, **options)


@dataclass(slots=True)
class _Named:
    """A recording as an input names it, before its file is looked at.

    Attributes:
      audio, duration, part: see `Recording`.
      name: in the input.
      id: that of its row.
      size: of the file, if a server has stated it with the name.
    """

    audio: str
    name: str
    id: Any = None
    duration: float | None = None
    part: dict[str, Any] | None = None
    size: int | None = None

    def recording(self) -> Recording:
        size, modified = (self.size, None) if self.size else file_state(self.audio)
        name = self.name if self.part is None else f"{self.name}\0{json.dumps(self.part)}"
        id_ = _id(name, size) if self.id is None else str(self.id)
        return Recording(id_, self.audio, size, self.duration, self.part, modified)


def read_input(source: str) -> Iterator[Recording]:
    """The recordings of an input, as they are found, in an order that does not change from one time to the next.

    source: one of these; all but the last may be URLs, such as s3://bucket/talks:

      - a folder, which is searched to any depth;
      - a pattern (`talks/**/*.mp3`), also of what follows;
      - a list of paths (.txt, .lst), one a line;
      - JSON lines (.jsonl, .json, .jsonl.gz) with `audio` (or `audio_filepath`, `file_name`, `path`), and perhaps `id`
        and `duration`, and `offset` (NeMo's, in s) of a part of a recording; or recordings and cuts of Lhotse;
      - a .tar, of whose members recordings are taken;
      - .parquet with such columns, of paths or bytes;
      - a folder that `datasets` has saved.

    Paths are relative to the folder of the list; a recording that does not exist is listed, too.

    Raises ValueError for a row that names no recording, and FileNotFoundError if the input does not exist.
    """
    waiting = deque[Recording | Future[Recording]]()
    pool = ThreadPoolExecutor(_REQUESTS)
    try:
        for one in itertools.chain.from_iterable(_expanded(*found) for found in _files(source)):
            if isinstance(one, _Named):
                waiting.append(pool.submit(one.recording) if is_remote(one.audio) else one.recording())
            else:
                waiting.append(one)
            if len(waiting) > _AHEAD or isinstance(waiting[0], Recording):
                yield _known(waiting.popleft())
        while waiting:
            yield _known(waiting.popleft())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def some_exist(recordings: Iterable[Recording]) -> Iterator[Recording]:
    """The recordings. Raises FileNotFoundError after the last one if there are only paths of which none exists."""
    first, is_any = None, False
    for one in recordings:
        first, is_any = first or one, is_any or one.size >= 0 or is_remote(one.audio)
        yield one
    if first is not None and not is_any:
        raise FileNotFoundError(f"none of the recordings exists, such as {first.audio}; check that they are mounted")


def _known(one: Recording | Future[Recording]) -> Recording:
    return one if isinstance(one, Recording) else one.result()


def read_places(source: str) -> Iterator[str]:
    """The `place` of each recording of an input at a path, by what is listed: no recording or tar is looked at."""
    for path, name, size in _files(source):
        if path.lower().endswith(TAR):
            yield path
        else:
            yield from (place(one.audio, one.part) for one in _expanded(path, name, size))


def place(audio: str, part: dict[str, Any] | None) -> str:
    """Where a recording is, but of the members of a tar only that."""
    if part is None or "member" in part:
        return audio
    if "row" in part:
        return f"{audio}#{part['row']}"
    of_channels = f" of channels {part['channels']}" if "channels" in part else ""
    return f"{audio} from {part['start']:g} s for {part['duration']:g} s{of_channels}"


def _files(source: str) -> Iterator[tuple[str, str, int | None]]:
    """The files of an input, some of which hold or name recordings -> path, name in the input, size if stated."""
    path = Path(source)
    if is_remote(source):
        yield from _remote(source)
    elif path.is_file() or (is_container(source) and path.exists()):
        yield os.path.abspath(path), path.name, None
    elif path.is_dir():
        if (path / "dataset_dict.json").is_file():
            raise ValueError(f"{path} contains several splits; give the folder of one, such as {path / 'train'}")
        yield from _below(os.path.abspath(path))
    elif glob.has_magic(source):
        fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts[:-1]))
        for match in sorted(glob.iglob(source, recursive=True)):
            if os.path.isfile(match):
                yield os.path.abspath(match), Path(match).relative_to(fixed).as_posix(), None
    else:
        raise FileNotFoundError(f"{source}: no such file, folder or pattern; check the path")


def absolute(source: str) -> str:
    """The name of an input that is the same from any working directory."""
    return source if is_remote(source) else os.path.abspath(source)


def _below(folder: str, before: str = "") -> Iterator[tuple[str, str, None]]:
    """Recordings below a folder, in the order of their names; hidden ones and links to folders are left out.

    A link to nothing is listed: it is a recording that cannot be read.
    """
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _below(entry.path, f"{before}{entry.name}/")
        elif _is_audio(entry.name) and (
            entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path) or not os.path.exists(entry.path)
        ):
            yield entry.path, before + entry.name, None


def _is_audio(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _remote(source: str) -> Iterator[tuple[str, str, int | None]]:
    """The recordings of a folder or a pattern that is a URL, or the one that it names."""
    with remote_errors(source):
        from fsspec.core import url_to_fs

        files, path = url_to_fs(source)
        is_folder = not glob.has_magic(path) and files.isdir(path)
        several = files.find if is_folder else files.glob if glob.has_magic(path) else None
        found = {path: {}} if several is None else several(path, detail=True)
    parts = path.split("/")
    root = path if is_folder else "/".join(itertools.takewhile(lambda part: not glob.has_magic(part), parts[:-1]))
    for one, about in sorted(found.items()):
        name = one.removeprefix(root).strip("/")
        hidden = any(part.startswith(".") for part in name.split("/"))
        if not hidden and (not is_folder or _is_audio(name)):
            yield source if one == path else files.unstrip_protocol(one), name, about.get("size")


def _expanded(path: str, name: str, size: int | None) -> Iterator[_Named | Recording]:
    """A recording, or those that a list names, or those in a tar, in parquet or in a dataset."""
    if _is_audio(path):
        yield _Named(path, name, size=size)
    elif path.lower().endswith((*_LISTS, *_TABLES)):
        read = _listed if path.lower().endswith(_LISTS) else _rows
        unpacked = gzip.open if path.lower().endswith(".gz") else nullcontext
        other = "surrogateescape" if read is _listed else "strict"  # names of files, and bytes that are not UTF-8
        with open_file(path) as file, unpacked(file) as content, io.TextIOWrapper(content, "utf-8-sig", other) as lines:
            try:
                yield from (_below_folder(one, name) for one in read(path, lines))
            except UnicodeDecodeError:
                raise ValueError(f"{path} is not UTF-8 text; convert it") from None
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise ValueError(f"{path} is damaged, or not compressed: {error}; copy it again") from None
    elif is_container(path):
        yield from _contained(path, name)
    else:
        yield _Named(path, name, size=size)


def _below_folder(one: _Named, listed_in: str) -> _Named:
    """A recording that a list names, with the name that it has beside those of other lists of the input."""
    if not is_remote(one.name):
        one.name = os.path.join(os.path.dirname(listed_in), one.name)
    return one


def _contained(path: str, name: str) -> Iterator[_Named | Recording]:
    size, modified = file_state(path)
    for found in parts(path):
        duration = _seconds({"duration": found.duration}, f"{path}, {found.name}")
        if found.place is None:
            assert found.path is not None
            yield _below_folder(_Named(found.path, found.name, found.id, duration), name)
        else:
            id_ = _id(f"{name}\0{found.name}", found.place["size"]) if found.id is None else str(found.id)
            yield Recording(id_, path, size, duration, found.place, modified)


def _listed(path: str, lines: Iterable[str]) -> Iterator[_Named]:
    for line in lines:
        if name := line.strip():
            if not name.isascii() and not _is_text(name) and not os.path.exists(beside(path, name)):
                raise ValueError(f"{path} is not UTF-8 text; convert it")
            yield _Named(beside(path, name), name)


def _is_text(name: str) -> bool:
    return name == name.encode(errors="replace").decode()


def _rows(path: str, lines: Iterable[str]) -> Iterator[_Named]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); each line must be an object") from None
        if isinstance(row, dict) and is_lhotse(row):
            yield _cut(row, path, number)
            continue
        name = next((row[key] for key in AUDIO_KEYS if row.get(key)), None) if isinstance(row, dict) else None
        if not isinstance(name, str):
            raise ValueError(f"{path}, line {number}: no recording; name it by one of {', '.join(AUDIO_KEYS)}")
        place = f"{path}, line {number}"
        if (id_ := row.get("id")) is not None and (
            isinstance(id_, bool) or not isinstance(id_, str | int) or id_ == ""
        ):
            raise ValueError(f"{place}: id={id_!r} must be text or a whole number")
        duration, start_s = _seconds(row, place), _seconds(row, place, "offset")
        if start_s is None:
            yield _Named(beside(path, name), name, id_, duration)
        elif not duration:
            raise ValueError(f"{place}: offset={start_s:g} begins a part of a recording; add its duration")
        else:
            yield _Named(beside(path, name), name, id_, duration, {"start": start_s, "duration": duration})


def _cut(row: dict[str, Any], path: str, number: int) -> _Named:
    try:
        found = lhotse_part(row, path)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from None
    assert found.path is not None
    return _Named(found.path, found.name, found.id, found.duration, found.place)


def _seconds(row: dict[str, Any], place: str, key: str = "duration") -> float | None:
    if (value := row.get(key)) is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"{place}: {key}={value!r} must be a number of seconds")
    return float(value)


def _id(name: str, size: int) -> str:
    return hashlib.sha256(f"{name}\0{size}".encode(errors="backslashreplace")).hexdigest()[:16]


def file_state(path: str) -> tuple[int, int | None]:
    """Size in bytes, -1 if there is no such file or its server does not state it; and when it was modified, if local.

    Of a folder of `datasets` the file that it is described by.
    """
    if is_remote(path):
        from fsspec.core import url_to_fs

        try:
            files, name = url_to_fs(path)
            return files.size(name) or -1, None
        except Exception:  # reading it reports the error
            return -1, None
    try:
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode) and os.path.exists(state := os.path.join(path, "state.json")):
            found = os.stat(state)
        return found.st_size, int(found.st_mtime)
    except (OSError, ValueError):  # ValueError: a name with a null byte
        return -1, None
