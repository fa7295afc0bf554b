"""What the network returns, and the options that decide it."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypedDict

import jax


class Options(TypedDict, total=False):
    """Options of `Whisper.encode`, `decode` and `__call__`; `AudioEncoder.hidden_states` documents them."""

    output_attentions: bool
    output_hidden_states: bool
    remat: bool


class PlainOptions(TypedDict, total=False):
    """`Options` that request no activations."""

    output_attentions: Literal[False]
    output_hidden_states: Literal[False]
    remat: bool


def requests_activations(options: Options) -> bool:
    """Whether the result is more than logits or encoder output."""
    return options.get("output_attentions", False) or options.get("output_hidden_states", False)


class EncoderOutput(NamedTuple):
    """The encoder's activations, named as transformers names them. What was not requested is None.

    last_hidden_state [B,T,D]. hidden_states: L+1 of [B,T,D], what the first layer takes, then what each layer returns;
    the last one is `last_hidden_state`, after the LayerNorm. attentions: L of [B,H,T,T], float32.
    """

    last_hidden_state: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


class DecoderStates(NamedTuple):
    """What the decoder computes of a whole text, before the logits. What was not requested is None.

    last [B,S,D], for `logits`. audio_queries [B,A,S,K]: of the A requested heads, for `audio_scores`. hidden_states: as
    the encoder's. attentions: L of [B,H,S,S]; cross_attentions: L of [B,H,S,T]; both float32.
    """

    last: jax.Array
    audio_queries: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None
    cross_attentions: tuple[jax.Array, ...] | None = None


class WhisperOutput(NamedTuple):
    """Logits [B,S,V] and activations, named as transformers names them; see `DecoderStates` and `EncoderOutput`.

    What was not requested is None, and so are the encoder's layers where the encoder output was given.
    """

    logits: jax.Array
    decoder_hidden_states: tuple[jax.Array, ...] | None
    decoder_attentions: tuple[jax.Array, ...] | None
    cross_attentions: tuple[jax.Array, ...] | None
    encoder_last_hidden_state: jax.Array
    encoder_hidden_states: tuple[jax.Array, ...] | None = None
    encoder_attentions: tuple[jax.Array, ...] | None = None
