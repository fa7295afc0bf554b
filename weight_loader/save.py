"""From a model to files: Hugging Face's folder, and every other format that is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path as FilePath
from typing import cast

from flax import nnx

from weight_loader.checkpoint import Content
from weight_loader.folder import CheckpointError
from weight_loader.names import Path
from weight_loader.writers import huggingface, write_checkpoint
from whisper_nnx.model import Whisper
from whisper_nnx.quantized import Int8Embedding


def save_pretrained(model: Whisper, folder: str | os.PathLike[str], max_shard_size: int | str = "5GB") -> None:
    """Writes weights, configurations and the tokenizer's files, in the model's dtype and Hugging Face's format.

    max_shard_size: bytes, or a text such as "2GB"; weights above it are split into several files and an index.
    Files of the same names are replaced, once all have been written; other weights in the folder are removed.
    """
    folder = FilePath(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        huggingface.write(content_of(model), temporary, None, max_shard_size)
        folder.mkdir(exist_ok=True)
        written = [file.name for file in temporary.iterdir()]
        for name in written:
            os.replace(temporary / name, folder / name)
        for old in folder.glob("model*.safetensors*"):
            if old.name not in written:
                old.unlink()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_model(model: Whisper, path: str | os.PathLike[str], format: str = "hf", dtype: str | None = None) -> list[str]:
    """Writes the model in a format of `writers.WRITERS`, whole or not at all; returns what the format cannot keep.

    path: a folder (hf, mlx, ct2) or a file (openai, ggml) that does not exist yet. dtype: by name, "float16", or what
    else the format has ("q8_0"); default: the model's. Raises CheckpointError for what cannot be.
    """
    return write_checkpoint(content_of(model), path, format, dtype)


def content_of(model: Whisper) -> Content:
    """The model as writers take it. Raises CheckpointError for one whose weights were rounded to 8 bits."""
    if isinstance(model.decoder.embed_tokens, Int8Embedding):
        raise CheckpointError("the model's weights are int8, which no format here stores; load it with other weights")
    state = cast(Iterable[tuple[Path, nnx.Variable]], nnx.to_flat_state(nnx.state(model)))
    arrays = {path: variable[...] for path, variable in state}
    return Content(model.config, model.tokenizer, arrays)
