"""Recordings inside another file: members of a tar, rows of parquet or of a saved dataset, cuts of Lhotse.

The plan notes where each one is (`Recording.part`), and a worker reads it when its turn comes: of a tar a range of
bytes, of parquet the row group, of a recording that is cut the whole. Two row groups and two recordings are kept.
"""

from __future__ import annotations

import os
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial, wraps
from typing import TYPE_CHECKING, Any, BinaryIO

from whisper_nnx.audio.remote import is_remote, open_remote
from whisper_nnx.audio.suffixes import SUFFIXES

if TYPE_CHECKING:
    import numpy as np

AUDIO_KEYS = ("audio", "audio_filepath", "file_name", "path")  # columns; the first one found is used
PARQUET, TAR = ".parquet", ".tar"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_wholes = threading.Semaphore(4)  # recordings of cuts that are decoded at once: each is in memory as a whole
_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # how gzip, bzip2, xz and zstd start


@dataclass(frozen=True)
class Part:
    """A recording that was found in a file.

    Attributes:
      name: in that file.
      place: where it is, for `read_part`; with `size` in bytes, measured or estimated.
      path: of a file of its own, that the row names instead.
      id, duration: if the row states them.
    """

    name: str
    place: dict[str, Any] | None = None
    path: str | None = None
    id: Any = None
    duration: Any = None


def is_container(path: str) -> bool:
    return path.lower().endswith((TAR, PARQUET, *COMPRESSED)) or os.path.isfile(os.path.join(path, "dataset_info.json"))


def parts(path: str) -> Iterator[Part]:
    """The recordings in a file, or in a folder of `datasets`. Raises ValueError if it cannot be read."""
    if path.lower().endswith((TAR, *COMPRESSED)):
        yield from _tar_parts(path)
    elif path.lower().endswith(PARQUET):
        yield from _parquet_parts(path)
    else:
        yield from _dataset_parts(path)


def read_part(path: str, place: dict[str, Any], **options: Any) -> str | bytes | np.ndarray:
    """The recording at that place, as `transcribe` takes it. Raises OSError or ValueError if it cannot be read.

    options: of `load_audio`, for a part of a recording.
    """
    if "member" in place:
        with open_file(path) as file:
            file.seek(place["offset"])
            found = file.read(place["size"])
        if len(found) < place["size"]:
            raise ValueError(f"{path} ends within {place['member']}; copy it again")
        return found
    if "start" in place:
        from whisper_nnx.audio.constants import SAMPLE_RATE

        start, end = (round(at * SAMPLE_RATE) for at in (place["start"], place["start"] + place["duration"]))
        whole = _samples(path, tuple(place.get("channels", ())), **options)
        return whole[start:end].copy()  # a view would keep the whole
    if "row_group" in place:
        value = _row_group(path, place["row_group"], place["column"])[place["at"]].as_py()
    else:
        value, path = _dataset(path)[place["row"]]["audio"], f"{path}/"
    encoded, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if encoded:
        return encoded
    if not name:
        raise ValueError(f"{path}, row {place['row'] + 1}: no recording")
    return beside(path, name)


def beside(path: str, name: str) -> str:
    """The path that a file names, seen from its folder."""
    if is_remote(name):
        return name
    folder = path.rpartition("/")[0] if is_remote(path) else os.path.dirname(path)
    return f"{folder}/{name}" if is_remote(folder) else os.path.join(folder, name)


@contextmanager
def open_file(path: str) -> Iterator[BinaryIO]:
    """Opens a path or a URL."""
    if is_remote(path):
        with open_remote(path) as file:
            yield file
    else:
        with open(path, "rb") as file:
            yield file


def _tar_parts(path: str) -> Iterator[Part]:
    try:
        with open_file(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # of which there may be millions
                name = member.name
                if member.isfile() and os.path.splitext(name)[1].lower() in SUFFIXES and not _is_hidden(name):
                    yield Part(name, {"member": name, "offset": member.offset_data, "size": member.size})
    except tarfile.TarError as error:
        with open_file(path) as file:
            if file.read(8).startswith(_MAGIC):
                raise ValueError(
                    f"{path} is compressed: its members cannot be read one by one; decompress it first (gzip -d)"
                ) from None
        raise ValueError(f"{path} cannot be read as a tar ({error}); copy it again") from None


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _parquet_parts(path: str) -> Iterator[Part]:
    """Rows of parquet. Their bytes are not read: each has about its share of the row group's."""
    pa = _pyarrow()
    with open_file(path) as source:
        file = _parquet_file(source, path)
        schema, first = file.schema_arrow, 0
        column = next((key for key in AUDIO_KEYS if key in schema.names), None)
        if column is None:
            raise ValueError(f"{path} has no column of recordings; name it {', '.join(AUDIO_KEYS)}")
        kind = schema.field(column).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        held, named = (f"{column}.bytes", f"{column}.path") if pa.types.is_struct(kind) else (column, column)
        holds_paths = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if not (
            holds_paths
            or any(check(kind) for check in (pa.types.is_struct, pa.types.is_binary, pa.types.is_large_binary))
        ):
            raise ValueError(f"{path}: column {column} is of type {kind}; give paths, bytes, or both")
        about = [name for name in ("id", "duration") if name in schema.names]
        for group in range(file.num_row_groups):
            meta = file.metadata.row_group(group)
            n_bytes = None if holds_paths else _bytes_held(meta, held)
            columns = about if n_bytes else [*about, named]
            rows = file.read_row_group(group, columns=columns).to_pylist() if columns else [{}] * meta.num_rows
            for row, found in enumerate(rows):
                value = found.pop(column, None)
                name = value["path"] if isinstance(value, dict) else value
                place = {"row": first + row, "row_group": group, "column": column, "at": row}
                if n_bytes:
                    yield Part(str(first + row), place | {"size": n_bytes // meta.num_rows}, **found)
                elif name:
                    yield Part(name, path=beside(path, name), **found)
                else:  # reading it reports the error
                    yield Part(str(first + row), place | {"size": 0}, **found)
            first += meta.num_rows


def _bytes_held(meta: Any, column: str) -> int | None:
    """Bytes of a column in a row group; None if all its rows are null, or there is none."""
    for chunk in map(meta.column, range(meta.num_columns)):
        if chunk.path_in_schema == column:
            empty = chunk.statistics is not None and chunk.statistics.null_count == meta.num_rows
            return None if empty else chunk.total_uncompressed_size
    return None


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError('parquet needs the package pyarrow: pip install "whisper-nnx[jobs]"') from None
    return pyarrow


def _parquet_file(source: Any, path: str) -> Any:
    pa = _pyarrow()
    try:
        return pa.parquet.ParquetFile(source)
    except (pa.ArrowInvalid, OSError) as error:  # OSError: its footer is damaged
        raise ValueError(f"{path} cannot be read as parquet ({' '.join(str(error).split())}); copy it again") from None


class _Once:
    """Calls a function when its result is first asked for; other threads wait for it."""

    def __init__(self, function: Callable[[], Any]):
        self._function, self._lock, self._found = function, threading.Lock(), None

    def __call__(self) -> Any:
        with self._lock:
            if self._found is None:
                self._found = self._function()
            return self._found


def _kept(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator: the last two results are kept, and threads that need the same one get it from one call."""
    lock = threading.Lock()
    latest = lru_cache(maxsize=2)(lambda *args, **options: _Once(partial(function, *args, **options)))

    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        with lock:
            once = latest(*args, **options)
        return once()

    return call


@_kept
def _row_group(path: str, group: int, column: str) -> Any:
    with open_file(path) as source:
        return _parquet_file(source, path).read_row_group(group, columns=[column]).column(0)


@_kept
def _samples(path: str, channels: tuple[int, ...], **options: Any) -> np.ndarray:
    """A whole recording, or the mean of some of its channels."""
    from whisper_nnx.audio.loading import load_audio, load_channels

    with _wholes:
        if not channels:
            return load_audio(path, **options)
        return load_channels(path, **options)[1][list(channels)].mean(axis=0)


def _dataset(path: str) -> Any:
    from whisper_nnx.data.manifest import open_dataset

    return open_dataset(path)


def _dataset_parts(path: str) -> Iterator[Part]:
    """Rows of a dataset that `datasets` has saved; how many bytes each has is known without reading them."""
    data = _dataset(path)
    if "audio" not in data.column_names:
        raise ValueError(f"{path} has no column audio; it has {', '.join(data.column_names)}")
    import pyarrow.compute as pc

    about, first = [name for name in ("id", "duration") if name in data.column_names], 0
    for batch in data.data.to_batches():
        audio = batch.column("audio")
        sizes = pc.binary_length(pc.struct_field(audio, "bytes")).to_pylist()
        paths = pc.struct_field(audio, "path").to_pylist()
        for row, found in enumerate(batch.select(about).to_pylist(), first):
            size, name = sizes[row - first], paths[row - first]
            if size or not name:  # with neither, reading it reports the error
                yield Part(str(row), {"row": row, "size": size or 0}, **found)
            else:
                yield Part(name, path=beside(f"{path}/", name), **found)
        first += batch.num_rows
