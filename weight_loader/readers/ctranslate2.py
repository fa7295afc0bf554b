"""Reads CTranslate2's folders, as used by faster-whisper: model.bin, config.json, tokenizer or vocabulary.json.

Format: CTranslate2's `specs/model_spec.py` (file layout) and `converters/transformers.py` (fused projections).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from weight_loader.checkpoint import Checkpoint
from weight_loader.folder import CheckpointError, read_json
from weight_loader.readers.stream import Stream
from weight_loader.vocabulary import tokenizer_of
from whisper_nnx.model.config import WhisperConfig
from whisper_nnx.runtime.files import read_regular
from whisper_nnx.text.tokenizer import MAX_FILE, Tokenizer
from whisper_nnx.text.vocabulary import BYTE_OF

_FILE = "model.bin"
_SPEC = b"WhisperSpec\0"
_VERSION = 6  # of the layout; all Whisper files have this one
_DTYPES = tuple(map(np.dtype, ("<f4", "i1", "<i2", "<i4", "<f2", ml_dtypes.bfloat16)))
_MOST = 20_000  # variables; large-v3 has 1,000
_MOST_AXES = 8
_MOST_SHARED = 4  # largest ratio of elements including aliases to elements in the file
# Fused projections, and their parts in row order.
_FUSED = {"/self_attention/linear_0/": "qkv", "/attention/linear_1/": "kv"}


class _Variable(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype
    start: int  # offset in the file


def detect(path: Path) -> bool:
    path = path / _FILE if path.is_dir() else path
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(6 + len(_SPEC))[6:] == _SPEC


def read(path: Path) -> Checkpoint:
    file = path / _FILE if path.is_dir() else path
    variables, aliases = _index(file)
    config = _config(file, variables, aliases)
    tensors = _tensors(file, variables, aliases, config.tie_word_embeddings)
    kinds = sorted({str(v.dtype) for name, v in variables.items() if v.shape and not name.endswith("_scale")})
    checkpoint = Checkpoint("ct2", str(path), config, None, tensors, {"stored as": ", ".join(kinds)})
    checkpoint.tokenizer = _tokenizer(file.parent, config.vocab_size)
    return checkpoint


def _index(file: Path) -> tuple[dict[str, _Variable], dict[str, str]]:
    """Reads the index: variables with their offsets, and aliases of variables."""
    variables, aliases = {}, {}
    with file.open("rb") as opened:
        stream = Stream(opened, str(file))

        def text(what: str) -> str:
            return stream.text(stream.numbers("H", f"the length of {what}")[0], what).rstrip("\0")

        def count(what: str) -> int:
            (number,) = stream.numbers("I", f"the number of {what}")
            if number > _MOST:
                raise stream.error(f"claims to have {number} {what}")
            return number

        (version,) = stream.numbers("I", "the layout's version")
        if version != _VERSION:
            raise CheckpointError(
                f"{file} has layout {version}, expected {_VERSION}; convert it again with ctranslate2"
            )
        text("the specification")
        stream.numbers("I", "the revision")
        for _ in range(count("variables")):
            name = text("a variable's name")
            shape = stream.numbers(f"{stream.numbers('B', 'a number of axes')[0]}I", f"the shape of {name!r}")
            kind, n_bytes = stream.numbers("BI", f"the type of {name!r}")
            if kind >= len(_DTYPES) or len(shape) > _MOST_AXES or n_bytes != math.prod(shape) * _DTYPES[kind].itemsize:
                raise stream.error(f"has {name!r} of type {kind}, shape {shape} and {n_bytes} bytes")
            variables[name] = _Variable(shape, _DTYPES[kind], stream.tell())
            stream.skip(n_bytes, f"the variable {name!r}")
        for _ in range(count("aliases")):
            name, target = text("an alias"), text("an alias's target")
            if target not in variables:
                raise stream.error(f"has the alias {name!r} of {target!r}, which it lacks")
            aliases[name] = target
    return variables, aliases


def _config(file: Path, variables: dict[str, _Variable], aliases: dict[str, str]) -> WhisperConfig:
    def shape(name: str, axes: int) -> tuple[int, ...]:
        variable = variables.get(aliases.get(name, name))
        if variable is None or len(variable.shape) != axes:
            raise CheckpointError(f"{file} has no {name} of {axes} axes, so it is not a Whisper; convert it again")
        return variable.shape

    with file.open("rb") as opened:
        heads = {}
        for side in ("encoder", "decoder"):
            shape(name := f"{side}/num_heads", 0)
            heads[side] = int(_values(opened, variables[name]))
    names = [*variables, *aliases]
    layers = {side: len({m[0] for name in names if (m := re.match(rf"{side}/layer_\d+/", name))}) for side in heads}
    vocab_size, d_model = shape("decoder/embeddings/weight", 2)
    try:
        config = WhisperConfig(
            d_model,
            layers["encoder"],
            heads["encoder"],
            layers["decoder"],
            heads["decoder"],
            vocab_size,
            num_mel_bins=shape("encoder/conv1/weight", 3)[1],
            max_source_positions=shape("encoder/position_encodings/encodings", 2)[0],
            max_target_positions=shape("decoder/position_encodings/encodings", 2)[0],
            encoder_ffn_dim=shape("encoder/layer_0/ffn/linear_0/weight", 2)[0],
            decoder_ffn_dim=shape("decoder/layer_0/ffn/linear_0/weight", 2)[0],
            tie_word_embeddings=aliases.get("decoder/projection/weight") == "decoder/embeddings/weight",
        )
        beside = file.parent / "config.json"
        return WhisperConfig.from_hf(config.to_hf(), read_json(beside)) if beside.is_file() else config
    except (ValueError, OverflowError) as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(f"{file}: {error}") from error


def _tokenizer(folder: Path, vocab_size: int) -> Tokenizer | None:
    """Reads the tokenizer's files if the folder has them, else CTranslate2's list of tokens."""
    file = folder / "vocabulary.json"
    try:
        if (folder / "tokenizer.json").exists() or not file.exists():
            return Tokenizer.from_folder(folder, vocab_size)
        tokens: Any = json.loads(read_regular(file, MAX_FILE))
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise ValueError("vocabulary.json is not a list of strings")
        special = {token: i for i, token in enumerate(tokens) if re.fullmatch(r"<\|.*\|>", token)}
        text = {i: t.translate(BYTE_OF).encode("latin-1") for i, t in enumerate(tokens) if t not in special}
        return tokenizer_of(text, special, vocab_size)
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, RecursionError) as error:
        raise CheckpointError(f"{folder}: its tokenizer cannot be used ({error}); use the original one") from error


def _tensors(
    file: Path, variables: dict[str, _Variable], aliases: dict[str, str], tied: bool
) -> Iterator[tuple[str, np.ndarray]]:
    names = {name: name for name, v in variables.items() if v.shape and not name.endswith("_scale")} | aliases
    aliased, stored = (sum(math.prod(variables[n].shape) for n in group) for group in (names.values(), variables))
    if aliased > _MOST_SHARED * stored:
        raise CheckpointError(f"{file} has aliases of {aliased} numbers, but only {stored}; it may be malicious")
    with file.open("rb") as opened:
        for name, target in names.items():
            if name.endswith("_scale") or (name == "decoder/projection/weight" and tied):
                continue
            array = _values(opened, variables[target])
            if array.dtype.kind == "i":
                array = _dequantized(array, opened, variables, target, file)
            parts = next((parts for fused, parts in _FUSED.items() if fused in name), "")
            if not parts:
                yield name, array
                continue
            if len(array) % len(parts):
                raise CheckpointError(f"{file} has {name} of {len(array)} rows, expected equal parts for {parts}")
            for part, rows in zip(parts, np.split(array, len(parts)), strict=True):
                if part == "k" and name.endswith("/bias"):  # Whisper has none; written as zeros
                    if rows.any():
                        raise CheckpointError(f"{file} has {name} with a bias of the keys, so it is not a Whisper")
                    continue
                yield f"{name}:{part}", rows


def _dequantized(q: np.ndarray, opened: Any, variables: dict[str, _Variable], name: str, file: Path) -> np.ndarray:
    """Divides integers by their scale: one per row (8 bits), or one for all (16 bits)."""
    scale = variables.get(f"{name}_scale")
    if scale is None or scale.shape not in ((), q.shape[:1]) or scale.dtype.kind != "f":
        raise CheckpointError(f"{file} has {name} as integers without a matching scale; convert it again")
    scales = _values(opened, scale).astype(np.float32)
    if not (scales > 0).all():
        raise CheckpointError(f"{file} has {name} with a scale that is not positive; it is damaged, convert it again")
    return q.astype(np.float32) / scales.reshape(*scale.shape, *[1] * (q.ndim - len(scale.shape)))


def _values(opened: Any, variable: _Variable) -> np.ndarray:
    opened.seek(variable.start)
    return np.fromfile(opened, variable.dtype, math.prod(variable.shape)).reshape(variable.shape)
