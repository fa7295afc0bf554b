"""Reads configuration, tokenizer and shard lists in a checkpoint's folder."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from whisper_nnx.model.config import WhisperConfig
from whisper_nnx.runtime.files import read_regular
from whisper_nnx.text.tokenizer import Tokenizer

CONFIG_FILES = ("config.json", "generation_config.json")
_MAX_JSON = 4 * 2**20  # bytes; the list of large-v3's shards has 130,000
# Exceptions of parsers on malformed files.
_MALFORMED = (
    ValueError,
    TypeError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
    EOFError,
    struct.error,
)


class CheckpointError(ValueError):
    """A checkpoint cannot be downloaded or used; the message, one line, gives the reason and the fix."""


@contextmanager
def reading(where: str | Path) -> Iterator[None]:
    """Converts exceptions caused by a malformed file into a CheckpointError with `where` and the cause.

    A last resort around a whole reader: readers give more specific messages, and are tested without it.
    """
    try:
        yield
    except CheckpointError:
        raise
    except _MALFORMED as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CheckpointError(f"{where} is damaged or not a Whisper checkpoint ({what}); download it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file. Raises CheckpointError if there is none."""
    try:
        data = read_regular(path, _MAX_JSON)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}; give the folder of a complete Hugging Face checkpoint"
        ) from None
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:  # invalid UTF-8 or JSON
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} contains a {type(content).__name__}, expected an object; download it again")
    return content


def read_config(folder: Path) -> WhisperConfig:
    """Reads `config.json`, with the alignment heads of `generation_config.json` if it exists."""
    config, generation_file = read_json(folder / "config.json"), folder / "generation_config.json"
    generation = read_json(generation_file) if generation_file.exists() else {}
    try:
        return WhisperConfig.from_hf(config, generation)
    except (TypeError, ValueError, OverflowError) as error:  # JSON may contain infinity
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error


def read_tokenizer(folder: Path, vocab_size: int) -> Tokenizer | None:
    """Reads a folder's tokenizer files; None if there are none. Raises CheckpointError if they do not fit the model."""
    try:
        return Tokenizer.from_folder(folder, vocab_size)
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(str(error)) from error


def read_alignment_heads(folder: Path, config: WhisperConfig) -> WhisperConfig:
    """Adds the alignment heads of `generation_config.json`, if it exists and the decoder has these heads."""
    file = folder / "generation_config.json"
    if config.alignment_heads is not None or not file.is_file():
        return config
    try:
        return WhisperConfig.from_hf(config.to_hf(), read_json(file))
    except OverflowError as error:
        raise CheckpointError(f"{file}: {error}") from error


def shards(index: Path) -> list[Path]:
    """Returns the files named by an index of shards. Raises CheckpointError for files outside its folder."""
    weight_map, suffix = read_json(index).get("weight_map"), Path(index.name.removesuffix(".index.json")).suffix
    named = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not named or not all(isinstance(name, str) for name in named):
        raise CheckpointError(f"{index} has no weight_map from tensors to files; download it again")
    names = sorted(set(named))
    for name in names:
        if Path(name).name != name or "\\" in name or "\0" in name or not name.endswith(suffix):
            kind = suffix.removeprefix(".")
            raise CheckpointError(f"{index} names {name!r}, not a {kind} file in its folder; it may be malicious")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent} lacks {name}, which {index.name} names; download it again")
    return [index.parent / name for name in names]
