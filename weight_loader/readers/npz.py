"""Archives of numpy arrays (`np.savez`, `mx.savez`), opened so that each array can be read by itself.

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

# As numpy and MLX write it for plain numbers. Numpy evaluates it as Python; what asks for more than this is no weight.
_HEADER = re.compile(rb"{'descr': '([^']{1,20})', 'fortran_order': (True|False), 'shape': \(([\d, ]*)\),? *}\s*")
_MAGIC = b"\x93NUMPY\1\0"
_DTYPES = {f"<{kind}": np.dtype(f"<{kind}") for kind in ("f8", "f4", "f2", "u4", "i4", "i8")}
_DTYPES["<V2"] = np.dtype(ml_dtypes.bfloat16)  # two bytes without a name, to both
_MAX_RATIO = 50  # unpacked to packed; numbers of a model hardly shrink, a zip bomb is a thousand times its file
_CHUNK = 2**22  # bytes
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError, OverflowError, ValueError)


class Stored(NamedTuple):
    """An array in an open file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def is_npz(file: Path) -> bool:
    """Whether the file is a zip archive of arrays alone. Raises CheckpointError for a damaged one."""
    with file.open("rb") as stream:
        if stream.read(4) != b"PK\3\4":
            return False
    with _archive(file) as archive:
        return all(name.endswith(".npy") for name in archive.namelist())


@contextmanager
def opened(file: Path) -> Iterator[dict[str, Stored]]:
    """The archive's arrays by name. Raises CheckpointError, here or in `read`, for what is damaged or hostile."""
    with _archive(file) as archive:
        members = archive.infolist()
        unpacked, packed = sum(member.file_size for member in members), file.stat().st_size
        if unpacked > _MAX_RATIO * packed:
            raise CheckpointError(f"{file} would unpack to {unpacked} bytes from {packed}; do not trust it")
        if odd := [member.filename for member in members if not member.filename.isprintable()]:
            raise CheckpointError(f"{file} has the member {_short(ascii(odd[0]))}; do not trust it")
        yield {member.filename.removesuffix(".npy"): _stored(archive, member, file) for member in members}


def _stored(archive: zipfile.ZipFile, member: zipfile.ZipInfo, file: Path) -> Stored:
    try:
        descr, in_columns, shape, start = _header(archive, member)
    except _DAMAGED as error:
        raise _refused(file, member, error) from error
    if descr not in _DTYPES:
        kinds = "float32, float16, bfloat16 or the integers of quantized ones"
        raise CheckpointError(f"{file}: {_short(member.filename)} is stored as {descr!r}, expected {kinds}")
    dtype = _DTYPES[descr]
    size = math.prod(shape) * dtype.itemsize
    if 0 in shape or len(shape) > 8 or start + size != member.file_size:
        held = f"has {member.file_size - start} bytes for the shape {_short(shape)}"
        raise CheckpointError(f"{file}: {_short(member.filename)} {held}; download it again")

    def read() -> np.ndarray:
        buffer, at = np.empty(size, np.uint8), 0
        try:
            with archive.open(member) as stream:
                stream.read(start)
                while piece := stream.read(min(_CHUNK, size - at)):
                    buffer[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
                    at += len(piece)
            if at < size:
                raise EOFError(f"{size - at} bytes are missing")
        except _DAMAGED as error:
            raise _refused(file, member, error) from error
        return buffer.view(dtype).reshape(shape, order="F" if in_columns else "C")

    return Stored(dtype, shape, read)


def _header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[str, bool, tuple[int, ...], int]:
    """An array's kind, whether it lies column by column, its shape, and where its numbers begin."""
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"compressed by method {member.compress_type}")
    with archive.open(member) as stream:
        start = stream.read(len(_MAGIC) + 2)
        header = stream.read(int.from_bytes(start[len(_MAGIC) :], "little"))
    match = _HEADER.fullmatch(header)
    if not start.startswith(_MAGIC) or not match:
        raise ValueError("no header of an array of numbers")
    shape = tuple(int(length) for length in match[3].split(b",") if length.strip())
    return match[1].decode("latin-1"), match[2] == b"True", shape, len(start) + len(header)


def _refused(file: Path, member: zipfile.ZipInfo, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file}: {_short(member.filename)} is damaged ({_short(error)}); download it again")


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
