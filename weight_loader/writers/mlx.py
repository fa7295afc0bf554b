"""Writes MLX's folders: config.json with OpenAI's sizes, weights.npz, and the tokenizer's files.

All versions of mlx-whisper read weights.npz; the first ones read nothing else.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np

from weight_loader.checkpoint import Content
from weight_loader.readers.mlx import ALIGNMENT_HEADS
from weight_loader.readers.openai import dimensions_of

DTYPES = ("float32", "float16")
FOLDER = True


def write(content: Content, path: Path, dtype: str) -> list[str]:
    config, tokenizer = content.config, content.tokenizer
    path.mkdir(parents=True)
    with zipfile.ZipFile(path / "weights.npz", "x") as archive:

        def add(name: str, array: np.ndarray) -> None:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)

        for name, array in content.tensors("mlx", dtype):
            add(name, array)
        if config.alignment_heads is not None:
            add(ALIGNMENT_HEADS, np.array(config.alignment_heads, np.int64))
    sizes = {**dimensions_of(config), "model_type": "whisper"}
    (path / "config.json").write_text(json.dumps(sizes, indent=4) + "\n", encoding="utf-8")
    for name, data in (tokenizer.files if tokenizer else {}).items():  # mlx-whisper has its own, other programs do not
        (path / name).write_bytes(data)
    return []
