"""Tokenizers of the released models, for files without one (OpenAI's, MLX's, some of CTranslate2's).

They are chosen by vocabulary size, as the programs of those formats do.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from weight_loader.folder import CONFIG_FILES, read_tokenizer
from weight_loader.hub import checkpoint_path, repository_of
from weight_loader.vocabulary import tokenizer_from_tiktoken
from whisper_nnx.model.config import RELEASED
from whisper_nnx.text.tokenizer import FILE_NAMES, Tokenizer

_PACKAGES = ("whisper", "mlx_whisper")  # both contain the vocabularies; they are not imported
_ENGLISH_VOCAB_SIZE = RELEASED["tiny.en"].vocab_size


def released_tokenizer(
    vocab_size: int, cache_dir: str | os.PathLike[str] | None = None, *, download: bool = True
) -> Tokenizer | None:
    """Finds the released tokenizer of this size in the Hub's cache, an installed package, or on the Hub.

    Returns None if no released model has this size, or if `download` is False and it is not found locally. Raises
    CheckpointError if the download fails.
    """
    names = [name for name, config in RELEASED.items() if config.vocab_size == vocab_size]
    if not names:
        return None
    for folder in filter(None, (_cached(name, cache_dir) for name in names)):
        if (found := read_tokenizer(folder, vocab_size)) is not None:
            return found
    if (file := _installed(vocab_size)) is not None:
        return tokenizer_from_tiktoken(file, vocab_size)
    if not download:
        return None
    return read_tokenizer(
        checkpoint_path(names[0], files=(*FILE_NAMES, *CONFIG_FILES), cache_dir=cache_dir), vocab_size
    )


def _cached(name: str, cache_dir: str | os.PathLike[str] | None) -> Path | None:
    """Returns the folder in the Hub's cache with a released model's tokenizer."""
    from huggingface_hub import try_to_load_from_cache

    cache = None if cache_dir is None else Path(cache_dir)
    for file in ("tokenizer.json", "vocab.json"):
        if isinstance(found := try_to_load_from_cache(repository_of(name), file, cache), str):
            return Path(found).parent
    return None


def _installed(vocab_size: int) -> Path | None:
    """Returns the vocabulary file of an installed package."""
    name = "gpt2" if vocab_size == _ENGLISH_VOCAB_SIZE else "multilingual"
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            file = Path(spec.origin).parent / "assets" / f"{name}.tiktoken"
            if file.is_file():
                return file
    return None
