"""whisper_nnx: OpenAI's Whisper as Flax NNX modules. Names are imported when first used: this stays light."""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from whisper_nnx.runtime import forking as forking  # which sees forks from now on

__version__ = "0.1.0"

# The names, as type checkers and editors see them; a test compares the two lists.
if TYPE_CHECKING:
    from weight_loader import download_whisper_weights as download_whisper_weights
    from weight_loader import get_whisper_config as get_whisper_config
    from weight_loader import load_model as load_model
    from weight_loader import load_weights_into_nnx_model as load_weights_into_nnx_model
    from weight_loader import print_model_info as print_model_info
    from weight_loader import save_model as save_model
    from weight_loader import save_pretrained as save_pretrained
    from whisper_nnx.alignment.align import align as align
    from whisper_nnx.alignment.find_heads import find_alignment_heads as find_alignment_heads
    from whisper_nnx.alignment.likelihood import TextScore as TextScore
    from whisper_nnx.alignment.likelihood import classify as classify
    from whisper_nnx.alignment.likelihood import score as score
    from whisper_nnx.audio.features import log_mel_spectrogram as log_mel_spectrogram
    from whisper_nnx.audio.loading import load_audio as load_audio
    from whisper_nnx.audio.loading import pad_or_trim as pad_or_trim
    from whisper_nnx.audio.options import VadOptions as VadOptions
    from whisper_nnx.audio.vad import speech_spans as speech_spans
    from whisper_nnx.decoding.ngram import NgramModel as NgramModel
    from whisper_nnx.decoding.options import DecodingOptions as DecodingOptions
    from whisper_nnx.decoding.word_ngram import WordNgramModel as WordNgramModel
    from whisper_nnx.evaluation.run import evaluate as evaluate
    from whisper_nnx.model.audio_context import with_audio_ctx as with_audio_ctx
    from whisper_nnx.model.cache import KVCache as KVCache
    from whisper_nnx.model.config import RELEASED as RELEASED
    from whisper_nnx.model.config import WhisperConfig as WhisperConfig
    from whisper_nnx.model.create import create_whisper as create_whisper
    from whisper_nnx.model.create import create_whisper_base as create_whisper_base
    from whisper_nnx.model.create import create_whisper_large as create_whisper_large
    from whisper_nnx.model.create import create_whisper_medium as create_whisper_medium
    from whisper_nnx.model.create import create_whisper_small as create_whisper_small
    from whisper_nnx.model.create import create_whisper_tiny as create_whisper_tiny
    from whisper_nnx.model.create import create_whisper_turbo as create_whisper_turbo
    from whisper_nnx.model.masked_heads import with_masked_heads as with_masked_heads
    from whisper_nnx.model.sharding import shard_model as shard_model
    from whisper_nnx.model.whisper import Whisper as Whisper
    from whisper_nnx.output.results import Segment as Segment
    from whisper_nnx.output.results import Transcript as Transcript
    from whisper_nnx.output.writers import get_writer as get_writer
    from whisper_nnx.runtime.allocator import keep_memory as keep_memory
    from whisper_nnx.runtime.devices import make_mesh as make_mesh
    from whisper_nnx.runtime.programs import keep_programs as keep_programs
    from whisper_nnx.text.languages import LANGUAGES as LANGUAGES
    from whisper_nnx.text.special_tokens import SpecialTokens as SpecialTokens
    from whisper_nnx.text.tokenizer import Tokenizer as Tokenizer
    from whisper_nnx.transcription.attempts import Alternative as Alternative
    from whisper_nnx.transcription.attempts import DecodingResult as DecodingResult
    from whisper_nnx.transcription.options import TranscribeOptions as TranscribeOptions
    from whisper_nnx.transcription.stream import iter_segments as iter_segments
    from whisper_nnx.transcription.stream import iter_transcripts as iter_transcripts
    from whisper_nnx.transcription.stream import transcribe as transcribe
    from whisper_nnx.transcription.warmup import warmup as warmup
    from whisper_nnx.transcription.windows import decode as decode
    from whisper_nnx.transcription.windows import detect_language as detect_language

_EXPORTS = {
    "whisper_nnx.model.config": ["RELEASED", "WhisperConfig"],
    "whisper_nnx.text.special_tokens": ["SpecialTokens"],
    "whisper_nnx.output.results": ["Segment", "Transcript"],
    "whisper_nnx.text.languages": ["LANGUAGES"],
    "whisper_nnx.text.tokenizer": ["Tokenizer"],
    "whisper_nnx.audio.loading": ["load_audio", "pad_or_trim"],
    "whisper_nnx.audio.features": ["log_mel_spectrogram"],
    "whisper_nnx.model.cache": ["KVCache"],
    "whisper_nnx.model.whisper": ["Whisper"],
    "whisper_nnx.model.create": [
        "create_whisper",
        "create_whisper_base",
        "create_whisper_large",
        "create_whisper_medium",
        "create_whisper_small",
        "create_whisper_tiny",
        "create_whisper_turbo",
    ],
    "whisper_nnx.decoding.ngram": ["NgramModel"],
    "whisper_nnx.decoding.options": ["DecodingOptions"],
    "whisper_nnx.decoding.word_ngram": ["WordNgramModel"],
    "whisper_nnx.transcription.attempts": ["Alternative", "DecodingResult"],
    "whisper_nnx.transcription.windows": ["decode", "detect_language"],
    "whisper_nnx.audio.options": ["VadOptions"],
    "whisper_nnx.audio.vad": ["speech_spans"],
    "whisper_nnx.transcription.options": ["TranscribeOptions"],
    "whisper_nnx.transcribe": ["iter_segments", "iter_transcripts", "transcribe"],
    "whisper_nnx.transcription.warmup": ["warmup"],
    "whisper_nnx.runtime.programs": ["keep_programs"],
    "whisper_nnx.runtime.allocator": ["keep_memory"],
    "whisper_nnx.runtime.devices": ["make_mesh"],
    "whisper_nnx.model.audio_context": ["with_audio_ctx"],
    "whisper_nnx.model.masked_heads": ["with_masked_heads"],
    "whisper_nnx.model.sharding": ["shard_model"],
    "whisper_nnx.alignment.likelihood": ["TextScore", "classify", "score"],
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
