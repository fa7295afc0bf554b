"""What lies in a checkpoint's folder besides its weights: configuration and tokenizer."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from whisper_nnx.config import WhisperConfig
from whisper_nnx.tokenizer import Tokenizer

CONFIG_FILES = ("config.json", "generation_config.json")
# Shards are asked for by their usual names: some repositories hold the same weights once more, as model.fp32-*.
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors")


class CheckpointError(ValueError):
    """A checkpoint cannot be fetched or used; the message, one line, says why and what to do."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError where there is none."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}; give the folder of a whole Hugging Face checkpoint"
        ) from None
    except ValueError as error:  # no UTF-8, or no JSON
        raise CheckpointError(f"{path} is no valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a JSON object; download it again")
    return content


def read_config(folder: Path) -> WhisperConfig:
    """From `config.json`, with the alignment heads of `generation_config.json` where that is there."""
    config, generation_file = read_json(folder / "config.json"), folder / "generation_config.json"
    generation = read_json(generation_file) if generation_file.exists() else {}
    try:
        return WhisperConfig.from_hf(config, generation)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error


def read_tokenizer(folder: Path, config: WhisperConfig) -> Tokenizer | None:
    """The checkpoint's own tokenizer; None, with a warning, where it brings none."""
    try:
        return Tokenizer.from_folder(folder, config.vocab_size)
    except FileNotFoundError as error:
        warnings.warn(f"{error} (the model loads, but transcribe() needs a tokenizer)", stacklevel=2)
        return None
    except ValueError as error:
        raise CheckpointError(str(error)) from error
