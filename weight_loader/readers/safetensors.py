"""`model.safetensors`, whole or in shards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes  # noqa: F401  teaches numpy the name bfloat16
import numpy as np
from safetensors import SafetensorError, safe_open

from weight_loader.folder import CheckpointError, read_json

_FLOATS = ("F64", "F32", "F16", "BF16")


def tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Name and array of every tensor in the folder's safetensors files, read when its turn comes.

    Raises CheckpointError for files that are missing, damaged or not made of floating-point numbers.
    """
    for file in _files(folder):
        try:
            # pread rather than mmap: pages of a mapped file would count as memory of this process, all at once.
            stored = safe_open(file, "np", backend="pread")
        except SafetensorError as error:
            raise CheckpointError(_what_is_wrong(file, error)) from error
        with stored:
            for name in stored.offset_keys():
                if (dtype := stored.get_slice(name).get_dtype()) not in _FLOATS:
                    raise CheckpointError(
                        f"{file}: {name} is stored as {dtype}, expected one of {', '.join(_FLOATS)}; "
                        "take the checkpoint that this one was quantized from"
                    )
                yield name, stored.get_tensor(name)


def _files(folder: Path) -> list[Path]:
    """The file, or the shards that the index names; where both are there the single file counts, as in transformers."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        held = "only pytorch_model.bin" if (folder / "pytorch_model.bin").exists() else "no model.safetensors"
        raise CheckpointError(
            f"{folder} has {held}; convert what it has with transformers: "
            "WhisperForConditionalGeneration.from_pretrained(MODEL).save_pretrained(FOLDER)"
        )
    weight_map = read_json(index).get("weight_map")
    named = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not named or not all(isinstance(name, str) for name in named):
        raise CheckpointError(f"{index} has no weight_map from tensors to files; download it again")
    names = sorted(set(named))
    for name in names:
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {name!r}, no safetensors file in its folder; do not trust it")
        if not (folder / name).exists():
            raise CheckpointError(f"{folder} has no {name}, which {index.name} names; download it again")
    return [folder / name for name in names]


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
        header = stream.read(expected - 8) if expected <= size else b""
    try:
        expected += max(entry["data_offsets"][1] for name, entry in json.loads(header).items() if name[:2] != "__")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        if header or expected > 100_000_000:  # the format's limit for a header
            return f"{file} is no safetensors file ({error}); {again}"
    if size < expected:
        return f"{file} is truncated: {size} bytes of {'' if header else 'at least '}{expected}; {again}"
    return f"{file} is damaged ({error}); {again}"
