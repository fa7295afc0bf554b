"""Writes CTranslate2's folder, for faster-whisper, with CTranslate2's own converter."""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from weight_loader.checkpoint import Content
from weight_loader.folder import CheckpointError
from weight_loader.vocabulary import tokenizer_of
from weight_loader.writers import huggingface

DTYPES = ("float32", "float16", "bfloat16", "int8", "int8_float32", "int8_float16", "int8_bfloat16", "int16")
FOLDER = True
_COPIED = ["tokenizer.json", "preprocessor_config.json"]  # also read by faster-whisper


def write(content: Content, path: Path, dtype: str) -> list[str]:
    """Raises CheckpointError if the converter is not installed or fails."""
    if content.tokenizer is None:
        raise CheckpointError("ct2 needs a tokenizer, but the model has none; give --tokenizer FOLDER")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.") as folder, _quiet():
        huggingface.write(_with_tokenizer_json(content), Path(folder) / "hf", None)
        try:
            from ctranslate2.converters import TransformersConverter

            converter = TransformersConverter(f"{folder}/hf", copy_files=_COPIED)
            converter.convert(str(path), quantization=dtype)
        except ImportError as error:
            why = f"ct2 is written by CTranslate2's converter, which needs the package {error.name or error}"
            raise CheckpointError(f"{why}; pip install ctranslate2 transformers torch") from error
        except Exception as error:  # any exception of CTranslate2, transformers or torch
            line = " ".join(f"{type(error).__name__}: {error}".split())
            raise CheckpointError(
                f"CTranslate2's converter failed ({line}); try another dtype, or update it"
            ) from error
    return []


def _with_tokenizer_json(content: Content) -> Content:
    """Adds a tokenizer.json, without which faster-whisper would download that of tiny from the Hub."""
    tokenizer = content.tokenizer
    if tokenizer is None or "tokenizer.json" in tokenizer.files:
        return content
    vocabulary = tokenizer.vocabulary
    added = {text: i for text, (i, _) in vocabulary.added.items()}
    return replace(content, tokenizer=tokenizer_of(vocabulary.text, added, content.config.vocab_size))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses warnings and progress bars of other packages."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
