"""Readers, one module per format. Each has

    detect(path) -> bool        whether the content (magic bytes, archive members, JSON keys) is of its format
    read(path) -> Checkpoint    raises CheckpointError or OSError, in one line, for damaged or malicious files

for a folder or a single file. Tensors are yielded one at a time, and only those in `names.parameters`: masks or a copy
of a tied output layer are skipped. Formats without tokenizer or alignment heads return None for them;
`open_checkpoint` looks for them elsewhere.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from weight_loader.checkpoint import Checkpoint
from weight_loader.folder import CheckpointError, read_alignment_heads, reading
from whisper_nnx.model.config import RELEASED, RELEASED_ALIGNMENT_HEADS, WhisperConfig, released_alignment_heads

# In order of preference: a folder may contain several formats, and Hugging Face's is the most complete.
READERS = ("peft", "huggingface", "openai", "mlx", "ggml", "ctranslate2", "flax_msgpack")


def reader(name: str) -> Any:
    """Returns the module of one of READERS."""
    return importlib.import_module(f"{__name__}.{name}")


def open_checkpoint(path: Path, **options: Any) -> Checkpoint:
    """Opens a folder or file with the reader that detects its content.

    options: token and cache_dir of `load_model`, for the base model of an adapter.
    Raises FileNotFoundError if the path does not exist, CheckpointError for unknown formats and damaged files.
    """
    with reading(path):
        checkpoint = read_checkpoint(path, **options)
    checkpoint.tensors = _guarded(path, checkpoint.tensors)
    return checkpoint


def read_checkpoint(path: Path, **options: Any) -> Checkpoint:
    """Like `open_checkpoint`, but does not convert exceptions that readers did not anticipate."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a folder or a file with a checkpoint")
    if not path.is_dir() and not path.is_file():
        raise CheckpointError(f"{path} is a pipe or a device; give a folder or a regular file with a checkpoint")
    for name in READERS:
        if (module := reader(name)).detect(path):
            checkpoint: Checkpoint = module.read(path, **(options if name == "peft" else {}))
            checkpoint.config = _with_alignment_heads(checkpoint, path)
            return checkpoint
    raise CheckpointError(f"{path} {_describe(path)}")


def _guarded(path: Path, tensors: Iterator[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """Converts exceptions while reading tensors, but not those of the code that uses them."""
    while True:
        with reading(path):
            if (item := next(tensors, None)) is None:
                return
        yield item
        del item  # before the next is read


def _with_alignment_heads(checkpoint: Checkpoint, path: Path) -> WhisperConfig:
    """Adds alignment heads to the configuration if the format cannot store them.

    They come from a generation_config.json next to the file, else from the released model that the file is named
    after, else from the released model of this shape.
    """
    config = read_alignment_heads(path if path.is_dir() else path.parent, checkpoint.config)
    if config.alignment_heads is not None or checkpoint.format in ("hf", "flax"):
        return config
    named = RELEASED_ALIGNMENT_HEADS.get(path.stem) if RELEASED.get(path.stem) == config else None
    return replace(config, alignment_heads=named or released_alignment_heads(config))


def _describe(path: Path) -> str:
    known = "supported: Hugging Face, OpenAI .pt, MLX, ggml .bin, CTranslate2, Flax msgpack and PEFT folders"
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir())
        some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        return f"contains no readable checkpoint ({some or 'it is empty'}); {known}"
    with path.open("rb") as stream:
        start = stream.read(8)
    if not start:
        return "is empty; download it again"
    if start == b"version ":
        return "is a Git LFS pointer, not the file itself; run `git lfs pull`"
    if start.startswith(b"PK"):
        return f"is a zip archive without a checkpoint, or damaged; download it again ({known})"
    return f"is not a readable checkpoint (it starts with {start!r}); {known}"
