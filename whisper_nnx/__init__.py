"""whisper_nnx: OpenAI's Whisper as Flax NNX modules. Names are imported when first used: this stays light."""

import importlib
import sys
from types import ModuleType
from typing import Any

from whisper_nnx.runtime import forking as forking  # which sees forks from now on

__version__ = "0.1.0"

_EXPORTS = {
    "whisper_nnx.model.config": ["RELEASED", "WhisperConfig"],
    "whisper_nnx.text.special_tokens": ["SpecialTokens"],
    "whisper_nnx.output.results": ["Segment", "Transcript"],
    "whisper_nnx.text.languages": ["LANGUAGES"],
    "whisper_nnx.text.tokenizer": ["Tokenizer"],
    "whisper_nnx.audio.loading": ["load_audio", "pad_or_trim"],
    "whisper_nnx.audio.features": ["log_mel_spectrogram"],
    "whisper_nnx.model.cache": ["KVCache"],
    "whisper_nnx.model.whisper": [
        "Whisper",
        "create_whisper",
        "create_whisper_base",
        "create_whisper_large",
        "create_whisper_medium",
        "create_whisper_small",
        "create_whisper_tiny",
        "create_whisper_turbo",
    ],
    "whisper_nnx.decoding.options": ["DecodingOptions"],
    "whisper_nnx.transcription.windows": ["Alternative", "DecodingResult", "decode", "detect_language"],
    "whisper_nnx.audio.vad": ["VadOptions", "speech_spans"],
    "whisper_nnx.transcribe": ["iter_segments", "iter_transcripts", "transcribe"],
    "whisper_nnx.transcription.warmup": ["warmup"],
    "whisper_nnx.runtime.programs": ["keep_programs"],
    "whisper_nnx.runtime.allocator": ["keep_memory"],
    "whisper_nnx.alignment.likelihood": ["TextScore", "score"],
    "whisper_nnx.alignment.align": ["align"],
    "whisper_nnx.alignment.find_heads": ["find_alignment_heads"],
    "whisper_nnx.output.writers": ["get_writer"],
    "whisper_nnx.evaluate": ["evaluate"],
    "weight_loader": [
        "download_whisper_weights",
        "get_whisper_config",
        "load_model",
        "load_weights_into_nnx_model",
        "print_model_info",
        "save_model",
        "save_pretrained",
    ],
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}
__all__ = sorted(_MODULE_OF)


class _Package(ModuleType):
    """The package, whose `transcribe` is the function even after the module of that name has been imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _MODULE_OF.get(name) == value.__name__:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
