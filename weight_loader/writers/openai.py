"""Writes OpenAI's .pt file for `whisper.load_model`, in torch.save's format but without torch.

The file is a zip archive with the data of each tensor and a pickle, whose instructions are written by hand, since the
pickle module writes a name only if it can import it.
"""

from __future__ import annotations

import base64
import gzip
import io
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np

from weight_loader.checkpoint import Content
from weight_loader.readers.openai import dimensions_of

DTYPES = ("float32", "float16", "bfloat16")
FOLDER = False
_STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}
_ROOT = "archive"  # the folder in the archive; torch accepts any name
_ALIGNMENT = 64  # bytes, as in torch.save, so that data can be memory-mapped


def write(content: Content, path: Path, dtype: str) -> list[str]:
    """Writes the tensors, then the pickle with their shapes."""
    state, heads = io.BytesIO(), content.config.alignment_heads
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for key, (name, array) in enumerate(content.tensors("openai", dtype)):
            state.write(_text(name) + _tensor(array, str(key), dtype))
            _add(archive, f"data/{key}", array.reshape(-1).view(np.uint8).data)
        sizes = b"".join(_text(name) + _whole(size) for name, size in dimensions_of(content.config).items())
        parts = _text("dims") + _dictionary(sizes) + _text("model_state_dict") + _dictionary(state.getvalue())
        if heads is not None:  # ignored by whisper.load_model, read by our reader
            parts += _text("alignment_heads") + _tuple(*(_tuple(*map(_whole, head)) for head in heads))
        _add(archive, "data.pkl", pickle.PROTO + b"\x02" + _dictionary(parts) + pickle.STOP)
        _add(archive, "byteorder", b"little")
        _add(archive, "version", b"3\n")
    lost = []
    if heads is not None:
        lost.append(
            f"the alignment heads, for openai-whisper; after loading, model.set_alignment_heads({_dump(content)!r})"
        )
    if content.tokenizer is not None:
        lost.append("the tokenizer: openai-whisper uses its own, by vocabulary size")
    return lost


def _dump(content: Content) -> bytes:
    """Encodes the alignment heads for openai-whisper's set_alignment_heads."""
    config = content.config
    mask = np.zeros((config.decoder_layers, config.decoder_attention_heads), bool)
    mask[tuple(np.array(config.alignment_heads or [], int).reshape(-1, 2).T)] = True
    return base64.b85encode(gzip.compress(mask.tobytes(), mtime=0))


def _add(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    """Adds a member; torch expects data.pkl and data/KEY in one folder, and data at multiples of 64 bytes."""
    info = zipfile.ZipInfo(f"{_ROOT}/{name}")
    info.external_attr = 0o600 << 16
    start = archive.start_dir + 30 + len(info.filename) + 4  # after the header, its name and the padding's header
    if len(data) >= 2**31:
        start += 20  # zipfile adds a zip64 size field
    padding = -start % _ALIGNMENT
    info.extra = struct.pack("<HH", 0x4246, padding) + b"\0" * padding
    info.file_size = len(data)
    with archive.open(info, "w") as stream:
        stream.write(data)


def _tensor(array: np.ndarray, key: str, dtype: str) -> bytes:
    strides = [stride // array.itemsize for stride in array.strides]
    storage = _tuple(_text("storage"), _name("torch", _STORAGES[dtype]), _text(key), _text("cpu"), _whole(array.size))
    ordered = _name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    arguments = (
        storage + pickle.BINPERSID,
        _whole(0),
        _tuple(*map(_whole, array.shape)),
        _tuple(*map(_whole, strides)),
        pickle.NEWFALSE,  # requires_grad
        ordered,  # hooks
    )
    return _name("torch._utils", "_rebuild_tensor_v2") + _tuple(*arguments) + pickle.REDUCE


def _name(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    data = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def _whole(number: int) -> bytes:
    return (
        pickle.BININT + struct.pack("<i", number)
        if number < 2**31
        else pickle.LONG1 + b"\x08" + struct.pack("<q", number)
    )


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def _dictionary(items: bytes) -> bytes:
    return pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
