"""Reads Hugging Face's folders: config.json, safetensors or pytorch_model.bin, whole or in shards, tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from weight_loader.checkpoint import Checkpoint
from weight_loader.folder import CheckpointError, read_config, read_json, shards
from weight_loader.names import PROJ_OUT, parameters
from weight_loader.readers import safetensors, torch_pickle
from whisper_nnx.model.config import WhisperConfig

# Weight files, or indices of shards, in order of precedence, as in transformers.
_KINDS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def detect(path: Path) -> bool:
    """Detects a folder with weights and a config.json of this format (or no readable one), or a weight file."""
    if path.is_dir():
        return weights(path) is not None and is_config(path, default=True)
    if safetensors.is_safetensors(path):
        return any(".layers." in name for name in safetensors.names(path))
    return torch_pickle.is_torch_file(path) and any(".layers." in name for name in _state(path))


def read(path: Path) -> Checkpoint:
    """Raises CheckpointError for files that are missing, damaged, malicious or not floating point."""
    folder = path if path.is_dir() else path.parent
    kind = weights(folder) if path.is_dir() else path.name
    files = shards(folder / kind) if kind and kind.endswith(".index.json") else [folder / (kind or _KINDS[0])]
    config = read_config(folder)
    tensors = _named(_tensors(files), config)
    return Checkpoint("hf", str(path), config, None, tensors, {"files": ", ".join(file.name for file in files)})


def is_config(folder: Path, *, default: bool = False) -> bool:
    """Whether the folder's config.json is Hugging Face's; `default` if it cannot be read."""
    try:
        config = read_json(folder / "config.json")
    except CheckpointError:
        return default
    return ("d_model" in config or "model_type" in config) and "n_mels" not in config  # which is MLX's


def weights(folder: Path) -> str | None:
    """Returns the name of the weight file or shard index; None if the folder has none."""
    return next((name for name in _KINDS if (folder / name).is_file()), None)


def _tensors(files: list[Path]) -> Iterator[tuple[str, np.ndarray]]:
    for file in files:
        # By content, since some safetensors files are named .bin.
        yield from (
            torch_pickle.arrays(file, _state(file)) if torch_pickle.is_torch_file(file) else safetensors.tensors(file)
        )


def _state(file: Path) -> dict[str, Any]:
    """Returns the tensors by name if torch.save's file is a plain dictionary of them."""
    saved = torch_pickle.load(file)
    return saved if torch_pickle.is_state(saved) else {}


def _named(tensors: Iterator[tuple[str, np.ndarray]], config: WhisperConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Adds the prefix that WhisperModel's files lack, and drops a tied output layer."""
    known = {p.stored["hf"].name for p in parameters(config)}
    for name, array in tensors:
        if name == PROJ_OUT.stored["hf"].name and config.tie_word_embeddings:
            continue
        yield f"model.{name}" if f"model.{name}" in known else name, array
