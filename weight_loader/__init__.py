"""Loads and saves checkpoints. Names are imported lazily."""

import importlib
from typing import Any

_MODULE_OF = {
    "CheckpointError": "folder",
    "download_whisper_weights": "load",
    "get_whisper_config": "load",
    "load_model": "load",
    "load_weights_into_nnx_model": "load",
    "print_model_info": "load",
    "save_model": "save",
    "save_pretrained": "save",
}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
