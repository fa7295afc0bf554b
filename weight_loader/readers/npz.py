"""Opens archives of numpy arrays (`np.savez`, `mx.savez`) so that each array can be read separately.

https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import math
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from weight_loader.folder import CheckpointError
from weight_loader.readers.torch_pickle import _archive

# The header that numpy and MLX write for plain numbers. Numpy evaluates it as Python; weights need no other headers.
_HEADER = re.compile(rb"{'descr': '([^']{1,20})', 'fortran_order': (True|False), 'shape': \(([\d, ]*)\),? *}\s*")
_MAGIC = b"\x93NUMPY\1\0"
_DTYPES = {f"<{kind}": np.dtype(f"<{kind}") for kind in ("f8", "f4", "f2", "u4", "i4", "i8")}
_DTYPES["<V2"] = np.dtype(ml_dtypes.bfloat16)  # both write it as two bytes without a name
_MAX_RATIO = 50  # unpacked to packed; weights hardly compress, a zip bomb expands a thousand times
_CHUNK = 2**22  # bytes
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError, OverflowError, ValueError)


class Stored(NamedTuple):
    """An array in an open file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def is_npz(file: Path) -> bool:
    """Whether the file is a zip archive with only arrays. Raises CheckpointError if it is damaged."""
    with file.open("rb") as stream:
        if stream.read(4) != b"PK\3\4":
            return False
    with _archive(file) as archive:
        return all(name.endswith(".npy") for name in archive.namelist())


@contextmanager
def opened(file: Path) -> Iterator[dict[str, Stored]]:
    """Opens the archive's arrays by name. Raises CheckpointError, here or in `read`, if damaged or malicious."""
    with _archive(file) as archive:
        members = archive.infolist()
        unpacked, packed = sum(member.file_size for member in members), file.stat().st_size
        if unpacked > _MAX_RATIO * packed:
            raise CheckpointError(f"{file} would unpack to {unpacked} bytes from {packed}; it may be malicious")
        if odd := [member.filename for member in members if not member.filename.isprintable()]:
            raise CheckpointError(f"{file} has the member {_short(ascii(odd[0]))}; it may be malicious")
        yield {member.filename.removesuffix(".npy"): _stored(archive, member, file) for member in members}


def _stored(archive: zipfile.ZipFile, member: zipfile.ZipInfo, file: Path) -> Stored:
    try:
        descr, in_columns, shape, start = _header(archive, member)
    except _DAMAGED as error:
        raise _damaged(file, member, error) from error
    if descr not in _DTYPES:
        kinds = "float32, float16, bfloat16 or the integers of quantized ones"
        raise CheckpointError(f"{file}: {_short(member.filename)} is stored as {descr!r}, expected {kinds}")
    dtype = _DTYPES[descr]
    size = math.prod(shape) * dtype.itemsize
    if 0 in shape or len(shape) > 8 or start + size != member.file_size:
        what = f"has {member.file_size - start} bytes for the shape {_short(shape)}"
        raise CheckpointError(f"{file}: {_short(member.filename)} {what}; download it again")

    def read() -> np.ndarray:
        buffer, offset = np.empty(size, np.uint8), 0
        try:
            with archive.open(member) as stream:
                stream.read(start)
                while piece := stream.read(min(_CHUNK, size - offset)):
                    buffer[offset : offset + len(piece)] = np.frombuffer(piece, np.uint8)
                    offset += len(piece)
            if offset < size:
                raise EOFError(f"{size - offset} bytes are missing")
        except _DAMAGED as error:
            raise _damaged(file, member, error) from error
        return buffer.view(dtype).reshape(shape, order="F" if in_columns else "C")

    return Stored(dtype, shape, read)


def _header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[str, bool, tuple[int, ...], int]:
    """Reads an array's dtype, whether it is column-major, its shape, and the offset of its data."""
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"compressed by method {member.compress_type}")
    with archive.open(member) as stream:
        start = stream.read(len(_MAGIC) + 2)
        header = stream.read(int.from_bytes(start[len(_MAGIC) :], "little"))
    match = _HEADER.fullmatch(header)
    if not start.startswith(_MAGIC) or not match:
        raise ValueError("not the header of a numeric array")
    shape = tuple(int(length) for length in match[3].split(b",") if length.strip())
    return match[1].decode("latin-1"), match[2] == b"True", shape, len(start) + len(header)


def _damaged(file: Path, member: zipfile.ZipInfo, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file}: {_short(member.filename)} is damaged ({_short(error)}); download it again")


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
