"""The measured systems, with a common interface; `worker.py` runs each in a separate process.

A system is made from a folder with one checkpoint in several formats (`checkpoints.prepare`). Its `transcribe` takes
recordings (samples at 16 kHz) and a `Work`, and returns `Written` for each. `ABLE` lists its capabilities. `tokens`:
tokens per window with random weights; None for a trained checkpoint.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SAMPLE_RATE = 16_000
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
GREEDY = {
    "temperature": 0.0,
    "condition_on_previous_text": False,
}  # so that windows are independent of each other's errors
# Cuts where BatchedInferencePipeline does: speech without pauses of 2 s would be one chain of windows for us.
SHORT_PAUSES = {"min_silence_duration_ms": 160, "max_speech_duration_s": 30}


class Written(NamedTuple):
    text: str
    tokens: int | None = None


@dataclass(frozen=True)
class Work:
    """Options of a task, equal for every system."""

    language: str = "en"
    beam_size: int = 1
    words: bool = False  # also compute word times
    batch_size: int = 1
    vad: bool = False  # use the system's voice activity filter
    calm: bool = False  # discard text without speech
    defaults: bool = False  # the system's own options, including temperature fallback

    @property
    def needs(self) -> set[str]:
        needed = {
            "sequential": self.batch_size == 1,
            "batch": self.batch_size > 1,
            "beam": self.beam_size > 1,
            "words": self.words,
            "vad": self.vad,
            "calm": self.calm,
            "defaults": self.defaults,
        }
        return {name for name, is_needed in needed.items() if is_needed}


class WhisperNNX:
    """This project."""

    ABLE = frozenset({"encode", "sequential", "beam", "words", "batch", "vad", "calm", "defaults"})

    def __init__(
        self, dtype: str, weights: str, checkpoint: Path, tokens: int | None, kv_cache_dtype: str | None = None
    ):
        from whisper_nnx.runtime.allocator import keep_memory

        keep_memory()  # as the command does
        import jax

        import whisper_nnx

        self.nnx, self.jax = whisper_nnx, jax
        precision = {"dtype": dtype, "weights": weights, "kv_cache_dtype": kv_cache_dtype}
        self.model = whisper_nnx.load_model(str(checkpoint / "huggingface"), **precision)
        self.encoder = jax.jit(lambda encoder, mel: encoder(mel))
        self.fixed = _fixed(tokens)

    def version(self) -> str:
        device = self.jax.local_devices()[0]
        place = "" if device.platform == "cpu" else f" on {device.device_kind}"
        return f"{self.nnx.__version__}, jax {self.jax.__version__}{place}"

    def encode(self, audio: np.ndarray) -> Callable[[], object]:
        mel = self.nnx.log_mel_spectrogram(self.nnx.pad_or_trim(audio), self.model.config.num_mel_bins)
        return lambda: self.encoder(self.model.encoder, mel[None]).block_until_ready()

    def device_mb(self) -> float | None:
        stats = self.jax.local_devices()[0].memory_stats()
        return stats["peak_bytes_in_use"] / 1e6 if stats else None

    def _options(self, work: Work) -> dict[str, Any]:
        options: dict[str, Any] = {} if work.defaults else GREEDY | self.fixed
        options |= {"beam_size": work.beam_size} if work.beam_size > 1 else {}
        options |= {"vad_parameters": SHORT_PAUSES} if work.vad and not work.defaults else {}
        options |= {"hallucination": "calm"} if work.calm else {}
        return options | {"language": work.language, "word_timestamps": work.words, "vad_filter": work.vad}

    def warm_up(self, work: Work) -> None:
        """Compiles programs that the first windows of a recording do not use."""
        self.nnx.warmup(self.model, batch_sizes=(work.batch_size,), **self._options(work))

    def transcribe(self, recordings: Sequence[np.ndarray], work: Work) -> list[Written]:
        results = self.nnx.transcribe(self.model, list(recordings), batch_size=work.batch_size, **self._options(work))
        return [_written(result) for result in results]


class OpenAIWhisper:
    """openai-whisper, in float32 (float16 on a GPU), without batches."""

    ABLE = frozenset({"encode", "sequential", "beam", "words", "defaults"})

    def __init__(self, checkpoint: Path, tokens: int | None):
        import torch
        import whisper

        torch.manual_seed(0)
        self.whisper, self.torch = whisper, torch
        self.model = whisper.load_model(str(checkpoint / "openai.pt"), device=_torch_device())
        self.fixed, self.half = _fixed(tokens), _torch_device() == "cuda"

    def version(self) -> str:
        return f"{self.whisper.__version__}, torch {self.torch.__version__}"

    def encode(self, audio: np.ndarray) -> Callable[[], object]:
        samples = self.whisper.pad_or_trim(audio)
        mel = self.whisper.log_mel_spectrogram(samples, self.model.dims.n_mels, device=self.model.device)[None]
        mel = mel.half() if self.half else mel
        return self.torch.no_grad()(lambda: self.model.encoder(mel).cpu())

    def transcribe(self, recordings: Sequence[np.ndarray], work: Work) -> list[Written]:
        options: dict[str, Any] = {} if work.defaults else GREEDY | self.fixed
        options |= {"beam_size": work.beam_size} if work.beam_size > 1 else {}
        options |= {"language": work.language, "word_timestamps": work.words, "fp16": self.half}
        return [_written(self.model.transcribe(audio, **options)) for audio in recordings]


class Transformers:
    """Hugging Face transformers with SDPA and its own long-form decoding, one by one or in batches."""

    ABLE = frozenset({"encode", "sequential", "beam", "words", "batch"})

    def __init__(self, dtype: str, checkpoint: Path, tokens: int | None):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        self.torch, self.transformers, self.tokens = torch, transformers, tokens
        folder, self.dtype = checkpoint / "huggingface", getattr(torch, dtype)
        load = transformers.WhisperForConditionalGeneration.from_pretrained
        self.model = load(folder, dtype=self.dtype, attn_implementation="sdpa").eval().to(_torch_device())
        self.extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder)
        self.tokenizer = transformers.WhisperTokenizerFast.from_pretrained(folder)

    def version(self) -> str:
        return f"{self.transformers.__version__}, torch {self.torch.__version__}"

    def device_mb(self) -> float | None:
        return self.torch.cuda.max_memory_allocated() / 1e6 if self.torch.cuda.is_available() else None

    def _features(self, recordings: Sequence[np.ndarray]) -> dict[str, Any]:
        longer = max(map(len, recordings)) > 30 * SAMPLE_RATE
        padding = {"truncation": False, "padding": "longest"} if longer else {}
        found = self.extractor(
            list(recordings),
            sampling_rate=SAMPLE_RATE,
            return_tensors="pt",
            return_attention_mask=True,
            device=str(self.model.device),
            **padding,
        ).to(self.model.device)
        return {
            "input_features": found.input_features.to(self.dtype),
            "attention_mask": found.attention_mask,
        }

    def encode(self, audio: np.ndarray) -> Callable[[], object]:
        mel = self._features([audio])["input_features"]
        return self.torch.no_grad()(lambda: self.model.model.encoder(mel).last_hidden_state.cpu())

    def transcribe(self, recordings: Sequence[np.ndarray], work: Work) -> list[Written]:
        options: dict[str, Any] = {"num_beams": work.beam_size, "do_sample": False}
        options |= {"max_new_tokens": self.tokens} if self.tokens else {"return_timestamps": True}
        if self.model.generation_config.is_multilingual:
            options |= {"language": work.language, "task": "transcribe"}
        if work.words:
            options |= {"return_token_timestamps": True, "return_segments": True}
        written = []
        for start in range(0, len(recordings), work.batch_size):
            made = self.model.generate(**self._features(recordings[start : start + work.batch_size]), **options)
            for ids in made["sequences"] if isinstance(made, dict) else made:
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                written.append(Written(text, int((ids < self.model.config.eos_token_id).sum())))
        return written


class FasterWhisper:
    """faster-whisper, with all cores or a GPU, one recording at a time."""

    ABLE = frozenset({"encode", "sequential", "beam", "words", "vad", "defaults"})

    def __init__(self, compute_type: str, checkpoint: Path, tokens: int | None):
        import ctranslate2
        import faster_whisper

        ctranslate2.set_random_seed(0)
        self.about = f"{faster_whisper.__version__}, ctranslate2 {ctranslate2.__version__}"
        device = "cuda" if ctranslate2.get_cuda_device_count() else "cpu"
        if compute_type == "half":
            compute_type = "float16" if device == "cuda" else "float32"
        place = {"device": device, "compute_type": compute_type, "cpu_threads": CORES}
        self.model = faster_whisper.WhisperModel(str(checkpoint / "ctranslate2"), **place)
        # Its length limit includes the prompt (4 ids) and is then halved.
        limit = {"max_new_tokens": 2 * tokens - 4} if tokens else {}
        self.fixed = {"no_speech_threshold": None, "without_timestamps": True, **limit} if tokens else {}

    def version(self) -> str:
        return self.about

    def encode(self, audio: np.ndarray) -> Callable[[], object]:
        from faster_whisper.audio import pad_or_trim

        mel = pad_or_trim(self.model.feature_extractor(audio))
        return lambda: np.asarray(self.model.encode(mel))

    def transcribe(self, recordings: Sequence[np.ndarray], work: Work) -> list[Written]:
        options: dict[str, Any] = {} if work.defaults else {**GREEDY, "beam_size": work.beam_size, **self.fixed}
        options |= {"language": work.language, "word_timestamps": work.words, "vad_filter": work.vad}
        return [_joined(self.model.transcribe(audio, **options)[0]) for audio in recordings]


class FasterWhisperBatched:
    """faster-whisper's BatchedInferencePipeline, which decodes pieces of one recording together: the given recordings,
    joined, or those found by its voice activity filter. By default it writes no timestamps within a piece."""

    ABLE = frozenset({"batch", "vad"})

    def __init__(self, compute_type: str, checkpoint: Path, tokens: int | None):
        from faster_whisper import BatchedInferencePipeline

        self.plain = FasterWhisper(compute_type, checkpoint, tokens)
        self.pipeline = BatchedInferencePipeline(self.plain.model)

    def version(self) -> str:
        return self.plain.version()

    def transcribe(self, recordings: Sequence[np.ndarray], work: Work) -> list[Written]:
        options = GREEDY | {"language": work.language, "beam_size": work.beam_size, "batch_size": work.batch_size}
        options |= {"word_timestamps": work.words, "vad_filter": work.vad} | self.plain.fixed
        if not work.vad:
            ends_s = np.cumsum([0, *map(len, recordings)]) / SAMPLE_RATE
            options["clip_timestamps"] = [{"start": start, "end": end} for start, end in pairwise(ends_s)]
        return [_joined(self.pipeline.transcribe(np.concatenate(recordings), **options)[0])]


class WhisperCpp:
    """whisper.cpp through pywhispercpp's wheel, one recording at a time."""

    ABLE = frozenset({"sequential", "beam"})

    def __init__(self, weights: str, checkpoint: Path, tokens: int | None):
        import _pywhispercpp

        self.api, self.path, self.tokens = _pywhispercpp, str(checkpoint / f"ggml-{weights}.bin"), tokens
        self.models = {1: self._model(1)}

    def _model(self, beam_size: int) -> Any:
        from pywhispercpp.model import Model

        options: dict[str, Any] = {"n_threads": CORES, "temperature_inc": 0.0, "no_context": True}
        options |= {"print_progress": False, "print_realtime": False, "redirect_whispercpp_logs_to": None}
        if self.tokens:
            options |= {"max_tokens": self.tokens, "no_timestamps": True, "single_segment": True}
        if beam_size > 1:
            options |= {"params_sampling_strategy": 1, "beam_search": {"beam_size": beam_size, "patience": -1.0}}
        return Model(self.path, **options)

    def version(self) -> str:
        return f"pywhispercpp {importlib.metadata.version('pywhispercpp')}"

    def transcribe(self, recordings: Sequence[np.ndarray], work: Work) -> list[Written]:
        if work.beam_size not in self.models:
            self.models[work.beam_size] = self._model(work.beam_size)
        model, api, written = self.models[work.beam_size], self.api, []
        for audio in recordings:
            segments, context = model.transcribe(audio, language=work.language), model._ctx
            ids = [
                api.whisper_full_get_token_id(context, i, j)
                for i in range(len(segments))
                for j in range(api.whisper_full_n_tokens(context, i))
            ]
            text = " ".join(segment.text for segment in segments)
            written.append(Written(text, sum(token < api.whisper_token_eot(context) for token in ids)))
        return written


SYSTEMS: dict[str, Callable[[Path, int | None], Any]] = {  # ours first
    "whisper_nnx": partial(WhisperNNX, "float32", "float32"),
    "whisper_nnx, bfloat16": partial(WhisperNNX, "bfloat16", "bfloat16"),
    "whisper_nnx, int8": partial(WhisperNNX, "bfloat16", "int8"),  # computes in bfloat16
    "openai-whisper": OpenAIWhisper,
    "transformers": partial(Transformers, "float32"),
    "faster-whisper": partial(FasterWhisper, "float32"),
    "faster-whisper, int8": partial(FasterWhisper, "int8"),
    "faster-whisper, batched": partial(FasterWhisperBatched, "float32"),
    "faster-whisper, batched, int8": partial(FasterWhisperBatched, "int8"),
    "whisper.cpp, f16": partial(WhisperCpp, "f16"),
    "whisper.cpp, q8_0": partial(WhisperCpp, "q8_0"),
}
SYSTEMS |= (
    ON_REQUEST := {  # only if selected by name: on many CPUs some take minutes per window
        "whisper_nnx, float16": partial(WhisperNNX, "float16", "float16"),
        "whisper_nnx, float32, int8 weights": partial(WhisperNNX, "float32", "int8"),
        "whisper_nnx, bfloat16, int8 audio keys and values": partial(
            WhisperNNX, "bfloat16", "bfloat16", kv_cache_dtype="int8"
        ),
        "transformers, bfloat16": partial(Transformers, "bfloat16"),
        "faster-whisper, half": partial(FasterWhisper, "half"),  # float32 on CPUs
        "faster-whisper, batched, half": partial(FasterWhisperBatched, "half"),
    }
)


FORMATS = {  # start of a system's name -> the file or folder that it loads
    "whisper_nnx": "huggingface",
    "openai-whisper": "openai.pt",
    "transformers": "huggingface",
    "faster-whisper": "ctranslate2",
    "whisper.cpp, f16": "ggml-f16.bin",
    "whisper.cpp, q8_0": "ggml-q8_0.bin",
}


def formats(names: list[str]) -> set[str]:
    return {file for start, file in FORMATS.items() if any(name.startswith(start) for name in names)}


def chosen(pattern: str) -> list[str]:
    """Selects ours and the peers that match a regular expression; those on request only if it is not empty."""
    return [
        name
        for name in SYSTEMS
        if (name not in ON_REQUEST and name.startswith("whisper_nnx"))
        or (re.search(pattern, name) and (pattern or name not in ON_REQUEST))
    ]


def is_able(name: str, work: Work | None) -> bool:
    """Whether a system supports the work; None: encoding only."""
    factory = SYSTEMS[name]
    able = (factory.func if isinstance(factory, partial) else factory).ABLE
    return (work.needs if work else {"encode"}) <= able


def _torch_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _fixed(tokens: int | None) -> dict[str, Any]:
    """Options that give every window of random weights this many tokens."""
    return {"sample_len": tokens, "without_timestamps": True, "no_speech_threshold": None} if tokens else {}


def _written(result: Any) -> Written:
    if isinstance(result, Exception):
        raise result
    return Written(result["text"], sum(len(segment["tokens"]) for segment in result["segments"]))


def _joined(segments: Any) -> Written:
    segments = list(segments)
    return Written(" ".join(segment.text for segment in segments), sum(len(segment.tokens) for segment in segments))
