"""The systems that are timed, each behind the same pieces of work; `compare.py` runs each in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np


class WhisperNNX:
    """This project, in float32."""

    name = "whisper_nnx"

    def __init__(self, folder: Path):
        import jax

        import whisper_nnx

        self.nnx, self.jax = whisper_nnx, jax
        self.model = whisper_nnx.load_model(str(folder))
        self.encoder = jax.jit(lambda encoder, mel: encoder(mel))

    def version(self) -> str:
        return f"{self.nnx.__version__}, jax {self.jax.__version__}"

    def mel(self, audio: np.ndarray):
        return self.nnx.log_mel_spectrogram(audio, self.model.config.num_mel_bins).block_until_ready()

    def encode(self, mel) -> None:
        self.encoder(self.model.encoder, mel[None]).block_until_ready()

    def decode(self, mel, **options) -> int:
        return len(self.nnx.decode(self.model, mel, language="en", **options).tokens)

    def transcribe(self, audio: np.ndarray, **options) -> int:
        result = self.nnx.transcribe(self.model, audio, language="en", temperature=0.0, **options)
        return sum(len(segment["tokens"]) for segment in result["segments"])


class OpenAIWhisper:
    """openai-whisper on the same weights, in float32."""

    name = "openai-whisper"

    def __init__(self, folder: Path):
        import torch
        import whisper

        self.whisper, self.torch = whisper, torch
        self.model = openai_from_hf(folder)

    def version(self) -> str:
        return f"{self.whisper.__version__}, torch {self.torch.__version__}"

    def mel(self, audio: np.ndarray):
        return self.whisper.log_mel_spectrogram(audio, self.model.dims.n_mels)

    def encode(self, mel) -> None:
        with self.torch.no_grad():
            self.model.encoder(mel[None])

    def decode(self, mel, **options) -> int:
        options = self.whisper.DecodingOptions(language="en", fp16=False, **options)
        return len(self.whisper.decode(self.model, mel, options).tokens)

    def transcribe(self, audio: np.ndarray, **options) -> int:
        result = self.model.transcribe(audio, language="en", temperature=0.0, fp16=False, **options)
        return sum(len(segment["tokens"]) for segment in result["segments"])


SYSTEMS = {system.name: system for system in (WhisperNNX, OpenAIWhisper)}


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
    return model.eval()


def work(system, audio: np.ndarray, fixed: dict) -> dict[str, Callable[[], int | None]]:
    """What is timed, by name; what decodes returns its number of tokens, which must be the same for all systems.

    fixed: options that make random weights decode a fixed number of tokens, empty for trained ones.
    """
    window = np.pad(audio[:480_000], (0, max(0, 480_000 - len(audio))))
    mel = system.mel(window)
    minutes = f"{len(audio) / 16_000 / 60:.1f} min"
    whole = {**fixed, "without_timestamps": True} if fixed else {}

    def log_mel() -> None:
        system.mel(window)

    return {
        "log-mel, 30 s": log_mel,
        "encoder, one window": lambda: system.encode(mel),
        "one window, greedy": lambda: system.decode(mel, **fixed),
        "one window, beam 5": lambda: system.decode(mel, beam_size=5, **fixed),
        f"{minutes}, greedy": lambda: system.transcribe(audio, **whole),
        f"{minutes}, beam 5": lambda: system.transcribe(audio, beam_size=5, **whole),
    }
