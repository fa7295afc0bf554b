"""CTranslate2's folder, for faster-whisper: written by CTranslate2's own converter, from Hugging Face's folder."""

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
_COPIED = ["tokenizer.json", "preprocessor_config.json"]  # what faster-whisper reads besides


def write(content: Content, path: Path, dtype: str) -> list[str]:
    """Raises CheckpointError where the converter is not installed, or fails."""
    if content.tokenizer is None:
        raise CheckpointError("ct2 needs a tokenizer, and the model has none; give --tokenizer FOLDER")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.") as folder, _quiet():
        huggingface.write(_with_tokenizer_json(content), Path(folder) / "hf", None)
        try:
            from ctranslate2.converters import TransformersConverter

            converter = TransformersConverter(f"{folder}/hf", copy_files=_COPIED)
            converter.convert(str(path), quantization=dtype)
        except ImportError as error:
            why = f"ct2 is written by CTranslate2's own converter, which needs the package {error.name or error}"
            raise CheckpointError(f"{why}; pip install ctranslate2 transformers torch") from error
        except Exception as error:  # whatever CTranslate2, transformers or torch raise
            line = " ".join(f"{type(error).__name__}: {error}".split())
            raise CheckpointError(
                f"CTranslate2's converter failed ({line}); try another dtype, or update it"
            ) from error
    return []


def _with_tokenizer_json(content: Content) -> Content:
    """faster-whisper reads no vocab.json; without a tokenizer.json it would ask the Hub for tiny's."""
    tokenizer = content.tokenizer
    if tokenizer is None or "tokenizer.json" in tokenizer.files:
        return content
    vocabulary = tokenizer.vocabulary
    added = {text: i for text, (i, _) in vocabulary.added.items()}
    return replace(content, tokenizer=tokenizer_of(vocabulary.text, added, content.config.vocab_size))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings and progress bars of others."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
