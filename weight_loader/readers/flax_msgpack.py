"""Reads `flax_model.msgpack`, whole or in shards: nested dictionaries of arrays written by flax.serialization.

Such a file is a msgpack map of maps. An array is a msgpack extension of type 1 with a list of shape, dtype name and
data in C order; arrays of more than 1 GiB are maps of several chunks with flax's marker. The maps are parsed without
reading the arrays' data, so that each array is read when needed. Msgpack types that checkpoints do not need, such as
other extensions, are rejected.

https://github.com/msgpack/msgpack/blob/master/spec.md,
https://flax.readthedocs.io/en/latest/api_reference/flax.serialization.html
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes  # noqa: F401  teaches numpy the name bfloat16
import numpy as np

from weight_loader.checkpoint import Checkpoint
from weight_loader.folder import CheckpointError, read_config, shards
from weight_loader.names import PROJ_OUT
from weight_loader.readers.stream import Stream
from whisper_nnx.model.config import WhisperConfig

# In order of precedence, as in transformers.
_KINDS = ("flax_model.msgpack", "flax_model.msgpack.index.json")
_DTYPES = {name: np.dtype(name) for name in ("float64", "float32", "float16", "bfloat16")}
# Far above any Whisper (large-v3: 3,000 entries, depth 6): bounds the time to parse a hostile file.
_MAX_ENTRIES = 100_000
_MAX_DEPTH = 32
_MAX_TEXT = 1_000  # bytes

# First byte of a value -> its kind, and its length or its value as a number,
_FIXED = {
    **{first: ("number", first) for first in range(0x80)},
    **{0x80 + length: ("map", length) for length in range(16)},
    **{0x90 + length: ("list", length) for length in range(16)},
    **{0xA0 + length: ("text", length) for length in range(32)},
    **{0xC2 + truth: ("number", truth) for truth in range(2)},
    **{0xD4 + power: ("extension", 2**power) for power in range(5)},
}
# or its kind, and the size in bytes of its length or of the number.
_MEASURED = {
    **{0xC4 + power: ("bytes", 2**power) for power in range(3)},
    **{0xC7 + power: ("extension", 2**power) for power in range(3)},
    **{0xCC + power: ("number", 2**power) for power in range(4)},
    **{0xD9 + power: ("text", 2**power) for power in range(3)},
    **{0xDC + power: ("list", 2 ** (power + 1)) for power in range(2)},
    **{0xDE + power: ("map", 2 ** (power + 1)) for power in range(2)},
}


class _Array(NamedTuple):
    """Location of an array's data: pieces (offset, length) in bytes, in order."""

    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: tuple[tuple[int, int], ...]


def detect(path: Path) -> bool:
    """Detects a folder with such files, or a file that starts with a map whose first key is a word."""
    if path.is_dir():
        return any((path / name).is_file() for name in _KINDS)
    with path.open("rb") as file:
        stream = Stream(file, str(path))
        try:
            kind, length = _next(stream)
            return kind == "map" and length > 0 and re.fullmatch(r"[A-Za-z]\w+", _text(stream)) is not None
        except CheckpointError:
            return False


def read(path: Path) -> Checkpoint:
    """Raises CheckpointError for files that are missing, damaged, malicious or not floating point."""
    folder = path if path.is_dir() else path.parent
    file = next(folder / name for name in _KINDS if (folder / name).is_file()) if path.is_dir() else path
    files = shards(file) if file.name.endswith(".index.json") else [file]
    config = read_config(folder)
    details = {"files": ", ".join(file.name for file in files)}
    return Checkpoint("flax", str(path), config, None, _tensors(files, config), details)


def _tensors(files: list[Path], config: WhisperConfig) -> Iterator[tuple[str, np.ndarray]]:
    for path in files:
        with path.open("rb") as file:
            stream = Stream(file, str(path))
            for name, array in _arrays(stream, _walk(stream)):
                for layer_name, start, shape in _layers(name, array.shape, config):
                    yield layer_name, _numbers(file, array, start, shape)


def _layers(name: str, shape: tuple[int, ...], config: WhisperConfig) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Yields (name in `names`, first element, shape) of an array, or of each layer of a stacked array."""
    if name == PROJ_OUT.stored["flax"].name and config.tie_word_embeddings:
        return
    if name.startswith(("encoder/", "decoder/")):  # a model saved without output layer
        name = f"model/{name}"
    # As in distil-whisper's training, which scans over layers.
    if match := re.fullmatch(r"(model/(encoder|decoder)/layers)/Flax(?:Encoder|Decoder)ScanLayers/(.+)", name):
        layers, size = getattr(config, f"{match[2]}_layers"), math.prod(shape[1:])
        if shape[:1] == (layers,):
            for layer in range(layers):
                yield f"{match[1]}/{layer}/{match[3]}", layer * size, shape[1:]
            return
    yield name, 0, shape


def _numbers(file: BinaryIO, array: _Array, start: int, shape: tuple[int, ...]) -> np.ndarray:
    """Reads an array [*shape] from element `start`."""
    size = array.dtype.itemsize
    buffer, at, skip = np.empty(math.prod(shape) * size, np.uint8), 0, start * size
    for offset, length in array.pieces:
        if skip < length and at < len(buffer):
            into = buffer[at : at + length - skip]
            file.seek(offset + skip)
            file.readinto(into)  # type: ignore[attr-defined]
            at += len(into)
        skip = max(0, skip - length)
    return buffer.view(array.dtype).reshape(shape)


def _walk(stream: Stream) -> dict[str, Any]:
    """Parses a file's maps of `_Array` and numbers. Raises CheckpointError for anything else."""
    entries = 0

    def tree(depth: int) -> Any:
        nonlocal entries
        kind, number = _next(stream)
        if kind == "number":
            return number
        if kind == "extension":
            return _array(stream, number)
        if kind != "map" or depth == _MAX_DEPTH:
            raise stream.error(f"has a {kind} in {depth} maps before {stream.tell()}, expected arrays")
        found: dict[str, Any] = {}
        for _ in range(number):
            entries += 1
            if (key := _text(stream)) in found or entries > _MAX_ENTRIES:
                raise stream.error(f"has {key!r} twice" if key in found else f"has more than {_MAX_ENTRIES} entries")
            found[key] = tree(depth + 1)
        return found

    found = tree(0)
    if not isinstance(found, dict) or stream.left:
        raise stream.error(f"has {stream.left} bytes after its {type(found).__name__}, expected a single map")
    return found


def _arrays(stream: Stream, tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, _Array]]:
    for key, value in tree.items():
        if isinstance(value, dict) and "__msgpack_chunked_array__" in value:
            value = _joined(stream, value, f"{prefix}{key}")
        if isinstance(value, dict):
            yield from _arrays(stream, value, f"{prefix}{key}/")
        elif isinstance(value, _Array):
            yield f"{prefix}{key}", value
        else:
            raise stream.error(f"has the number {value} as {prefix}{key}, expected an array")


def _joined(stream: Stream, tree: dict[str, Any], name: str) -> _Array:
    """Joins an array in chunks; flax writes lists as maps with keys "0", "1", ..."""
    try:
        shape = tuple(tree["shape"][str(axis)] for axis in range(len(tree["shape"])))
        chunks = [tree["chunks"][str(chunk)] for chunk in range(len(tree["chunks"]))]
        (dtype,) = {chunk.dtype for chunk in chunks}
        array = _Array(dtype, shape, tuple(piece for chunk in chunks for piece in chunk.pieces))
        if sum(length for _, length in array.pieces) == math.prod(shape) * dtype.itemsize:
            return array
    except (KeyError, TypeError, AttributeError, ValueError):
        pass
    raise stream.error(f"has {name} in inconsistent chunks")


def _array(stream: Stream, n_bytes: int) -> _Array:
    """Reads the header of an array in an extension of `n_bytes`."""
    (kind,) = stream.bytes(1, "the type of an extension")
    if kind != 1:
        raise stream.error(f"has an extension of type {kind} before {stream.tell()}, expected arrays (1)")
    end = stream.tell() + n_bytes
    _length(stream, "list")  # of three; a shorter one fails below
    ndim = _length(stream, "list")
    if ndim > 8:
        raise stream.error(f"has an array of {ndim} axes before {stream.tell()}")
    shape = tuple(_length(stream, "number") for _ in range(ndim))
    if (name := _text(stream)) not in _DTYPES:
        raise stream.error(f"has an array of {name!r}, expected one of {', '.join(_DTYPES)}")
    length = _length(stream, "bytes")
    start = stream.tell()
    if 0 in shape or start + length != end or length != math.prod(shape) * _DTYPES[name].itemsize:
        raise stream.error(f"has an array of shape {shape} and {name} in {length} bytes at {start}")
    stream.skip(length, f"an array of shape {shape}")
    return _Array(_DTYPES[name], shape, ((start, length),))


def _next(stream: Stream) -> tuple[str, int]:
    """Reads the kind of the next value, and its length in entries or bytes, or its value if it is a number."""
    (first,) = stream.bytes(1, "a value of msgpack")
    if first in _FIXED:
        return _FIXED[first]
    if first not in _MEASURED:
        raise stream.error(f"has a value of msgpack type 0x{first:02x} before {stream.tell()}, expected arrays")
    kind, n_bytes = _MEASURED[first]
    return kind, int.from_bytes(stream.bytes(n_bytes, f"the length of a {kind}"), "big")


def _length(stream: Stream, expected: str) -> int:
    kind, length = _next(stream)
    if kind != expected:
        raise stream.error(f"has a {kind} before {stream.tell()}, expected a {expected}")
    return length


def _text(stream: Stream) -> str:
    if (length := _length(stream, "text")) > _MAX_TEXT:
        raise stream.error(f"has a name of {length} bytes before {stream.tell()}")
    if not (text := stream.text(length, "a name")).isprintable():  # it may appear in a message
        raise stream.error(f"has the name {text!r}")
    return text
