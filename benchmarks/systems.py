"""The systems that are timed, each behind the same pieces of work; `compare.py` runs each in a process of its own.

A system is made from a folder with one checkpoint in several formats (`prepare`). What decodes returns the number of
tokens. What a system cannot do it has no method for.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

SAMPLE_RATE = 16_000
TOKENS = 100  # of each window, where the weights are random
SUPPRESSED = "suppressed.txt"  # names the tokens that random weights may not say: end of text, timestamps


class WhisperNNX:
    """This project, in float32."""

    name = "whisper_nnx"

    def __init__(self, checkpoint: Path):
        import jax

        import whisper_nnx

        self.nnx, self.jax = whisper_nnx, jax
        self.model = whisper_nnx.load_model(str(checkpoint / "huggingface"))
        self.encoder = jax.jit(lambda encoder, mel: encoder(mel))
        self.fixed, self.fixed_whole = _fixed(checkpoint)

    def version(self) -> str:
        return f"{self.nnx.__version__}, jax {self.jax.__version__}"

    def mel(self, audio: np.ndarray):
        return self.nnx.log_mel_spectrogram(audio, self.model.config.num_mel_bins).block_until_ready()

    def encode(self, mel) -> None:
        self.encoder(self.model.encoder, mel[None]).block_until_ready()

    def decode(self, mel, beam_size: int | None = None) -> int:
        return len(self.nnx.decode(self.model, mel, language="en", beam_size=beam_size, **self.fixed).tokens)

    def transcribe(self, audio: np.ndarray, **options) -> int:
        return self.transcribe_all([audio], 1, **options)

    def transcribe_all(self, recordings: Sequence[np.ndarray], batch_size: int, **options) -> int:
        options = {"language": "en", "temperature": 0.0, **self.fixed_whole, **options}
        results = self.nnx.transcribe(self.model, list(recordings), batch_size=batch_size, **options)
        return sum(map(_tokens, results))

    def text(self, audio: np.ndarray, **options) -> str:
        return self.nnx.transcribe(self.model, audio, language="en", **options)["text"]


class OpenAIWhisper:
    """openai-whisper on the same weights, in float32; recordings one after the other, since it knows no batches."""

    name = "openai-whisper"

    def __init__(self, checkpoint: Path):
        import torch
        import whisper

        self.whisper, self.torch = whisper, torch
        self.model = openai_from_hf(checkpoint / "huggingface")
        self.fixed, self.fixed_whole = _fixed(checkpoint)

    def version(self) -> str:
        return f"{self.whisper.__version__}, torch {self.torch.__version__}"

    def mel(self, audio: np.ndarray):
        return self.whisper.log_mel_spectrogram(audio, self.model.dims.n_mels)

    def encode(self, mel) -> None:
        with self.torch.no_grad():
            self.model.encoder(mel[None])

    def decode(self, mel, beam_size: int | None = None) -> int:
        options = self.whisper.DecodingOptions(language="en", fp16=False, beam_size=beam_size, **self.fixed)
        return len(self.whisper.decode(self.model, mel, options).tokens)

    def transcribe(self, audio: np.ndarray, **options) -> int:
        options = {"language": "en", "temperature": 0.0, "fp16": False, **self.fixed_whole, **options}
        return _tokens(self.model.transcribe(audio, **options))

    def transcribe_all(self, recordings: Sequence[np.ndarray], batch_size: int) -> int:
        return sum(map(self.transcribe, recordings))

    def text(self, audio: np.ndarray, **options) -> str:
        return self.model.transcribe(audio, language="en", fp16=False, **options)["text"]


class FasterWhisper:
    """faster-whisper on the same weights, in float32, with all cores; recordings one after the other."""

    name = "faster-whisper"

    def __init__(self, checkpoint: Path):
        import ctranslate2
        import faster_whisper

        self.about = f"{faster_whisper.__version__}, ctranslate2 {ctranslate2.__version__}"
        place = {"device": "cpu", "compute_type": "float32", "cpu_threads": os.cpu_count() or 1}
        self.model = faster_whisper.WhisperModel(str(checkpoint / "ctranslate2"), **place)
        self.fixed = _fixed(checkpoint)[1]
        if self.fixed:
            # Its length limit is halved with the prompt (4 ids, without previous text) counted in.
            self.fixed["max_new_tokens"] = 2 * self.fixed.pop("sample_len") - 4
            self.fixed["suppress_tokens"] = [int(token) for token in self.fixed["suppress_tokens"].split(",")]

    def version(self) -> str:
        return self.about

    def mel(self, audio: np.ndarray):
        return self.model.feature_extractor(audio)[:, : len(audio) // 160]

    def encode(self, mel) -> None:
        self.model.encode(mel)

    def transcribe(self, audio: np.ndarray, **options) -> int:
        options = {"language": "en", "temperature": 0.0, "beam_size": 1, **self.fixed, **options}
        segments, _ = self.model.transcribe(audio, **options)
        return sum(len(segment.tokens) for segment in segments)

    def transcribe_all(self, recordings: Sequence[np.ndarray], batch_size: int) -> int:
        return sum(map(self.transcribe, recordings))

    def text(self, audio: np.ndarray, **options) -> str:
        segments, _ = self.model.transcribe(audio, language="en", **options)
        return " ".join(segment.text for segment in segments)


class FasterWhisperBatched:
    """Its BatchedInferencePipeline, which decodes pieces of one recording together: here the recordings, joined."""

    name = "faster-whisper, batched"

    def __init__(self, checkpoint: Path):
        from faster_whisper import BatchedInferencePipeline

        self.plain = FasterWhisper(checkpoint)
        self.plain.model = BatchedInferencePipeline(self.plain.model)
        self.plain.fixed.pop("condition_on_previous_text", None)

    def version(self) -> str:
        return self.plain.version()

    def transcribe_all(self, recordings: Sequence[np.ndarray], batch_size: int) -> int:
        ends_s = np.cumsum([0, *map(len, recordings)]) / SAMPLE_RATE
        clips = [{"start": start, "end": end} for start, end in pairwise(ends_s)]
        audio = np.concatenate(recordings)
        return self.plain.transcribe(audio, vad_filter=False, clip_timestamps=clips, batch_size=batch_size)

    def text(self, audio: np.ndarray, **options) -> str:
        return self.plain.text(audio, **options)


SYSTEMS = {system.name: system for system in (WhisperNNX, OpenAIWhisper, FasterWhisper, FasterWhisperBatched)}


def _fixed(checkpoint: Path) -> tuple[dict, dict]:
    """Options with which random weights decode a fixed number of tokens: of a window, and of each of a recording's."""
    if not (suppressed := checkpoint / SUPPRESSED).exists():
        return {}, {}
    window = {"sample_len": TOKENS, "suppress_tokens": suppressed.read_text(), "without_timestamps": True}
    return window, {**window, "no_speech_threshold": None, "condition_on_previous_text": False}


def _tokens(result: dict) -> int:
    return sum(len(segment["tokens"]) for segment in result["segments"])


def prepare(folder: Path, scratch: Path, random_shape: str | None = None) -> Path:
    """Puts the checkpoint of a folder, or random weights of a released shape with its vocabulary, in all formats into
    `scratch`, from which each system is made."""
    made = scratch / "huggingface"
    if random_shape:
        from whisper_nnx import RELEASED, Tokenizer, create_whisper, save_pretrained

        model = create_whisper(replace(RELEASED[random_shape], vocab_size=51865, num_mel_bins=80))
        model.tokenizer = Tokenizer.from_folder(folder)
        save_pretrained(model, made)
        for name in ("tokenizer.json", "preprocessor_config.json"):
            shutil.copyfile(folder / name, made / name)
        special = model.tokenizer.special
        timestamps = range(special.timestamp_begin, special.timestamp_end + 1)
        (scratch / SUPPRESSED).write_text(",".join(map(str, [-1, special.eot, *timestamps])))
    else:
        made.symlink_to(folder.resolve())
    command = [Path(sys.executable).parent / "ct2-transformers-converter", "--model", made]
    command += ["--output_dir", scratch / "ctranslate2", "--copy_files", "tokenizer.json", "preprocessor_config.json"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return scratch


def openai_from_hf(folder: Path):
    """An openai-whisper model with the weights of a Hugging Face folder."""
    import torch
    from safetensors.torch import load_file
    from whisper.model import ModelDimensions, Whisper

    c = json.loads((folder / "config.json").read_text())
    dims = ModelDimensions(
        n_mels=c["num_mel_bins"],
        n_audio_ctx=c["max_source_positions"],
        n_audio_state=c["d_model"],
        n_audio_head=c["encoder_attention_heads"],
        n_audio_layer=c["encoder_layers"],
        n_vocab=c["vocab_size"],
        n_text_ctx=c["max_target_positions"],
        n_text_state=c["d_model"],
        n_text_head=c["decoder_attention_heads"],
        n_text_layer=c["decoder_layers"],
    )
    renamed = {
        "model.": "",
        "layers.": "blocks.",
        "embed_tokens.weight": "token_embedding.weight",
        "embed_positions.weight": "positional_embedding",
        "self_attn_layer_norm": "attn_ln",
        "encoder_attn_layer_norm": "cross_attn_ln",
        "final_layer_norm": "mlp_ln",
        "encoder.layer_norm": "encoder.ln_post",
        "decoder.layer_norm": "decoder.ln",
        "self_attn": "attn",
        "encoder_attn": "cross_attn",
        "q_proj": "query",
        "k_proj": "key",
        "v_proj": "value",
        "out_proj": "out",
        "fc1": "mlp.0",
        "fc2": "mlp.2",
    }
    state: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        state[name] = tensor.float()
    model = Whisper(dims)
    state.pop("proj_out.weight", None)
    model.load_state_dict(state)
    heads = json.loads((folder / "generation_config.json").read_text()).get("alignment_heads")
    if heads:
        mask = torch.zeros(dims.n_text_layer, dims.n_text_head, dtype=torch.bool)
        mask[tuple(zip(*heads, strict=True))] = True
        model.register_buffer("alignment_heads", mask.to_sparse(), persistent=False)
    return model.eval()


def work(system, audio: np.ndarray) -> dict[str, Callable[[], int | None]]:
    """What is timed, by name; what decodes returns its number of tokens, which must be the same for all systems."""
    window, minute, ten_minutes = (fitted(audio, seconds) for seconds in (30, 60, 600))
    recordings = np.split(ten_minutes, 20)
    mel = system.mel(window) if hasattr(system, "mel") else None
    pieces = {
        "log-mel, 30 s": ("mel", lambda: system.mel(window) is None),
        "encoder, 30 s": ("encode", lambda: system.encode(mel)),
        "one window, greedy": ("decode", lambda: system.decode(mel)),
        "one window, beam 5": ("decode", lambda: system.decode(mel, beam_size=5)),
        "1 min, greedy": ("transcribe", lambda: system.transcribe(minute)),
        "1 min, beam 5": ("transcribe", lambda: system.transcribe(minute, beam_size=5)),
        "1 min, greedy, words": ("transcribe", lambda: system.transcribe(minute, word_timestamps=True)),
        "10 min, greedy": ("transcribe", lambda: system.transcribe(ten_minutes)),
        "20 recordings of 30 s, batch 20": ("transcribe_all", lambda: system.transcribe_all(recordings, 20)),
    }
    return {name: run for name, (method, run) in pieces.items() if hasattr(system, method)}


def fitted(audio: np.ndarray, seconds: int) -> np.ndarray:
    """Samples, repeated or cut to that many seconds."""
    return np.resize(audio, seconds * SAMPLE_RATE)


def reset_peak_memory() -> None:
    """Lets `peak_memory_mb` begin anew, where the system can do that (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> float:
    """The most memory that this process held in RAM since `reset_peak_memory`, or, where that has no effect, ever."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    except (OSError, StopIteration):
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return kilobytes / (1024**2 if sys.platform == "darwin" else 1024)
