"""One module per format that is written. Each has

DTYPES                        what it can store, by name: "float32", "float16", "bfloat16", "q8_0", ...
FOLDER                        whether it writes a folder; else it writes one file
write(content, path, dtype)   writes what does not exist yet; `dtype` is one of DTYPES; returns a list of what the
                              format has no place for, as short texts ("the alignment heads: ..."), often empty
"""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path
from typing import Any

from weight_loader.checkpoint import Content
from weight_loader.folder import CheckpointError

WRITERS = {"hf": "huggingface", "openai": "openai", "mlx": "mlx", "ggml": "ggml", "ct2": "ctranslate2"}


def writer(format: str) -> Any:
    """The module that writes a format. Raises CheckpointError for one that nothing writes."""
    if format not in WRITERS:
        raise CheckpointError(f"format {format!r} cannot be written; choose one of {', '.join(WRITERS)}")
    return importlib.import_module(f"{__name__}.{WRITERS[format]}")


def check_target(path: str | os.PathLike[str], format: str, dtype: str | None) -> Any:
    """The module that would write it. Raises CheckpointError for a format, dtype or path that cannot be."""
    module, path = writer(format), Path(path)
    if dtype is not None and dtype not in module.DTYPES:
        raise CheckpointError(f"{format} cannot store {dtype}; choose one of {', '.join(module.DTYPES)} as dtype")
    if path.exists() and not (path.is_dir() and module.FOLDER and not any(path.iterdir())):
        raise CheckpointError(f"{path} exists already; remove it, or choose another name")
    return module


def write_checkpoint(
    content: Content, path: str | os.PathLike[str], format: str, dtype: str | None = None
) -> list[str]:
    """Writes a model in a format, whole or not at all; returns what the format has no place for.

    path: a file or, for hf, mlx and ct2, a folder. It must not exist yet (an empty folder may). dtype: default that of
    the arrays. Raises CheckpointError for a format, dtype or path that cannot be.
    """
    path, dtype = Path(path), dtype or content.dtype
    module = check_target(path, format, dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        lost = module.write(content, temporary, dtype)
        conditioned = content.config.condition_on_prev_tokens
        if format != "hf" and conditioned is not None:
            lost.append(f"condition_on_prev_tokens: transcribe with condition_on_previous_text={conditioned}")
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
    return lost
