"""Heads of the decoder, named by (layer, head) pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from whisper_nnx.model.config import WhisperConfig

Heads = tuple[tuple[int, int], ...]


def check_heads(config: WhisperConfig, pairs: Sequence[Sequence[int]]) -> None:
    """Raises ValueError for a (layer, head) that the decoder does not have."""
    layers, heads = config.decoder_layers, config.decoder_attention_heads
    for layer, head in pairs:
        if not (0 <= layer < layers and 0 <= head < heads):
            raise ValueError(
                f"decoder head ({layer}, {head}) does not exist; choose layers below {layers} and heads below {heads}"
            )


def parse_heads(text: str) -> Heads | int:
    """Heads as they are written on a command line: "3", the three top layers; "1:0,2:1", layer:head pairs."""
    try:
        if ":" not in text:
            return int(text)
        pairs = [pair.split(":") for pair in text.split(",")]
        return tuple((int(layer), int(head)) for layer, head in pairs)
    except ValueError:
        fix = "write layer:head pairs such as 1:0,2:1, or how many of the top layers"
        raise ValueError(f"heads {text!r} cannot be read; {fix}") from None
