"""Reads OpenAI's .pt files, written by torch.save: {"dims": sizes, "model_state_dict": tensors}.

They have neither tokenizer nor alignment heads; openai-whisper includes both, and selects the heads by model name.
Files written by this package also store the heads, under "alignment_heads".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weight_loader.checkpoint import Checkpoint
from weight_loader.folder import CheckpointError
from weight_loader.readers import torch_pickle
from whisper_nnx.model.config import WhisperConfig

# OpenAI's name of each size -> ours. The width occurs twice and must be equal.
DIMENSIONS = {
    "n_mels": "num_mel_bins",
    "n_audio_ctx": "max_source_positions",
    "n_audio_state": "d_model",
    "n_audio_head": "encoder_attention_heads",
    "n_audio_layer": "encoder_layers",
    "n_vocab": "vocab_size",
    "n_text_ctx": "max_target_positions",
    "n_text_state": "d_model",
    "n_text_head": "decoder_attention_heads",
    "n_text_layer": "decoder_layers",
}


def config_of(dimensions: dict[str, Any], where: str, alignment_heads: Any = None) -> WhisperConfig:
    """Makes a WhisperConfig of OpenAI's sizes. Raises CheckpointError if some are missing or invalid."""
    if missing := [name for name in DIMENSIONS if name not in dimensions]:
        raise CheckpointError(f"{where}: its sizes lack {', '.join(missing)}; download it from its original source")
    if dimensions["n_audio_state"] != dimensions["n_text_state"]:
        widths = f"n_audio_state={dimensions['n_audio_state']!r} and n_text_state={dimensions['n_text_state']!r}"
        raise CheckpointError(f"{where}: {widths} must be equal; download it from its original source")
    sizes = {ours: dimensions[theirs] for theirs, ours in DIMENSIONS.items()}
    heads = alignment_heads or []
    pairs = isinstance(heads, list | tuple) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in heads)
    if not pairs or not all(type(number) is int for number in (*sizes.values(), *(n for pair in heads for n in pair))):
        raise CheckpointError(f"{where}: its sizes or alignment heads are not whole numbers; it may be malicious")
    try:
        return WhisperConfig(**sizes, alignment_heads=alignment_heads)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error


def dimensions_of(config: WhisperConfig) -> dict[str, int]:
    """Returns a configuration's sizes by OpenAI's names."""
    return {theirs: getattr(config, ours) for theirs, ours in DIMENSIONS.items()}


def detect(path: Path) -> bool:
    """Detects a torch.save file with `dims`, or a folder with one such file."""
    return (file := _file(path)) is not None and {"dims", "model_state_dict"} <= _saved(file).keys()


def read(path: Path) -> Checkpoint:
    """Raises CheckpointError for a file that is damaged or malicious."""
    file = _file(path) or path
    saved = _saved(file)
    dimensions, state = saved["dims"], saved["model_state_dict"]
    if not isinstance(dimensions, dict) or not isinstance(state, dict):
        raise CheckpointError(
            f"{file}: dims and model_state_dict are not dictionaries; download it from its original source"
        )
    if not torch_pickle.is_state(state):
        raise CheckpointError(f"{file}: model_state_dict contains more than tensors by name; it may be malicious")
    config = config_of(dimensions, str(file), saved.get("alignment_heads"))
    return Checkpoint("openai", str(file), config, None, torch_pickle.arrays(file, state))


def _file(path: Path) -> Path | None:
    if path.is_dir():
        files = [file for file in path.glob("*.pt") if file.is_file()]
        path = files[0] if len(files) == 1 else path
    return path if path.is_file() and torch_pickle.is_torch_file(path) else None


def _saved(file: Path) -> dict[str, Any]:
    saved = torch_pickle.load(file)
    return saved if isinstance(saved, dict) else {}
