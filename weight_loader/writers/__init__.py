"""Writers, one module per format. Each has

DTYPES                        supported types by name: "float32", "float16", "bfloat16", "q8_0", ...
FOLDER                        whether it writes a folder instead of a file
write(content, path, dtype)   writes a path that does not exist; `dtype` is one of DTYPES; returns descriptions of what
                              the format cannot store ("the alignment heads: ..."), often none
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
    """Returns the module that writes a format. Raises CheckpointError for unknown formats."""
    if format not in WRITERS:
        raise CheckpointError(f"format {format!r} is unknown; choose one of {', '.join(WRITERS)}")
    return importlib.import_module(f"{__name__}.{WRITERS[format]}")


def check_target(path: str | os.PathLike[str], format: str, dtype: str | None) -> Any:
    """Returns the format's module. Raises CheckpointError for an unsupported format or dtype, or an existing path."""
    module, path = writer(format), Path(path)
    if dtype is not None and dtype not in module.DTYPES:
        raise CheckpointError(f"{format} cannot store dtype {dtype}; choose one of {', '.join(module.DTYPES)}")
    if path.exists() and not (path.is_dir() and module.FOLDER and not any(path.iterdir())):
        raise CheckpointError(f"{path} already exists; remove it or choose another name")
    return module


def write_checkpoint(
    content: Content, path: str | os.PathLike[str], format: str, dtype: str | None = None
) -> list[str]:
    """Writes a model; partial outputs are removed.

    Args:
      content: the model.
      path: a file or, for hf, mlx and ct2, a folder; must not exist or be an empty folder.
      format: one of WRITERS.
      dtype: by default that of the arrays.

    Returns:
      What the format cannot store, one line each.

    Raises:
      CheckpointError: the format or dtype is not supported, or the path exists.
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
