"""The systems that are timed, each behind the same pieces of work; `compare.py` runs each in a process of its own.

A system is made from a folder with one checkpoint in several formats (`checkpoints.prepare`), is given samples of
16 kHz, and returns the number of tokens that it decoded. What a system cannot do it has no method for. `tokens`: how
many of each window, where the weights are random; None where they are trained. Each imports what it needs when made.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

SAMPLE_RATE = 16_000
CORES = os.cpu_count() or 1


class WhisperNNX:
    """This project."""

    def __init__(self, dtype: str, weights: str, checkpoint: Path, tokens: int | None):
        from whisper_nnx.allocator import keep_memory

        keep_memory()  # as the command does
        import jax

        import whisper_nnx

        self.nnx, self.jax = whisper_nnx, jax
        self.model = whisper_nnx.load_model(str(checkpoint / "huggingface"), dtype=dtype, weights=weights)
        self.encoder = jax.jit(lambda encoder, mel: encoder(mel))
        self.whole = jax.jit(lambda model, mel, ids: model(mel, ids))
        self.fixed = {"sample_len": tokens, "without_timestamps": True} if tokens else {}

    def version(self) -> str:
        return f"{self.nnx.__version__}, jax {self.jax.__version__}"

    def mel(self, audio: np.ndarray) -> Any:
        return self.nnx.log_mel_spectrogram(audio, self.model.config.num_mel_bins).block_until_ready()

    def encode(self, mel: Any) -> None:
        self.encoder(self.model.encoder, mel[None]).block_until_ready()

    def forward(self, mel: Any) -> None:
        self.whole(self.model, mel[None], np.full((1, 3), 1, np.int32)).block_until_ready()

    def transcribe(self, audio: np.ndarray, **options: Any) -> int:
        return self.transcribe_all([audio], 1, **options)

    def transcribe_all(self, recordings: Sequence[np.ndarray], batch_size: int, **options: Any) -> int:
        options = {"language": "en", "temperature": 0.0, **_whole(self.fixed), **options}
        results = self.nnx.transcribe(self.model, list(recordings), batch_size=batch_size, **options)
        return sum(map(_tokens, results))

    def text(self, audio: np.ndarray, **options: Any) -> str:
        return self.nnx.transcribe(self.model, audio, language="en", **options)["text"]


class OpenAIWhisper:
    """openai-whisper, in float32 (on a GPU in float16); it knows no batches."""

    def __init__(self, checkpoint: Path, tokens: int | None):
        import torch
        import whisper

        self.whisper, self.torch = whisper, torch
        self.model = whisper.load_model(str(checkpoint / "openai.pt"), device=_torch_device())
        self.fixed = {"sample_len": tokens, "without_timestamps": True} if tokens else {}
        self.half = _torch_device() == "cuda"

    def version(self) -> str:
        return f"{self.whisper.__version__}, torch {self.torch.__version__}"

    def mel(self, audio: np.ndarray) -> Any:
        mel = self.whisper.log_mel_spectrogram(audio, self.model.dims.n_mels, device=self.model.device)
        return mel.half() if self.half else mel

    def encode(self, mel: Any) -> None:
        with self.torch.no_grad():
            self.model.encoder(mel[None]).cpu()

    def transcribe(self, audio: np.ndarray, **options: Any) -> int:
        options = {"language": "en", "temperature": 0.0, "fp16": self.half, **_whole(self.fixed), **options}
        return _tokens(self.model.transcribe(audio, **options))

    def text(self, audio: np.ndarray, **options: Any) -> str:
        return self.model.transcribe(audio, language="en", fp16=self.half, **options)["text"]


class Transformers:
    """Hugging Face's, with torch's scaled dot-product attention; recordings as windows of 30 s, alone or in batches."""

    def __init__(self, dtype: str, cache: str | None, checkpoint: Path, tokens: int | None):
        import torch
        import transformers

        self.torch, self.transformers, self.cache = torch, transformers, cache
        folder = checkpoint / "huggingface"
        self.dtype, self.tokens = getattr(torch, dtype), tokens
        load = transformers.WhisperForConditionalGeneration.from_pretrained
        self.model = load(folder, dtype=self.dtype, attn_implementation="sdpa").eval().to(_torch_device())
        self.extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder)

    def version(self) -> str:
        return f"{self.transformers.__version__}, torch {self.torch.__version__}"

    def mel(self, *windows: np.ndarray) -> Any:
        found = self.extractor(list(windows), sampling_rate=SAMPLE_RATE, return_tensors="pt")
        return found.input_features.to(self.model.device, self.dtype)

    def encode(self, mel: Any) -> None:
        with self.torch.no_grad():
            self.model.model.encoder(mel).last_hidden_state.cpu()

    def forward(self, mel: Any) -> None:
        ids = self.torch.ones((1, 3), dtype=self.torch.long, device=self.model.device)
        with self.torch.no_grad():
            self.model(mel, decoder_input_ids=ids).logits.cpu()

    def transcribe(self, audio: np.ndarray, beam_size: int = 1) -> int:
        return self.transcribe_all([audio], 1, beam_size)

    def transcribe_all(self, recordings: Sequence[np.ndarray], batch_size: int, beam_size: int = 1) -> int:
        options: dict[str, Any] = {"max_new_tokens": self.tokens} if self.tokens else {}
        if self.cache:
            options["cache_implementation"] = self.cache
        size = 30 * SAMPLE_RATE
        windows = [audio[start : start + size] for audio in recordings for start in range(0, len(audio), size)]
        batches = [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]
        count = 0
        for batch in batches:
            ids = self.model.generate(self.mel(*batch), language="en", num_beams=beam_size, do_sample=False, **options)
            count += int((ids < self.model.config.eos_token_id).sum())
        return count


class FasterWhisper:
    """faster-whisper, with all cores or a GPU; recordings one after the other."""

    def __init__(self, compute_type: str, checkpoint: Path, tokens: int | None):
        import ctranslate2
        import faster_whisper

        self.about = f"{faster_whisper.__version__}, ctranslate2 {ctranslate2.__version__}"
        device = "cuda" if ctranslate2.get_cuda_device_count() else "cpu"
        place = {"device": device, "compute_type": compute_type, "cpu_threads": CORES}
        self.model = faster_whisper.WhisperModel(str(checkpoint / "ctranslate2"), **place)
        # Its length limit is halved with the prompt (4 ids, without previous text) counted in.
        self.fixed = {"max_new_tokens": 2 * tokens - 4, "without_timestamps": True} if tokens else {}

    def version(self) -> str:
        return self.about

    def mel(self, audio: np.ndarray) -> Any:
        return self.model.feature_extractor(audio)[:, : len(audio) // 160]

    def encode(self, mel: Any) -> None:
        self.model.encode(mel)

    def transcribe(self, audio: np.ndarray, **options: Any) -> int:
        options = {"language": "en", "temperature": 0.0, "beam_size": 1, **_whole(self.fixed), **options}
        segments, _ = self.model.transcribe(audio, **options)
        return sum(len(segment.tokens) for segment in segments)

    def text(self, audio: np.ndarray, **options: Any) -> str:
        segments, _ = self.model.transcribe(audio, language="en", **options)
        return " ".join(segment.text for segment in segments)


class FasterWhisperBatched:
    """Its BatchedInferencePipeline, which decodes pieces of one recording together: here the recordings, joined."""

    def __init__(self, compute_type: str, checkpoint: Path, tokens: int | None):
        from faster_whisper import BatchedInferencePipeline

        self.plain = FasterWhisper(compute_type, checkpoint, tokens)
        self.pipeline = BatchedInferencePipeline(self.plain.model)

    def version(self) -> str:
        return self.plain.version()

    def transcribe_all(self, recordings: Sequence[np.ndarray], batch_size: int) -> int:
        ends_s = np.cumsum([0, *map(len, recordings)]) / SAMPLE_RATE
        options = {
            "clip_timestamps": [{"start": start, "end": end} for start, end in pairwise(ends_s)],
            "language": "en",
            "temperature": 0.0,
            "beam_size": 1,
            "vad_filter": False,
            "batch_size": batch_size,
        }
        segments, _ = self.pipeline.transcribe(np.concatenate(recordings), **options, **self.plain.fixed)
        return sum(len(segment.tokens) for segment in segments)

    def text(self, audio: np.ndarray, **options: Any) -> str:
        segments, _ = self.pipeline.transcribe(audio, language="en", **options)
        return " ".join(segment.text for segment in segments)


class WhisperCpp:
    """whisper.cpp through pywhispercpp, weights in float16. It counts the end of text, or what stands in its place."""

    def __init__(self, checkpoint: Path, tokens: int | None):
        import importlib.metadata

        import _pywhispercpp
        from pywhispercpp.model import Model

        self.api, self.about = _pywhispercpp, f"pywhispercpp {importlib.metadata.version('pywhispercpp')}"
        fixed = {"max_tokens": tokens, "no_timestamps": True, "single_segment": True} if tokens else {}
        options = {"n_threads": CORES, "language": "en", "temperature_inc": 0.0, "no_context": True, **fixed}
        options |= {"print_progress": False, "print_realtime": False, "redirect_whispercpp_logs_to": None}
        self.model = Model(str(checkpoint / "ggml.bin"), **options)

    def version(self) -> str:
        return self.about

    def transcribe(self, audio: np.ndarray) -> int:
        segments, api, context = self.model.transcribe(audio), self.api, self.model._ctx
        ids = (
            api.whisper_full_get_token_id(context, i, j)
            for i in range(len(segments))
            for j in range(api.whisper_full_n_tokens(context, i))
        )
        return sum(token < api.whisper_token_eot(context) for token in ids)


class MLXWhisper:
    """mlx-whisper, in float32, on MLX's CPU device."""

    def __init__(self, checkpoint: Path, tokens: int | None):
        import importlib.metadata

        import mlx.core as mx
        import mlx_whisper

        self.whisper, self.folder = mlx_whisper, str(checkpoint / "mlx")
        names = ("mlx-whisper", "mlx")
        self.about = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
        mx.set_default_device(mx.cpu)
        self.fixed = {"sample_len": tokens, "without_timestamps": True} if tokens else {}

    def version(self) -> str:
        return self.about

    def transcribe(self, audio: np.ndarray, **options: Any) -> int:
        options = {"language": "en", "temperature": 0.0, "fp16": False, **_whole(self.fixed), **options}
        return _tokens(self.whisper.transcribe(audio, path_or_hf_repo=self.folder, **options))


SYSTEMS: dict[str, Callable[[Path, int | None], Any]] = {  # ours first
    "whisper_nnx": partial(WhisperNNX, "float32", "float32"),
    "whisper_nnx, bfloat16": partial(WhisperNNX, "bfloat16", "bfloat16"),
    "whisper_nnx, int8": partial(WhisperNNX, "bfloat16", "int8"),  # computes in bfloat16
    "openai-whisper": OpenAIWhisper,
    "transformers": partial(Transformers, "float32", None),
    "transformers, bfloat16": partial(Transformers, "bfloat16", None),
    "transformers, bfloat16, static": partial(Transformers, "bfloat16", "static"),
    "faster-whisper": partial(FasterWhisper, "float32"),
    "faster-whisper, int8": partial(FasterWhisper, "int8"),
    "faster-whisper, batched": partial(FasterWhisperBatched, "float32"),
    "faster-whisper, batched, int8": partial(FasterWhisperBatched, "int8"),
    "whisper.cpp": WhisperCpp,
    "mlx-whisper": MLXWhisper,
}


FORMATS = {  # of the checkpoint that each is made from, by its name up to the comma
    "whisper_nnx": "hf",
    "openai-whisper": "openai",
    "transformers": "hf",
    "faster-whisper": "ct2",
    "whisper.cpp": "ggml",
    "mlx-whisper": "mlx",
}


def _torch_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _whole(fixed: dict) -> dict:
    """Options of a recording whose windows have a fixed number of tokens each: none is told what was said before."""
    return fixed and {**fixed, "no_speech_threshold": None, "condition_on_previous_text": False}


def _tokens(result: Any) -> int:
    return sum(len(segment["tokens"]) for segment in result["segments"])


def work(system: Any, audio: np.ndarray, hour_batch: int = 0) -> dict[str, Callable[[], int | None]]:
    """What is timed, by name; what decodes returns its number of tokens, which must be the same for all systems.

    hour_batch: recordings of 30 s at once in which an hour is done; 0: it is not.
    """
    window, ten_minutes = (fitted(audio, seconds) for seconds in (30, 600))
    recordings = np.split(ten_minutes, 20)
    mel = system.mel(window) if hasattr(system, "mel") else None
    beams, words = {"beam_size": 5}, {"word_timestamps": True}
    beam = "transcribe" if not isinstance(system, WhisperCpp | MLXWhisper) else ""
    timed = "transcribe" if isinstance(system, WhisperNNX | OpenAIWhisper | FasterWhisper) else ""
    pieces = {
        "log-mel, 30 s": ("mel", lambda: system.mel(window) is None),
        "encoder, 30 s": ("encode", lambda: system.encode(mel)),
        "encoder and 3 tokens, 30 s": ("forward", lambda: system.forward(mel)),
        "one window": ("transcribe", lambda: system.transcribe(window)),
        "one window, beam 5": (beam, lambda: system.transcribe(window, **beams)),
        "10 min, one by one": ("transcribe", lambda: system.transcribe(ten_minutes)),
        "10 min, with words": (timed, lambda: system.transcribe(ten_minutes, **words)),
        "10 min, batch 20": ("transcribe_all", lambda: system.transcribe_all(recordings, 20)),
    }
    if hour_batch:
        hour = 6 * recordings
        pieces[f"1 h, batch {hour_batch}"] = ("transcribe_all", lambda: system.transcribe_all(hour, hour_batch))
    return {name: run for name, (method, run) in pieces.items() if hasattr(system, method)}


def fitted(audio: np.ndarray, seconds: int) -> np.ndarray:
    """Samples, repeated or cut to that many seconds."""
    return np.resize(audio, seconds * SAMPLE_RATE)
