"""Writes whisper.cpp's ggml `.bin` like its converter and quantizer."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from weight_loader.checkpoint import Content
from weight_loader.folder import CheckpointError
from weight_loader.ggml_blocks import STORAGES, Storage
from weight_loader.readers.ggml import MAGIC, QUANTIZER_VERSION, SIZES
from weight_loader.vocabulary import implied_tokens
from whisper_nnx.audio.features import mel_filters
from whisper_nnx.model.config import WhisperConfig
from whisper_nnx.text.tokenizer import Tokenizer

_NAMES = {"f32": "float32", "f16": "float16"}
_STORAGE = {_NAMES.get(storage.name, storage.name): storage for storage in STORAGES}
DTYPES = tuple(_STORAGE)
FOLDER = False
_QUANTIZER = 2  # version of the block formats
_FLOAT32 = ("encoder.positional_embedding", "decoder.positional_embedding")  # required by whisper.cpp
_RENAMED = {"iw": "he", "jv": "jw"}  # codes in some released vocabularies; the tokens are the same
_CONV_BIASES = ("encoder.conv1.bias", "encoder.conv2.bias")


def write(content: Content, path: Path, dtype: str) -> list[str]:
    config, storage = content.config, _STORAGE[dtype]
    if {config.encoder_ffn_dim, config.decoder_ffn_dim} != {4 * config.d_model}:
        what = f"encoder_ffn_dim={config.encoder_ffn_dim} and decoder_ffn_dim={config.decoder_ffn_dim}"
        raise CheckpointError(f"ggml cannot store {what}, only 4 * {config.d_model}; write it as hf")
    text = _text_tokens(config, content.tokenizer)
    with path.open("xb") as file:
        file_id = storage.file_id + (QUANTIZER_VERSION * _QUANTIZER if storage.is_quantized else 0)
        sizes = [config.d_model if name == "text_d_model" else getattr(config, name) for name in SIZES]
        file.write(MAGIC + struct.pack(f"<{len(SIZES) + 1}i", *sizes, file_id))
        filters = mel_filters(config.num_mel_bins)
        file.write(struct.pack("<2i", *filters.shape) + filters.astype("<f4").tobytes())
        file.write(struct.pack("<i", len(text)) + b"".join(struct.pack("<i", len(token)) + token for token in text))
        for name, array in content.tensors("ggml"):
            stored_as = _storage(name, array, storage)
            shape = (*array.shape, 1) if name in _CONV_BIASES else array.shape
            file.write(struct.pack("<3i", len(shape), len(name), stored_as.tensor_id))
            file.write(struct.pack(f"<{len(shape)}i", *shape[::-1]) + name.encode())
            try:
                stored_as.encode(array).tofile(file)
            except ValueError as error:
                raise CheckpointError(f"{name}: {error}; choose float32") from error
    heads = "the alignment heads: whisper.cpp only has those of the released models, by name"
    return [heads] if config.alignment_heads is not None else []


def _storage(name: str, array: np.ndarray, wanted: Storage) -> Storage:
    """Returns whisper.cpp's storage: matrices as requested, convolutions at least float16, the rest float32."""
    if array.ndim < 2 or name in _FLOAT32:
        return _STORAGE["float32"]
    return _STORAGE["float16"] if array.ndim > 2 and wanted.is_quantized else wanted


def _text_tokens(config: WhisperConfig, tokenizer: Tokenizer | None) -> list[bytes]:
    """Returns the bytes of all text tokens; the special tokens' ids must be those that whisper.cpp infers."""
    if tokenizer is None:
        raise CheckpointError("a ggml file contains the vocabulary, but the model has no tokenizer; load it with one")
    try:
        implied = implied_tokens(config.vocab_size)
    except ValueError as error:
        raise CheckpointError(f"{error}; write it as hf") from error
    special = tokenizer.special
    expected = {
        "<|endoftext|>": special.eot,
        "<|startoftranscript|>": special.sot,
        "<|translate|>": special.translate,
        "<|transcribe|>": special.transcribe,
        "<|startofprev|>": special.sot_prev,
        "<|notimestamps|>": special.no_timestamps,
        "<|0.00|>": special.timestamp_begin,
        "<|30.00|>": special.timestamp_end,
        **{f"<|{_RENAMED.get(code, code)}|>": i for code, i in special.languages},
    }
    if wrong := [f"{name}={i}" for name, i in expected.items() if implied.get(name) != i]:
        raise CheckpointError(
            f"whisper.cpp infers the special tokens from vocab_size={config.vocab_size}, which would be wrong for "
            f"{', '.join(wrong[:5])}; write it as hf"
        )
    return tokenizer.token_bytes(range(special.eot))
