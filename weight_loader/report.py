"""Describes the contents of a checkpoint and what is missing."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from weight_loader.checkpoint import Checkpoint
from weight_loader.folder import CheckpointError, read_tokenizer
from weight_loader.hub import checkpoint_path
from weight_loader.load import differences, expected_shapes, find_tokenizer, listing, model_info, without_computed
from weight_loader.readers import open_checkpoint
from whisper_nnx.model.config import released_alignment_heads

_FORMATS = {
    "hf": "Hugging Face",
    "openai": "openai-whisper",
    "mlx": "MLX",
    "ggml": "ggml (whisper.cpp)",
    "ct2": "CTranslate2 (faster-whisper)",
    "flax": "Flax msgpack (Hugging Face)",
}


def report(name_or_path: str | os.PathLike[str]) -> tuple[list[str], bool]:
    """Returns lines of text and whether the weights are complete. Reads every tensor, one at a time.

    Raises FileNotFoundError and CheckpointError as `load_model` does.
    """
    path = checkpoint_path(name_or_path)
    checkpoint = open_checkpoint(path)
    rows = {
        "path": str(path),
        "format": _FORMATS[checkpoint.format],
        **checkpoint.details,
        **model_info(checkpoint.config),
    }
    shapes, dtypes = _weights(checkpoint)
    rows["stored"] = ", ".join(f"{name}: {n} arrays, {size / 1e6:,.0f} MB" for name, (n, size) in dtypes.items())
    heads = checkpoint.config.alignment_heads or released_alignment_heads(checkpoint.config)
    rows["word times"] = f"{len(heads)} alignment heads" if heads else "no alignment heads; uses the upper half's"
    rows["tokenizer"], rows["languages"] = _tokenizer(checkpoint, path)
    problems = differences(without_computed(expected_shapes(checkpoint), shapes), shapes)
    for kind in ("missing", "unexpected", "misshapen"):
        if names := problems.get(kind):
            rows[kind] = listing(names, 5)
    if not problems:
        rows["missing"] = "nothing"
    width = max(map(len, rows))
    return [f"{name:{width}}  {text}" for name, text in rows.items()], not problems


def _weights(checkpoint: Checkpoint) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, int]]]:
    """Returns shapes by name, and (arrays, bytes) by dtype after dequantization."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, tuple[int, int]] = {}
    for name, array in checkpoint.tensors:
        shapes[name] = array.shape
        n, size = dtypes.get(str(array.dtype), (0, 0))
        dtypes[str(array.dtype)] = n + 1, size + int(np.prod(array.shape)) * array.itemsize
    return shapes, dtypes


def _tokenizer(checkpoint: Checkpoint, path: Path) -> tuple[str, str]:
    try:
        found = find_tokenizer(checkpoint, path, None, warn=False)
    except CheckpointError as error:
        return f"unusable: {error}", "unknown"
    if found is None:
        return "none; give tokenizer=FOLDER or a name such as 'tiny' when loading", "unknown"
    codes = " ".join(found.languages) if found.is_multilingual else "en"
    if checkpoint.tokenizer:
        return "from the checkpoint", codes
    beside = read_tokenizer(path if path.is_dir() else path.parent, checkpoint.config.vocab_size)
    return ("from the files beside it" if beside else "of the released models"), codes
