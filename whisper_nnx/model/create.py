"""Models with random weights, by released size or configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from flax import nnx

from whisper_nnx.model.config import ALIASES, RELEASED, WhisperConfig
from whisper_nnx.model.layers import AttentionFn, Dtype
from whisper_nnx.model.whisper import Whisper


def create_whisper(
    size: str | WhisperConfig,
    *,
    rngs: nnx.Rngs | None = None,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    attention_fn: AttentionFn | None = None,
    kv_cache_dtype: Dtype = None,
    **changes: Any,
) -> Whisper:
    """A model with random weights; `size` is a released name ("tiny", "large-v3") or a config, `changes` alter it.

    Raises ValueError for an unknown name or an impossible shape.
    """
    if isinstance(size, str):
        name = ALIASES.get(size, size)
        if name not in RELEASED:
            raise ValueError(f"unknown size {size!r}; choose one of {', '.join([*RELEASED, *ALIASES])}")
        size = RELEASED[name]
    if "d_model" in changes:  # reset the MLP widths to 4 * d_model
        changes = {"encoder_ffn_dim": 0, "decoder_ffn_dim": 0, **changes}
    options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "attention_fn": attention_fn}
    options["kv_cache_dtype"] = kv_cache_dtype
    return Whisper(replace(size, **changes), rngs=rngs, **options)


def _creator(name: str, size: str) -> Callable[..., Whisper]:
    """`create_whisper` for one size, as a function of its own."""

    def create(
        *, rngs: nnx.Rngs | None = None, dtype: Dtype = jnp.float32, param_dtype: Dtype = jnp.float32, **changes: Any
    ) -> Whisper:
        return create_whisper(size, rngs=rngs, dtype=dtype, param_dtype=param_dtype, **changes)

    shape = RELEASED[size]
    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"""A {size} model with random weights; `load_model({size!r})` loads the trained ones.

    It has {shape.encoder_layers} encoder and {shape.decoder_layers} decoder layers of width {shape.d_model}
    for {shape.num_mel_bins} mels and {shape.vocab_size} tokens, and no tokenizer.

    Args:
      rngs: source of the random weights; None: nnx.Rngs(0).
      dtype: of the computation.
      param_dtype: of the weights.
      changes: other values for fields of `WhisperConfig`, such as encoder_layers=2 or dropout=0.1.

    Raises:
      ValueError: a shape that cannot be built.
    """
    return create


create_whisper_tiny = _creator("create_whisper_tiny", "tiny")
create_whisper_base = _creator("create_whisper_base", "base")
create_whisper_small = _creator("create_whisper_small", "small")
create_whisper_medium = _creator("create_whisper_medium", "medium")
create_whisper_large = _creator("create_whisper_large", "large-v3")
create_whisper_turbo = _creator("create_whisper_turbo", "large-v3-turbo")
