"""One module per family of files. Each has

    detect(path) -> bool        whether its content (magic bytes, members of an archive, keys of a JSON) is of its kind
    read(path) -> Checkpoint    raises CheckpointError or OSError, in one line, for what is damaged or not to be trusted

for a folder or a single file, and yields tensors one at a time, under the names of `names.parameters` alone: what else
a file holds (masks, a tied output layer once more) it leaves out. A format without a tokenizer gives None, and without
alignment heads none: `open_checkpoint` looks for them elsewhere.
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

# Asked in this order: a folder may hold the same weights twice, and Hugging Face's bring the most with them.
READERS = ("peft", "huggingface", "openai", "mlx", "ggml", "ctranslate2", "flax_msgpack")


def reader(name: str) -> Any:
    """The module of one of READERS."""
    return importlib.import_module(f"{__name__}.{name}")


def open_checkpoint(path: Path, **options: Any) -> Checkpoint:
    """The checkpoint in a folder or file, by whichever reader knows its content.

    options: token and cache_dir of `load_model`, for the base model of an adapter.
    Raises FileNotFoundError for a path to nothing, CheckpointError for what no reader knows or what is damaged.
    """
    with reading(path):
        checkpoint = read_checkpoint(path, **options)
    checkpoint.tensors = _guarded(path, checkpoint.tensors)
    return checkpoint


def read_checkpoint(path: Path, **options: Any) -> Checkpoint:
    """As `open_checkpoint`, but without a last resort: an error that no reader foresaw comes out as it is."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a folder or a file with a checkpoint")
    if not path.is_dir() and not path.is_file():
        raise CheckpointError(f"{path} is a pipe or a device; give a folder or a regular file with a checkpoint")
    for name in READERS:
        if (module := reader(name)).detect(path):
            checkpoint: Checkpoint = module.read(path, **(options if name == "peft" else {}))
            checkpoint.config = _with_alignment_heads(checkpoint, path)
            return checkpoint
    raise CheckpointError(f"{path} {_what_it_is(path)}")


def _guarded(path: Path, tensors: Iterator[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """The same tensors; nothing that is done with them is guarded."""
    while True:
        with reading(path):
            if (item := next(tensors, None)) is None:
                return
        yield item
        del item  # before the next is read


def _with_alignment_heads(checkpoint: Checkpoint, path: Path) -> WhisperConfig:
    """The configuration, with alignment heads where the format has no place for them.

    Those of a generation_config.json beside the file; else those of the released size that the file is named after;
    else of the one that has this shape.
    """
    config = read_alignment_heads(path if path.is_dir() else path.parent, checkpoint.config)
    if config.alignment_heads is not None or checkpoint.format in ("hf", "flax"):
        return config
    named = RELEASED_ALIGNMENT_HEADS.get(path.stem) if RELEASED.get(path.stem) == config else None
    return replace(config, alignment_heads=named or released_alignment_heads(config))


def _what_it_is(path: Path) -> str:
    known = "Hugging Face, OpenAI .pt, MLX, ggml .bin, CTranslate2, Flax msgpack checkpoints and PEFT folders are known"
    if path.is_dir():
        held = sorted(entry.name for entry in path.iterdir())
        some = ", ".join(held[:8]) + (", ..." if len(held) > 8 else "")
        return f"holds no checkpoint that can be read ({some or 'it is empty'}); {known}"
    with path.open("rb") as stream:
        start = stream.read(8)
    if not start:
        return "is empty; download it again"
    if start == b"version ":
        return "is a Git LFS pointer, not the file itself; run `git lfs pull`"
    if start.startswith(b"PK"):
        return f"is a zip archive, and no checkpoint or a damaged one; download it again ({known})"
    return f"is no checkpoint that can be read (it begins with {start!r}); {known}"
