"""Files of safetensors: a header in JSON, then the arrays as they lie in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  teaches numpy the name bfloat16
import numpy as np
from safetensors import SafetensorError, safe_open

from weight_loader.folder import CheckpointError

FLOATS = ("F64", "F32", "F16", "BF16")
_MAX_AXES = 8
_MAX_HEADER = 16 * 2**20  # bytes; large-v3's has 150,000


def is_safetensors(file: Path) -> bool:
    """Whether the file begins with a header of this format: its length in 8 bytes, then a JSON object."""
    with file.open("rb") as stream:
        start = stream.read(9)
    return len(start) == 9 and start[8:] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= file.stat().st_size - 8


def names(file: Path) -> list[str]:
    """The tensors' names. Raises CheckpointError for a file that is damaged."""
    with _opened(file) as stored:
        return list(stored.keys())


def metadata(file: Path) -> dict[str, str]:
    """What the header says of the whole file. Raises CheckpointError for a file that is damaged."""
    with _opened(file) as stored:
        return dict(stored.metadata() or {})


def tensors(file: Path, dtypes: tuple[str, ...] = FLOATS) -> Iterator[tuple[str, np.ndarray]]:
    """Name and array of every tensor in the file, read when its turn comes.

    Raises CheckpointError for a file that is damaged or has tensors of other dtypes than those (the format's names).
    """
    with _opened(file) as stored:
        for name in stored.offset_keys():
            header = stored.get_slice(name)
            check_axes(file, name, header.get_shape())
            if (dtype := header.get_dtype()) not in dtypes:
                raise CheckpointError(
                    f"{file}: {name} is stored as {dtype}, expected one of {', '.join(dtypes)}; "
                    "take the checkpoint that this one was quantized from"
                )
            yield name, stored.get_tensor(name)


def check_axes(file: Path, name: str, shape: Sequence[int]) -> None:
    """Raises CheckpointError for more axes than any tensor of a Whisper has; numpy has a limit too, of 64."""
    if len(shape) > _MAX_AXES:
        raise CheckpointError(f"{file}: {name[:80]!r} has {len(shape)} axes, expected at most {_MAX_AXES}")


def _opened(file: Path) -> Any:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    try:
        if length > _MAX_HEADER:  # the library would take up to 100 MB, and several times that to understand it
            raise SafetensorError(f"a header of {length} bytes")
        # pread rather than mmap: pages of a mapped file would count as memory of this process, all at once.
        return safe_open(file, "np", backend="pread")
    except SafetensorError as error:
        raise CheckpointError(_what_is_wrong(file, error)) from error


def _what_is_wrong(file: Path, error: SafetensorError) -> str:
    """An empty, truncated or altogether different file. The format: 8 bytes of header length, header, data."""
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
            return f"{file} is no safetensors file ({error}); {again}"
    if size < expected:
        return f"{file} is truncated: {size} bytes of {'' if header else 'at least '}{expected}; {again}"
    return f"{file} is damaged ({error}); {again}"
