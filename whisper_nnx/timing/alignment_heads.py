"""The decoder's (layer, head) pairs whose cross-attention follows the audio, by which words are timed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache

from whisper_nnx.model.config import WhisperConfig, released_alignment_heads
from whisper_nnx.model.heads import Heads, check_heads


def alignment_heads(config: WhisperConfig, chosen: Heads | Sequence[Sequence[int]] | int | None = None) -> Heads:
    """The (layer, head) pairs by which words are timed.

    chosen: pairs; or n, for all heads of the n top layers; None: those of the checkpoint, or else of the released size
    of this shape, or else all heads of the upper half of the layers, with a warning. ValueError for those that do not
    exist.
    """
    if chosen is None:
        return config.alignment_heads or released_alignment_heads(config) or _upper_half(config)
    layers = config.decoder_layers
    if isinstance(chosen, int):
        if not 1 <= chosen <= layers:
            raise ValueError(f"alignment_heads={chosen} top layers, but the decoder has {layers}; choose 1 to {layers}")
        return _heads_from(config, layers - chosen)
    pairs = tuple((int(layer), int(head)) for layer, head in chosen)
    if not pairs:
        raise ValueError(
            "alignment_heads=() times no words; name at least one (layer, head), or None for the usual ones"
        )
    check_heads(config, pairs)
    return tuple(sorted(set(pairs)))  # attention scores come layer by layer; the order means nothing


@lru_cache
def _upper_half(config: WhisperConfig) -> Heads:
    """Cached, so that a model is warned of once."""
    instead = (
        f"all heads of the upper {config.decoder_layers - config.decoder_layers // 2} decoder layers time the words"
    )
    warnings.warn(
        f"this checkpoint names no alignment heads: {instead}; find_alignment_heads() measures better ones",
        stacklevel=3,
    )
    return _heads_from(config, config.decoder_layers // 2)


def _heads_from(config: WhisperConfig, layer: int) -> Heads:
    return tuple((i, h) for i in range(layer, config.decoder_layers) for h in range(config.decoder_attention_heads))
