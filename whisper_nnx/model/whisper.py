"""The network: audio encoder and text decoder as Flax NNX modules. Paper: Radford et al. 2022, section 2.2.

Module names are those of Hugging Face's checkpoints, so that a path here is a path there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from whisper_nnx import ops
from whisper_nnx.model.cache import KeysValues, KVCache, checked_kv_dtype, from_cache
from whisper_nnx.model.config import WhisperConfig
from whisper_nnx.model.layers import AttentionFn, DecoderLayer, Dtype, EncoderLayer, LayerFactory, run_layer
from whisper_nnx.model.outputs import (
    DecoderStates,
    EncoderOutput,
    Options,
    PlainOptions,
    WhisperOutput,
    requests_activations,
)
from whisper_nnx.model.summary import Module, summarize
from whisper_nnx.runtime.forking import refuse_after_fork

if TYPE_CHECKING:
    from whisper_nnx.text.tokenizer import Tokenizer


class Constant(nnx.Variable):
    """Non-trainable buffer: the encoder's sinusoids."""


def sinusoids(length: int, width: int) -> np.ndarray:
    """Positional embedding [length, width], sines then cosines, wavelengths from 2 pi to 10,000 * 2 pi (in float32)."""
    scale = np.exp(-np.log(10_000) / (width // 2 - 1) * np.arange(width // 2)).astype(np.float32)
    angle = np.arange(length, dtype=np.float32)[:, None] * scale
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


class AudioEncoder(Module):
    """Two convolutions, of which the second halves the time, and a stack of self-attention layers."""

    def __init__(self, config: WhisperConfig, make: LayerFactory):
        width = config.d_model
        self.max_positions = config.max_source_positions
        self.conv1 = make.conv(config.num_mel_bins, width, stride=1)
        self.conv2 = make.conv(width, width, stride=2)
        self.embed_positions = Constant(jnp.asarray(sinusoids(self.max_positions, width), make.param_dtype))
        shape = (width, config.encoder_attention_heads, config.encoder_ffn_dim, config.dropout)
        self.layers = nnx.List(EncoderLayer(*shape, make) for _ in range(config.encoder_layers))
        self.layer_norm = make.norm(width)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(self, input_features: jax.Array, **options: Any) -> jax.Array:
        """The last hidden state alone: input_features [B,M,T] -> [B,ceil(T/2),D]."""
        return self.hidden_states(input_features, **options).last_hidden_state

    def hidden_states(
        self,
        input_features: jax.Array,
        *,
        first_position: jax.Array | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
        remat: bool = False,
    ) -> EncoderOutput:
        """input_features [B,M,T] (log-mel, T frames of 10 ms) -> hidden states [B,ceil(T/2),D] (positions of 20 ms).

        Args:
          input_features: log-mel.
          first_position: [B], offset of each row within its window, in positions; default: 0.
          output_attentions: return the attention weights of each layer.
          output_hidden_states: return what each layer returns.
          deterministic: disables dropout.
          rngs: random keys for dropout.
          remat: a layer's activations are computed again in the backward pass instead of kept.

        Raises:
          ValueError: another number of mels, or more frames than the model has positions for.
        """
        x = self._embed(input_features, first_position)
        x = self.dropout(x, deterministic=deterministic, rngs=rngs)
        states, attentions = [x], []
        for layer in self.layers:
            x, weights = run_layer(
                remat, layer, x, output_attentions=output_attentions, deterministic=deterministic, rngs=rngs
            )
            states.append(x)
            attentions.append(weights)
        states[-1] = x = self.layer_norm(x).astype(self.conv1.dtype)
        return EncoderOutput(
            x, tuple(states) if output_hidden_states else None, tuple(attentions) if output_attentions else None
        )

    def _embed(self, input_features: jax.Array, first_position: jax.Array | None) -> jax.Array:
        """[B,M,T] -> [B,ceil(T/2),D]: the convolutions, and the positions added."""
        mels = self.conv1.in_features
        if input_features.ndim != 3 or input_features.shape[1] != mels:
            raise ValueError(f"input_features has shape {input_features.shape}, expected [B,{mels},T]")
        x = jnp.swapaxes(input_features, 1, 2).astype(self.conv1.dtype)
        x = jax.nn.gelu(self.conv1(x), approximate=False)
        x = jax.nn.gelu(self.conv2(x), approximate=False)
        if (n := x.shape[1]) > self.max_positions:
            raise ValueError(
                f"input_features has {input_features.shape[2]} frames, but the model takes at most "
                f"{2 * self.max_positions}; cut the audio into windows, as transcribe() does"
            )
        places = slice(n) if first_position is None else first_position[:, None] + jnp.arange(n)
        return x + jax.lax.stop_gradient(self.embed_positions[...])[places].astype(x.dtype)


class TextDecoder(Module):
    """Token and position embeddings, masked self-attention, attention to the audio, logits over the vocabulary."""

    def __init__(self, config: WhisperConfig, make: LayerFactory, kv_cache_dtype: Dtype = None):
        width = config.d_model
        self.dtype, self.kv_cache_dtype = make.dtype, checked_kv_dtype(kv_cache_dtype)
        self.embed_tokens = make.embedding(config.vocab_size, width)
        self.embed_positions = make.embedding(config.max_target_positions, width)
        shape = (width, config.decoder_attention_heads, config.decoder_ffn_dim, config.dropout)
        self.layers = nnx.List(DecoderLayer(*shape, make) for _ in range(config.decoder_layers))
        self.layer_norm = make.norm(width)
        self.proj_out = None if config.tie_word_embeddings else make.linear(width, config.vocab_size, use_bias=False)
        self.dropout = nnx.Dropout(config.dropout)

    def cross_attention(self, encoder_output: jax.Array) -> tuple[KeysValues, ...]:
        """encoder_output [B,T,D] -> each layer's keys and values [B,H,T,K], which serve a whole window."""
        return tuple(layer.encoder_attn.keys_values(encoder_output) for layer in self.layers)

    def _embed(self, ids: jax.Array, positions: jax.Array) -> jax.Array:
        """ids [B,S] and their positions [B,S] or [S] -> [B,S,D]."""
        return self.embed_tokens(ids) + self.embed_positions(positions)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [...,D] -> [...,V], float32."""
        if self.proj_out is None:
            return self.embed_tokens.attend(hidden)
        return ops.unembed(hidden, self.proj_out.kernel[...].T)

    def unembedding(self, rows: int) -> Callable[[jax.Array], jax.Array]:
        """`logits` for a loop over hidden [rows,D]: converts the table once, before the loop."""
        if self.proj_out is None:
            return self.embed_tokens.unembedding(rows)
        return ops.unembedding(self.proj_out.kernel[...].T, None, self.dtype, rows)

    def __call__(self, ids: jax.Array, encoder_output: jax.Array, **options: Any) -> jax.Array:
        """Teacher forcing: ids [B,S], encoder_output [B,T,D] -> logits [B,S,V] of each next token.

        options: as `hidden_states`. Raises ValueError for more ids than the model has positions for.
        """
        cross = self.cross_attention(encoder_output.astype(self.dtype))
        return self.logits(self.hidden_states(ids, cross, **options).last)

    def hidden_states(
        self,
        ids: jax.Array,
        cross: tuple[KeysValues, ...],
        heads: Sequence[tuple[int, int]] = (),
        *,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
        remat: bool = False,
    ) -> DecoderStates:
        """Teacher forcing: ids [B,S] -> hidden states [B,S,D], and how they attend.

        Args:
          ids: the whole text.
          cross: each layer's keys and values of the audio, from `cross_attention`, or as a cache stores them.
          heads: (layer, head)s whose queries to the audio are returned, for `audio_scores`.
          output_attentions: return the attention weights of each layer.
          output_hidden_states: return what each layer returns.
          deterministic: disables dropout.
          rngs: random keys for dropout.
          remat: a layer's activations are computed again in the backward pass instead of kept.

        Raises:
          ValueError: more ids than the model has positions for.
        """
        n, most = ids.shape[1], self.embed_positions.num_embeddings
        if n > most:
            raise ValueError(f"{n} decoder_input_ids, but the model has {most} positions; cut them")
        x = self.dropout(self._embed(ids, jnp.arange(n)), deterministic=deterministic, rngs=rngs)
        mask = jnp.tril(jnp.ones((n, n), bool))
        states, attended = [x], []
        for i, (layer, stored) in enumerate(zip(self.layers, cross, strict=True)):
            kv = from_cache(stored, layer.encoder_attn.heads)
            wanted = [head for at, head in heads if at == i]
            options = {"heads": wanted, "output_attentions": output_attentions, "deterministic": deterministic}
            x, attention = run_layer(remat, layer, x, kv, mask, rngs=rngs, **options)
            states.append(x)
            attended.append(attention)
        states[-1] = x = self.layer_norm(x).astype(self.dtype)
        return DecoderStates(
            x,
            jnp.concatenate([layer.audio_queries for layer in attended], axis=1),
            tuple(states) if output_hidden_states else None,
            tuple(layer.text for layer in attended) if output_attentions else None,
            tuple(layer.audio for layer in attended) if output_attentions else None,
        )

    def step(self, ids: jax.Array, cache: KVCache, kept: jax.Array | None = None) -> tuple[jax.Array, KVCache]:
        """One cached decoding step: ids [R,n] follow those in the cache.

        kept [R]: how many of the n ids, the last ones, belong to each row's text; the others are padding. Default: all.

        Returns (hidden [R,n,D] for `logits`, the cache n positions longer).
        """
        n = ids.shape[1]
        longer, written = cache.appended(n, kept), []
        # A finished row may be past the last position; its output is ignored, as that of padding is.
        positions = longer.length[:, None] - n + jnp.arange(n)
        x = self._embed(ids, jnp.clip(positions, 0, self.embed_positions.num_embeddings - 1))
        for i, (layer, cross) in enumerate(zip(self.layers, cache.cross_attention, strict=True)):
            x, kv = layer.step(x, cross, partial(cache.append, i), longer.source, longer.end)
            written.append(kv)
        return self.layer_norm(x).astype(self.dtype), replace(longer, self_attention=tuple(written))


class Whisper(Module):
    """Speech in, text logits out. `load_model` gives a trained one, `create_whisper` a random one.

    `dtype` is that of the computation, `param_dtype` that of the parameters; LayerNorm, softmax and logits are float32.
    `tokenizer` is the checkpoint's own, None for a model without one. `attention_fn` computes all attention in place of
    `ops.attention`; see `MultiHeadAttention`. `kv_cache_dtype` "int8": the token loop reads the audio's keys and values
    in 8 bits.
    """

    def __init__(
        self,
        config: WhisperConfig,
        *,
        rngs: nnx.Rngs | None = None,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        tokenizer: Tokenizer | None = None,
        attention_fn: AttentionFn | None = None,
        kv_cache_dtype: Dtype = None,
    ):
        refuse_after_fork()
        make = LayerFactory(rngs or nnx.Rngs(0), dtype, param_dtype, attention_fn)
        self.config, self.tokenizer = config, tokenizer
        self.encoder = AudioEncoder(config, make)
        self.decoder = TextDecoder(config, make, kv_cache_dtype)

    def __repr__(self) -> str:
        dtype = jnp.dtype(self.decoder.dtype).name
        cache = ["audio keys and values in int8"] if self.decoder.kv_cache_dtype else []
        return summarize(self, f"computes in {dtype}", *cache, str(self.tokenizer or "no tokenizer"))

    @overload
    def encode(
        self,
        input_features: jax.Array,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
        *,
        first_position: jax.Array | None = None,
        **options: Unpack[PlainOptions],
    ) -> jax.Array: ...
    @overload
    def encode(
        self,
        input_features: jax.Array,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
        *,
        first_position: jax.Array | None = None,
        **options: Unpack[Options],
    ) -> EncoderOutput: ...
    def encode(
        self,
        input_features: jax.Array,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
        *,
        first_position: jax.Array | None = None,
        **options: Unpack[Options],
    ) -> jax.Array | EncoderOutput:
        """Log-mel input_features [B,M,T] -> encoder_output [B,ceil(T/2),D].

        With output_attentions or output_hidden_states: an `EncoderOutput`. See `AudioEncoder.hidden_states`.
        """
        refuse_after_fork()
        output = self.encoder.hidden_states(
            input_features, first_position=first_position, deterministic=deterministic, rngs=rngs, **options
        )
        return output if requests_activations(options) else output.last_hidden_state

    @overload
    def decode(
        self,
        decoder_input_ids: jax.Array,
        encoder_output: jax.Array,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
        **options: Unpack[PlainOptions],
    ) -> jax.Array: ...
    @overload
    def decode(
        self,
        decoder_input_ids: jax.Array,
        encoder_output: jax.Array,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
        **options: Unpack[Options],
    ) -> WhisperOutput: ...
    def decode(
        self,
        decoder_input_ids: jax.Array,
        encoder_output: jax.Array,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
        **options: Unpack[Options],
    ) -> jax.Array | WhisperOutput:
        """decoder_input_ids [B,S], encoder_output [B,T,D] -> logits [B,S,V], float32.

        With output_attentions or output_hidden_states: a `WhisperOutput`. See `TextDecoder.hidden_states`.
        """
        refuse_after_fork()
        cross = self.decoder.cross_attention(encoder_output.astype(self.decoder.dtype))
        states = self.decoder.hidden_states(decoder_input_ids, cross, deterministic=deterministic, rngs=rngs, **options)
        logits = self.decoder.logits(states.last)
        if not requests_activations(options):
            return logits
        return WhisperOutput(logits, states.hidden_states, states.attentions, states.cross_attentions, encoder_output)

    @overload
    def __call__(
        self,
        input_features: jax.Array,
        decoder_input_ids: jax.Array,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
        **options: Unpack[PlainOptions],
    ) -> jax.Array: ...
    @overload
    def __call__(
        self,
        input_features: jax.Array,
        decoder_input_ids: jax.Array,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
        **options: Unpack[Options],
    ) -> WhisperOutput: ...
    def __call__(
        self,
        input_features: jax.Array,
        decoder_input_ids: jax.Array,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
        **options: Unpack[Options],
    ) -> jax.Array | WhisperOutput:
        """input_features [B,M,T], decoder_input_ids [B,S] -> logits [B,S,V], float32.

        Args:
          input_features: log-mel.
          decoder_input_ids: the text, from the start sequence on.
          deterministic: False applies `config.dropout` and needs `rngs`.
          rngs: nnx.Rngs(dropout=...), created inside the jitted or differentiated function, since Flax cannot mutate
            its counter across trace levels.
          options: output_attentions=True or output_hidden_states=True: return a `WhisperOutput` with each layer's
            attention weights or output. remat=True: compute a layer's activations again in the backward pass instead
            of keeping them.
        """
        encoded = self.encode(input_features, deterministic, rngs, **options)
        if not isinstance(encoded, EncoderOutput):
            return self.decode(decoder_input_ids, encoded, deterministic, rngs, **options)
        output = self.decode(decoder_input_ids, encoded.last_hidden_state, deterministic, rngs, **options)
        return output._replace(encoder_hidden_states=encoded.hidden_states, encoder_attentions=encoded.attentions)


def warn_of_precision(model: Whisper, fp16: bool | None) -> None:
    """Warns if openai-whisper's `fp16` differs from the precision that the model was loaded in."""
    dtype = jnp.dtype(model.decoder.dtype).name
    if fp16 is not None and fp16 != (dtype != "float32"):
        wanted = "float16" if fp16 else "float32"
        warnings.warn(
            f"fp16={fp16} has no effect: the model computes in {dtype}, since it was loaded so; "
            f"load_model(..., dtype=jnp.{wanted}) changes that",
            stacklevel=3,
        )
