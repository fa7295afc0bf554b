"""Reads safetensors files: a JSON header, then the raw arrays."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
import numpy as np
from safetensors import SafetensorError, safe_open

from weight_loader.folder import CheckpointError

FLOATS = ("F64", "F32", "F16", "BF16")
_MAX_AXES = 8
_MAX_HEADER = 16 * 2**20  # bytes; large-v3's has 150,000


def is_safetensors(file: Path) -> bool:
    """Whether the file starts with a header of this format: its length in 8 bytes, then a JSON object."""
    with file.open("rb") as stream:
        start = stream.read(9)
    return len(start) == 9 and start[8:] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= file.stat().st_size - 8


def names(file: Path) -> list[str]:
    """Returns the tensors' names. Raises CheckpointError for a damaged file."""
    with _opened(file) as stored:
        return list(stored.keys())


def metadata(file: Path) -> dict[str, str]:
    """Returns the header's metadata. Raises CheckpointError for a damaged file."""
    with _opened(file) as stored:
        return dict(stored.metadata() or {})


def tensors(file: Path, dtypes: tuple[str, ...] = FLOATS) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the name and array of every tensor, reading them one at a time.

    Raises CheckpointError for a damaged file, or for dtypes (by the format's names) other than those given.
    """
    with _opened(file) as stored:
        for name in stored.offset_keys():
            header = stored.get_slice(name)
            check_axes(file, name, header.get_shape())
            if (dtype := header.get_dtype()) not in dtypes:
                raise CheckpointError(
                    f"{file}: {name} is stored as {dtype}, expected one of {', '.join(dtypes)}; "
                    "use the unquantized checkpoint"
                )
            yield name, stored.get_tensor(name)


def check_axes(file: Path, name: str, shape: Sequence[int]) -> None:
    """Raises CheckpointError for more axes than any Whisper tensor has; numpy itself fails above 64."""
    if len(shape) > _MAX_AXES:
        raise CheckpointError(f"{file}: {name[:80]!r} has {len(shape)} axes, expected at most {_MAX_AXES}")


def _opened(file: Path) -> Any:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    try:
        if length > _MAX_HEADER:  # the library accepts up to 100 MB, and parses it in several times that memory
            raise SafetensorError(f"a header of {length} bytes")
        # pread instead of mmap, whose pages would all count as memory of this process.
        return safe_open(file, "np", backend="pread")
    except SafetensorError as error:
        raise CheckpointError(_diagnosis(file, error)) from error


def _diagnosis(file: Path, error: SafetensorError) -> str:
    """Tells empty, truncated and other files apart. The format: 8 bytes of header length, header, data."""
    again = f"delete {file.resolve()} and download it again"
    size = file.stat().st_size
    if size == 0:
        return f"{file} is empty; {again}"
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            return f"{file} is a Git LFS pointer, not the file itself; run `git lfs pull`"
        expected = 8 + int.from_bytes(start, "little")
        header = stream.read(expected - 8) if expected <= min(size, _MAX_HEADER) else b""
    try:
        expected += max(entry["data_offsets"][1] for name, entry in json.loads(header).items() if name[:2] != "__")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        if header or expected > _MAX_HEADER:
            return f"{file} is not a safetensors file ({error}); {again}"
    if size < expected:
        return f"{file} is truncated: {size} bytes of {'' if header else 'at least '}{expected}; {again}"
    return f"{file} is damaged ({error}); {again}"
