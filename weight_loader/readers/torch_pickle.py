"""Reads files of `torch.save` without torch.

Such a file is a zip archive with `data.pkl`, a pickle of the objects around the tensors, and an uncompressed member
with the data of each storage. https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

import math
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
import numpy as np

from weight_loader.folder import CheckpointError
from weight_loader.readers.pickles import Rejected, Storage, Tensor, short, unpickle

_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # files of torch before 1.6 start with this pickled number
_MAX_PICKLE = 4 * 2**20  # bytes; large-v3's has 300,000
_MAX_DIRECTORY = 4 * 2**20  # bytes of the archive's list of members
_MAX_SHARED = 4  # largest ratio of elements in tensors to elements in their storage; 2 for tied weights
_CHUNK = 2**22


def is_torch_file(file: Path) -> bool:
    """Whether the file is torch.save's, in the format since 1.6 or the earlier one."""
    with file.open("rb") as stream:
        start = stream.read(len(_LEGACY))
    if not start.startswith(b"PK\x03\x04"):
        return start == _LEGACY
    try:
        with _archive(file) as archive:
            return _pickle_name(archive) is not None
    except CheckpointError:
        return False


def load(file: Path) -> Any:
    """Loads dictionaries, lists and tuples of numbers, strings and `Tensor`.

    Raises CheckpointError, without executing anything, if the file is damaged or contains anything else.
    """
    with file.open("rb") as stream:
        if stream.read(len(_LEGACY)) == _LEGACY:
            fix = "load and save it again with torch 1.6 or newer: torch.save(torch.load(FILE), NEW)"
            raise CheckpointError(f"{file} has the format of torch before 1.6; {fix}")
    with _archive(file) as archive:
        name = _pickle_name(archive)
        if name is None:
            raise CheckpointError(f"{file} is a zip archive without data.pkl, so it was not written by torch.save")
        data = b"".join(_read(archive, name, file, _MAX_PICKLE))
    try:
        return unpickle(data)
    except Rejected as error:
        raise CheckpointError(f"{file}: its pickle has {error}; it may be malicious") from error
    except (ValueError, IndexError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        what = f"{type(error).__name__}: {short(str(error))}"
        raise CheckpointError(f"{file}: its pickle is damaged ({what}); download it again") from error


def is_state(saved: Any) -> bool:
    """Whether the loaded object is a dictionary of tensors by name."""
    items = saved.items() if isinstance(saved, dict) else [(None, None)]
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in items)


def arrays(file: Path, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the name and array of each tensor, reading one storage at a time."""
    with _archive(file) as archive:
        prefix = (_pickle_name(archive) or "").removesuffix("data.pkl")
        name = f"{prefix}byteorder"
        order = b"".join(_read(archive, name, file, 10)) if name in archive.NameToInfo else b"little"
        if order != b"little":
            raise CheckpointError(f"{file} has byte order {order!r}; save it on a little-endian machine")
        for storage, views in _by_storage(tensors, file).items():
            numbers = _numbers(archive, f"{prefix}data/{storage.key}", storage, file)
            for name, tensor in views:
                steps = [stride * numbers.itemsize for stride in tensor.strides]
                start = numbers[tensor.offset :]
                yield name, np.lib.stride_tricks.as_strided(start, tensor.shape, steps, writeable=False)
            del numbers, start  # before the next is read


def _by_storage(tensors: Mapping[str, Tensor], file: Path) -> dict[Storage, list[tuple[str, Tensor]]]:
    """Groups tensors by storage, so that each storage is read once."""
    found: dict[Storage, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        found.setdefault(tensor.storage, []).append((name, tensor))
    for storage, views in found.items():
        if (total := sum(math.prod(tensor.shape) for _, tensor in views)) > _MAX_SHARED * storage.length:
            raise CheckpointError(
                f"{file}: {len(views)} tensors of {total} numbers share {storage.length}; it may be malicious"
            )
    return found


def _archive(file: Path) -> zipfile.ZipFile:
    try:
        if _directory_size(file) > _MAX_DIRECTORY:
            raise CheckpointError(f"{file} lists more members than any checkpoint has; it may be malicious")
        archive = zipfile.ZipFile(file)
        if sum(member.compress_size for member in archive.infolist()) > file.stat().st_size:
            archive.close()
            raise CheckpointError(f"{file} has members that overlap; it may be malicious")
        return archive
    except (zipfile.BadZipFile, NotImplementedError, struct.error, IndexError, OverflowError, UnicodeError) as error:
        raise CheckpointError(f"{file} is truncated or damaged ({short(str(error))}); download it again") from error


def _directory_size(file: Path) -> int:
    """Size in bytes of a zip archive's directory, from its last record; Python reads the directory at once."""
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - 2**16 - 100))
        tail = stream.read()
    end, long = tail.rfind(b"PK\5\6"), tail.rfind(b"PK\6\6")
    if end < 0:
        raise zipfile.BadZipFile("the end of the zip archive is missing")
    size = struct.unpack_from("<I", tail, end + 12)[0]
    return struct.unpack_from("<Q", tail, long + 40)[0] if size == 2**32 - 1 and long >= 0 else size


def _pickle_name(archive: zipfile.ZipFile) -> str | None:
    """Finds the member with the pickle, in a folder named after the original file."""
    return next((name for name in archive.namelist() if re.fullmatch(r"([^/]*/)?data\.pkl", name)), None)


def _read(archive: zipfile.ZipFile, name: str, file: Path, most: int) -> Iterator[bytes]:
    """Yields a member's bytes in chunks. Rejects compressed members, which torch.save never writes."""
    try:
        info = archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            raise CheckpointError(f"{file}: {short(name)} is compressed or encrypted, unlike torch.save's files")
        if info.file_size > most:
            raise CheckpointError(f"{file}: {short(name)} has {info.file_size} bytes, expected at most {most}")
        with archive.open(info) as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk
    except KeyError:
        raise CheckpointError(f"{file} has no member {short(name)}; download it again") from None
    except (zipfile.BadZipFile, EOFError, NotImplementedError, struct.error, UnicodeError, OverflowError) as error:
        raise CheckpointError(f"{file} is truncated or damaged ({short(str(error))}); download it again") from error


def _numbers(archive: zipfile.ZipFile, member: str, storage: Storage, file: Path) -> np.ndarray:
    numbers = np.empty(0, storage.dtype)
    size = storage.length * numbers.itemsize
    if member in archive.NameToInfo and (found := archive.getinfo(member).file_size) != size:
        raise CheckpointError(f"{file}: {short(member)} has {found} bytes, expected {size}; download it again")
    if size > file.stat().st_size:
        raise CheckpointError(f"{file} is truncated: {short(member)} alone should have {size} bytes; download it again")
    numbers, offset = np.empty(storage.length, storage.dtype), 0
    into = numbers.view(np.uint8)
    for chunk in _read(archive, member, file, size):
        into[offset : offset + len(chunk)] = np.frombuffer(chunk, np.uint8)
        offset += len(chunk)
    return numbers
