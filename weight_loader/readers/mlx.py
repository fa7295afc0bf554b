"""Reads MLX's folders, as written by mlx-whisper's converter: config.json with OpenAI's sizes, and the weights.

The weights are openai-whisper's, with convolutions in another layout and without the encoder's positions. Matrices may
be quantized: integers of 2 to 8 bits, packed from the lowest bit of a uint32, with a scale and a bias per group of a
row. The alignment heads are an array among the weights.

https://github.com/ml-explore/mlx-examples/tree/main/whisper,
https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from weight_loader.checkpoint import Checkpoint
from weight_loader.folder import CheckpointError, read_config, read_json
from weight_loader.readers import npz, safetensors
from weight_loader.readers.npz import Stored
from weight_loader.readers.openai import config_of
from whisper_nnx.model.config import WhisperConfig

ALIGNMENT_HEADS = "alignment_heads"  # [heads, 2]
_FILES = ("model.safetensors", "weights.safetensors", "weights.npz")  # in order of precedence, as in MLX
_DTYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": "bfloat16", "U32": "u4", "I32": "i4", "I64": "i8"}
_BLOCK = 2**20  # numbers unpacked at once


def detect(path: Path) -> bool:
    """Detects a folder with OpenAI's sizes in config.json, or a file (or folder with one) with MLX's weight names."""
    if path.is_dir():
        if not (file := _file(path)).is_file():
            return False
        try:
            if "n_mels" in read_json(path / "config.json"):
                return True
        except CheckpointError:
            pass
        path = file
    if not npz.is_npz(path) and not safetensors.is_safetensors(path):
        return False
    with _opened(path) as stored:
        return any(".mlp1." in name for name in stored)


def read(path: Path) -> Checkpoint:
    """Raises CheckpointError for files that are missing, damaged or malicious."""
    file = _file(path) if path.is_dir() else path
    sizes = read_json(file.parent / "config.json")
    # Other MLX programs keep Hugging Face's config.json.
    config = config_of(sizes, str(file.parent / "config.json")) if "n_mels" in sizes else read_config(file.parent)
    details = {"files": file.name}
    if quantization := sizes.get("quantization"):
        bits, group = _quantization(quantization, file.parent)
        details["quantization"] = f"{bits} bits in groups of {group}"
    with _opened(file) as stored:
        config = _alignment_heads(stored, config, file)
    return Checkpoint("mlx", str(path), config, None, _tensors(file, quantization), details)


def _file(folder: Path) -> Path:
    return next((folder / name for name in _FILES if (folder / name).is_file()), folder / _FILES[-1])


@contextmanager
def _opened(file: Path) -> Iterator[dict[str, Stored]]:
    if not safetensors.is_safetensors(file):
        with npz.opened(file) as stored:
            yield stored
        return
    with safetensors._opened(file) as tensors:
        found = {}
        for name in tensors.offset_keys():
            header = tensors.get_slice(name)
            safetensors.check_axes(file, name, header.get_shape())
            if (kind := header.get_dtype()) not in _DTYPES:
                raise CheckpointError(f"{file}: {name} is stored as {kind}, expected one of {', '.join(_DTYPES)}")
            read = partial(tensors.get_tensor, name)
            found[name] = Stored(np.dtype(_DTYPES[kind]), tuple(header.get_shape()), read)
        yield found


def _alignment_heads(stored: dict[str, Stored], config: WhisperConfig, file: Path) -> WhisperConfig:
    """Reads the heads among the weights. All heads of the upper half mean that none are known, which is None here."""
    if (heads := stored.get(ALIGNMENT_HEADS)) is None:
        return config
    most = config.decoder_layers * config.decoder_attention_heads
    if heads.dtype.kind not in "iu" or len(heads.shape) != 2 or heads.shape[0] > most or heads.shape[1] != 2:
        what = f"{ALIGNMENT_HEADS} of {heads.dtype} and shape {heads.shape}, expected pairs of numbers"
        raise CheckpointError(f"{file}: {what}; download it from its original source")
    pairs = heads.read().tolist()
    layers = range(config.decoder_layers // 2, config.decoder_layers)
    unknown = [[layer, head] for layer in layers for head in range(config.decoder_attention_heads)]
    return config if pairs == unknown else WhisperConfig.from_hf(config.to_hf(), {"alignment_heads": pairs})


def _quantization(settings: Any, folder: Path) -> tuple[int, int]:
    """Returns bits per number and numbers per group."""
    if isinstance(settings, dict) and settings.get("mode", "affine") == "affine":
        bits, group = settings.get("bits"), settings.get("group_size")
        if bits in (2, 3, 4, 5, 6, 8) and type(group) is int and group > 0 and not group % 8:
            return bits, group
    what = f"quantization={settings!r} is not supported (bits 2 to 6 or 8, group_size, mode affine)"
    raise CheckpointError(f"{folder / 'config.json'}: {what}; use the unquantized checkpoint")


def _tensors(file: Path, quantization: Any) -> Iterator[tuple[str, np.ndarray]]:
    with _opened(file) as stored:
        for name, tensor in stored.items():
            module, _, end = name.rpartition(".")
            parts = [stored.get(f"{module}.{part}") for part in ("weight", "scales", "biases")]
            quantized = all(part is not None for part in parts)
            if name == ALIGNMENT_HEADS or (quantized and end in ("scales", "biases")):
                continue
            if quantized and end == "weight":
                bits, group = _quantization(quantization, file.parent)
                yield name, _dequantized(parts, bits, group, f"{file}: {name}")
            else:
                yield name, tensor.read()


def _dequantized(parts: list[Any], bits: int, group: int, where: str) -> np.ndarray:
    """Dequantizes numbers [rows, columns * bits / 32], scales and biases [rows, columns / group] to [rows, columns].

    Equals mlx.core.dequantize on the CPU bit for bit: product and sum are rounded to the dtype of the scales.
    """
    weight, scales, biases = parts
    fits = len(scales.shape) == 2 and weight.shape == (scales.shape[0], scales.shape[1] * group * bits // 32)
    if not fits or weight.dtype != np.uint32 or scales.shape != biases.shape or scales.dtype != biases.dtype:
        shapes = f"{weight.shape} of {weight.dtype}, scales {scales.shape} and biases {biases.shape}"
        raise CheckpointError(f"{where} is {shapes}, not {bits} bits in groups of {group}; download it again")
    packed, scale, bias = weight.read(), scales.read()[..., None], biases.read()[..., None]
    rows, groups = scales.shape
    numbers = np.empty((rows, groups, group), scale.dtype)
    step = max(1, _BLOCK // (groups * group))
    for start in range(0, rows, step):
        block = slice(start, start + step)
        whole = unpacked(packed[block], bits).reshape(-1, groups, group)
        numbers[block] = whole.astype(scale.dtype) * scale[block] + bias[block]
    return numbers.reshape(rows, -1)


def unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """Unpacks integers of `bits` bits from uint32, flat; eight of them fill `bits` bytes for any `bits`."""
    words = np.zeros((packed.nbytes // bits, 8), np.uint8)
    words[:, :bits] = np.ascontiguousarray(packed).view(np.uint8).reshape(-1, bits)
    numbers, word, mask = np.empty(words.shape, np.uint8), words.view("<u8")[:, 0], np.uint64(2**bits - 1)
    for place in range(8):  # a loop over long columns is several times as fast as one operation on short rows
        numbers[:, place] = word >> np.uint64(place * bits) & mask
    return numbers.reshape(-1)
