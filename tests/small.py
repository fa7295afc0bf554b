"""A Whisper of a few thousand random parameters with a vocabulary made by hand: decodes in milliseconds."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src import compiler

from weight_loader.load import abstract_model
from whisper_nnx.model.config import WhisperConfig
from whisper_nnx.model.whisper import Whisper, sinusoids
from whisper_nnx.text.tokenizer import Tokenizer

LANGUAGES = ("en", "de", "es", "fr")
MERGES = ("Ġ t", "h e", "Ġt he", "o n", "on e", "Ġ one", "Ġt w", "Ġtw o", "Ġ a", "Ġa n", "Ġan d", "e r", "Ġ (", "Ġ -")
TIMESTAMPS = 51  # a window of one second
PADDING = 5  # rows of the vocabulary matrix without a token


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    """For modules that import it: here programs take longer to compile than to run."""
    with compiling_quickly():
        yield


# The older code generator of XLA's CPU compiler takes half the time where nothing is optimized.
_WITHOUT_EMITTERS = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
_HAS_OLDER_GENERATOR = jax.__version_info__ < (0, 11)


@contextmanager
def compiling_quickly() -> Iterator[None]:
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        if _HAS_OLDER_GENERATOR:
            patch.setattr(compiler, "get_compile_options", partial(_without_emitters, compiler.get_compile_options))
        yield
    jax.config.update("jax_disable_most_optimizations", before)


def _without_emitters(get_compile_options: Any, *args: Any, **options: Any) -> Any:
    overrides = {**(options.pop("env_options_overrides", None) or {}), **_WITHOUT_EMITTERS}
    return get_compile_options(*args, env_options_overrides=overrides, **options)


def quick_environment(*xla_flags: str) -> dict[str, str]:
    """The environment of a process on the CPU where programs take longer to compile than to run."""
    quick = [f"--{name}={str(value).lower()}" for name, value in _WITHOUT_EMITTERS.items() if _HAS_OLDER_GENERATOR]
    return os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": " ".join([os.environ.get("XLA_FLAGS", ""), *quick, *xla_flags]).strip(),
    }


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in `vocab.json`: printable ones for themselves, others from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]


def small_tokenizer_files(*, languages: Sequence[str] = LANGUAGES, added: Sequence[str] = ()) -> dict[str, bytes]:
    """Files of a vocabulary in Whisper's order: bytes, merges, end, start, languages, tasks, timestamps, `added`."""
    text = [*_byte_letters(), *(merge.replace(" ", "") for merge in MERGES), "<|endoftext|>"]
    names = [
        "startoftranscript",
        *languages,
        "translate",
        "transcribe",
        "startoflm",
        "startofprev",
        "nospeech",
        "notimestamps",
        *(f"{step * 0.02:.2f}" for step in range(TIMESTAMPS)),
    ]
    special = [*(f"<|{name}|>" for name in names), *added]
    return {
        "vocab.json": json.dumps({token: i for i, token in enumerate(text)}).encode(),
        "merges.txt": "\n".join(["#version: 0.2", *MERGES, ""]).encode(),
        "added_tokens.json": json.dumps({token: i for i, token in enumerate(special, len(text))}).encode(),
    }


def small_tokenizer(**changes: Any) -> Tokenizer:
    return Tokenizer.from_files(small_tokenizer_files(**changes), small_config().vocab_size)


def small_config(**changes: Any) -> WhisperConfig:
    sizes: dict[str, Any] = {
        "d_model": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_layers": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "vocab_size": len(_byte_letters()) + len(MERGES) + 8 + len(LANGUAGES) + TIMESTAMPS + PADDING,
        "num_mel_bins": 8,
        "max_source_positions": TIMESTAMPS - 1,
        "max_target_positions": 48,
    }
    return WhisperConfig(**{**sizes, **changes})


def small_model(
    *,
    seed: int = 1,
    tokenizer: Tokenizer | None = None,
    spread: float = 2.0,
    end_bias: float = 6.0,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    attention_fn: Any = None,
    kv_cache_dtype: Any = None,
    **changes: Any,
) -> Whisper:
    """Random weights of such a spread that what it says varies and, with `end_bias` on the end's logit, may end."""
    tokenizer = tokenizer or small_tokenizer()
    config = small_config(**changes)
    # Filled by numpy: nothing has to be compiled.
    model = abstract_model(config, dtype, param_dtype, attention_fn, kv_cache_dtype)
    model.tokenizer = tokenizer
    random = np.random.default_rng(seed)

    def fill(variable: nnx.Variable, value: np.ndarray) -> None:
        variable.set_value(jnp.asarray(np.broadcast_to(value, variable.shape).astype(variable.dtype)))

    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if path[-1] == "embedding":
            fill(variable, random.normal(0, 0.7, variable.shape))
        elif path[-1] == "kernel":
            fill(variable, random.normal(0, spread / math.prod(variable.shape[:-1]) ** 0.5, variable.shape))
        elif path[-1] in ("scale", "bias"):
            fill(variable, np.float32(path[-1] == "scale"))
    fill(model.encoder.embed_positions, sinusoids(config.max_source_positions, config.d_model))
    end = np.asarray(model.decoder.embed_tokens.embedding[tokenizer.special.eot], np.float32)
    fill(model.decoder.layer_norm.bias, end * end_bias / (end @ end))
    return model


def small_mel(rows: int = 4, *, seed: int = 0, config: WhisperConfig | None = None) -> jax.Array:
    """Log-mel noise [B,M,T] that fills the model's window."""
    config = config or small_config()
    shape = (rows, config.num_mel_bins, 2 * config.max_source_positions)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
