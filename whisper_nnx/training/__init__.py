"""Training: manifests, windows, steps and checkpoints. Names are imported lazily."""

import importlib
import sys
from typing import Any

_EXPORTS = {
    "whisper_nnx.training.config": ["AugmentConfig", "DataConfig", "TrainConfig"],
    "whisper_nnx.data.manifest": ["Manifest", "Problem", "Row", "Span", "read_manifest"],
    "whisper_nnx.training.pipeline": ["Pipeline", "make_pipeline"],
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
