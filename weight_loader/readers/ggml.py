"""Reads whisper.cpp's ggml `.bin`: sizes, mel filters, vocabulary, then tensors, each with a header.

Format: whisper.cpp, `models/convert-pt-to-ggml.py` (writer) and `whisper_model_load` (reader).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from weight_loader.checkpoint import Checkpoint
from weight_loader.ggml_blocks import STORAGES
from weight_loader.readers.stream import Stream
from weight_loader.vocabulary import implied_tokens, tokenizer_of
from whisper_nnx.audio.features import N_FFT, mel_filters
from whisper_nnx.model.config import WhisperConfig
from whisper_nnx.text.tokenizer import Tokenizer

MAGIC = b"lmgg"  # 0x67676d6c
QUANTIZER_VERSION = 1000  # the version times this is added to a file's storage id
SIZES = (
    *("vocab_size", "max_source_positions", "d_model", "encoder_attention_heads", "encoder_layers"),
    *("max_target_positions", "text_d_model", "decoder_attention_heads", "decoder_layers", "num_mel_bins"),
)
_LONGEST = 1000  # bytes of a token or name; at most 128 in the released vocabularies


def detect(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read(path: Path) -> Checkpoint:
    with path.open("rb") as file:
        stream = Stream(file, str(path))
        stream.skip(len(MAGIC), "the format's name")
        config, stored_as = _config(stream)
        checkpoint = Checkpoint("ggml", str(path), config, None, iter(()))  # rejects implausible sizes
        _check_mel_filters(stream, config)
        checkpoint.tokenizer, vocabulary = _tokenizer(stream, config)
        checkpoint.tensors = _tensors(path, stream.tell())
    checkpoint.details = {"stored as": stored_as, "vocabulary": vocabulary}
    return checkpoint


def _config(stream: Stream) -> tuple[WhisperConfig, str]:
    *numbers, file_id = stream.numbers(f"{len(SIZES) + 1}i", "sizes")
    sizes = dict(zip(SIZES, numbers, strict=True))
    storage = {storage.file_id: storage.name for storage in STORAGES}
    if file_id % QUANTIZER_VERSION not in storage:
        raise stream.error(f"has type {file_id}, expected {', '.join(storage.values())} (whisper.cpp's ids)")
    if sizes.pop("text_d_model") != sizes["d_model"]:
        raise stream.error("has encoder and decoder of different widths")
    try:
        return WhisperConfig(**sizes), storage[file_id % QUANTIZER_VERSION]
    except ValueError as error:
        raise stream.error(f"has invalid sizes ({error})") from error


def _check_mel_filters(stream: Stream, config: WhisperConfig) -> None:
    """Checks that the file's mel filters equal those of `features`, since a model needs its own filters."""
    shape = stream.numbers("2i", "the shape of the mel filters")
    if shape != (config.num_mel_bins, N_FFT // 2 + 1):
        raise stream.error(f"has mel filters {shape}, expected {(config.num_mel_bins, N_FFT // 2 + 1)}")
    filters = stream.array(np.dtype("<f4"), shape[0] * shape[1], "mel filters").reshape(shape)
    if not np.allclose(filters, mel_filters(config.num_mel_bins), rtol=0, atol=1e-6):
        warnings.warn(f"{stream.where}: its mel filters differ from Whisper's, which are used instead", stacklevel=3)


def _tokenizer(stream: Stream, config: WhisperConfig) -> tuple[Tokenizer | None, str]:
    """Returns the tokenizer, or None if the tokens are unusable, and a description."""
    (n_tokens,) = stream.numbers("i", "the number of tokens")
    if not 0 <= n_tokens <= config.vocab_size:
        raise stream.error(f"lists {n_tokens} tokens for vocab_size={config.vocab_size}")
    tokens = []
    for i in range(n_tokens):
        (length,) = stream.numbers("i", f"the length of token {i}")
        if length > _LONGEST:
            raise stream.error(f"has a token of {length} bytes")
        tokens.append(stream.bytes(length, f"token {i}"))
    try:
        added = implied_tokens(config.vocab_size)
        end = min(added.values())  # some files continue with special tokens under other names
        if n_tokens < end:
            raise ValueError(f"expected {end}")
        return tokenizer_of(dict(enumerate(tokens[:end])), added, config.vocab_size), f"{n_tokens} tokens"
    except ValueError as error:
        return None, f"{n_tokens} tokens, unusable: {error}"


def _tensors(path: Path, start: int) -> Iterator[tuple[str, np.ndarray]]:
    storages = {storage.tensor_id: storage for storage in STORAGES}
    with path.open("rb") as file:
        file.seek(start)
        stream = Stream(file, str(path))
        while stream.left:
            n_axes, n_name, storage_id = stream.numbers("3i", "a tensor's header")
            if not (1 <= n_axes <= 4 and 1 <= n_name <= _LONGEST and storage_id in storages):
                what = f"{n_axes} axes, a name of {n_name} bytes, storage {storage_id}"
                raise stream.error(f"has a tensor with {what} before byte {stream.tell()}")
            shape = stream.numbers(f"{n_axes}i", "a tensor's shape")[::-1]
            name, storage = stream.text(n_name, "a tensor's name"), storages[storage_id]
            if min(shape) < 1:
                raise stream.error(f"has {name!r} of shape {shape}")
            try:
                count = storage.count(shape)
            except ValueError as error:
                raise stream.error(f"has {name!r} of shape {shape}: {error}") from error
            array = storage.decode(stream.array(storage.dtype, count, f"the tensor {name!r}"), shape)
            yield name, array.reshape(-1) if name.endswith(".bias") else array  # the convolutions' are [D,1]
