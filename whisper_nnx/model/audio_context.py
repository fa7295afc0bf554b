"""`with_audio_ctx`: a model that encodes shorter windows."""

from __future__ import annotations

from dataclasses import replace

import jax
from flax import nnx

from whisper_nnx.model.config import released_alignment_heads
from whisper_nnx.model.whisper import Constant, Whisper

SHORTEST = 10  # positions: windows of 0.2 s


def with_audio_ctx(model: Whisper, audio_ctx: int | None) -> Whisper:
    """A model that shares the weights of another and encodes windows of `audio_ctx` positions of 20 ms.

    Its encoder has the first positional embeddings only, and its configuration that number of positions; windows,
    their timestamps and their cross-attention follow from it. 0 or None: the model as it is.

    Raises:
      ValueError: fewer than 10 positions, or more than the model has.
    """
    config = model.config
    if audio_ctx in (0, None, config.max_source_positions):
        return model
    if audio_ctx != int(audio_ctx) or not SHORTEST <= audio_ctx <= config.max_source_positions:
        raise ValueError(
            f"audio_ctx={audio_ctx} must be a whole number of encoder positions (20 ms) from {SHORTEST} to "
            f"{config.max_source_positions}, or 0 for all"
        )
    short = nnx.merge(*nnx.split(model))
    embedding = model.encoder.embed_positions[...]
    cut = jax.device_put(embedding[:audio_ctx], embedding.sharding)
    short.encoder.embed_positions, short.encoder.max_positions = Constant(cut), audio_ctx
    heads = config.alignment_heads or released_alignment_heads(config)
    short.config = replace(config, max_source_positions=audio_ctx, alignment_heads=heads)
    return short
