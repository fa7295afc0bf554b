"""The network: audio encoder and text decoder as Flax NNX modules. Paper: Radford et al. 2022, section 2.2.

Module names are those of Hugging Face's checkpoints, so that a path here is a path there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from whisper_nnx.cache import KeysValues, KVCache
from whisper_nnx.config import ALIASES, RELEASED, WhisperConfig
from whisper_nnx.products import (
    attention_scores,
    dot_product_attention,
    few_rows_product,
    flat_product,
    multiplies_few,
    precision_of,
    rows_at,
    within,
)

if TYPE_CHECKING:
    from whisper_nnx.tokenizer import Tokenizer

Dtype = Any
Append = Callable[[KeysValues], KeysValues]
Drop = Callable[[jax.Array], jax.Array]


class Constant(nnx.Variable):
    """A stored array that is no parameter: the encoder's sinusoids."""


def sinusoids(length: int, width: int) -> np.ndarray:
    """Positional embedding [length, width], sines then cosines, wavelengths from 2 pi to 10,000 * 2 pi (in float32)."""
    scale = np.exp(-np.log(10_000) / (width // 2 - 1) * np.arange(width // 2)).astype(np.float32)
    angle = np.arange(length, dtype=np.float32)[:, None] * scale
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


class Embedding(nnx.Embed):
    """A table of rows. They are taken before they are cast, and checked by nobody: V is large."""

    def rows(self, ids: jax.Array) -> jax.Array:
        """ids [...] -> [...,D]."""
        return rows_at(self.embedding[...], ids).astype(self.dtype)

    def table(self) -> jax.Array:
        """[V,D]."""
        return self.embedding[...].astype(self.dtype)

    def scores(self, x: jax.Array) -> jax.Array:
        """x [...,D] of a few rows -> their product with each row of the table [...,V], float32."""
        return few_rows_product(x, self.embedding[...])


class _Layers:
    """Makes the layers of one model with its dtypes; keeps their traps in one place."""

    def __init__(self, rngs: nnx.Rngs, dtype: Dtype, param_dtype: Dtype):
        precision = precision_of(dtype)
        init = nnx.initializers.normal(0.02)
        self.dtype, self.param_dtype = dtype, param_dtype
        self.common: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.product: dict[str, Any] = {"dtype": dtype, "precision": precision, "kernel_init": init, **self.common}
        self.embed: dict[str, Any] = {"dtype": dtype, "embedding_init": init, **self.common}

    def linear(self, n_in: int, n_out: int, use_bias: bool = True) -> nnx.Linear:
        return nnx.Linear(n_in, n_out, use_bias=use_bias, dot_general=flat_product, **self.product)

    def conv(self, n_in: int, n_out: int, stride: int) -> nnx.Conv:
        # padding=1, not "SAME": at stride 2 that would pad on the right alone and shift every frame by half a position.
        return nnx.Conv(n_in, n_out, (3,), strides=stride, padding=1, **self.product)

    def norm(self, width: int) -> nnx.LayerNorm:
        return nnx.LayerNorm(width, epsilon=1e-5, use_fast_variance=False, dtype=jnp.float32, **self.common)

    def embedding(self, n: int, width: int) -> Embedding:
        return Embedding(n, width, **self.embed)


def _run(remat: bool, layer: EncoderLayer, *args: Any, **options: Any) -> Any:
    """layer(*args, **options); with `remat`, the backward pass computes what is inside again rather than keep it."""
    call: Callable[..., Any] = lambda layer, *args: layer(*args, **options)  # noqa: E731
    return (nnx.remat(call) if remat else call)(layer, *args)


class MultiHeadAttention(nnx.Module):
    """Queries come from one sequence, keys and values from another or the same. No bias on the keys."""

    def __init__(self, width: int, heads: int, layers: _Layers):
        self.heads, self.dtype = heads, layers.dtype
        self.attend = dot_product_attention  # may be replaced by another way to compute it
        self.q_proj = layers.linear(width, width)
        self.k_proj = layers.linear(width, width, use_bias=False)
        self.v_proj = layers.linear(width, width)
        self.out_proj = layers.linear(width, width)

    def _split(self, x: jax.Array) -> jax.Array:
        """[B,S,D] -> [B,H,S,K]."""
        return x.reshape(*x.shape[:2], self.heads, -1).swapaxes(1, 2)

    def keys_values(self, x: jax.Array) -> KeysValues:
        """x [B,T,D] -> keys and values [B,H,T,K]."""
        return KeysValues(*(self._split(project(x)).astype(self.dtype) for project in (self.k_proj, self.v_proj)))

    def scores(self, x: jax.Array, k: jax.Array, heads: Sequence[int]) -> jax.Array:
        """How x [B,S,D] would attend to k [B,H,T,K] in some of the heads: [B,len(heads),S,T], before the softmax."""
        chosen = jnp.array(heads, jnp.int32)
        return attention_scores(self._split(self.q_proj(x))[:, chosen], k[:, chosen])

    def __call__(
        self, x: jax.Array, kv: KeysValues, mask: jax.Array | None = None, spans: jax.Array | None = None
    ) -> jax.Array:
        """x [B,S,D] attends to kv [B,H,T,K] where mask allows, within the first `spans` [B] -> [B,S,D]."""
        attend = self.attend if spans is None else within(spans, self.attend)
        attended = attend(self._split(self.q_proj(x)), kv.k, kv.v, mask)
        return self.out_proj(attended.swapaxes(1, 2).reshape(x.shape))


class EncoderLayer(nnx.Module):
    """Self-attention and a two-layer perceptron, each behind a LayerNorm and beside a residual."""

    def __init__(self, width: int, heads: int, ffn: int, dropout: float, layers: _Layers):
        self.self_attn = MultiHeadAttention(width, heads, layers)
        self.self_attn_layer_norm = layers.norm(width)
        self.fc1 = layers.linear(width, ffn)
        self.fc2 = layers.linear(ffn, width)
        self.final_layer_norm = layers.norm(width)
        self.dropout = nnx.Dropout(dropout)

    def feed_forward(self, x: jax.Array, drop: Drop = lambda x: x) -> jax.Array:
        """x [B,T,D] -> [B,T,D], position by position."""
        h = self.final_layer_norm(x).astype(x.dtype)
        return x + drop(self.fc2(jax.nn.gelu(self.fc1(h), approximate=False)))

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None, deterministic: bool = True) -> jax.Array:
        """x [B,T,D] -> [B,T,D]."""
        drop = partial(self.dropout, deterministic=deterministic, rngs=rngs)
        h = self.self_attn_layer_norm(x).astype(x.dtype)
        x = x + drop(self.self_attn(h, self.self_attn.keys_values(h)))
        return self.feed_forward(x, drop)


class DecoderLayer(EncoderLayer):
    """An encoder layer whose self-attention is masked, with attention to the audio between its two halves."""

    def __init__(self, width: int, heads: int, ffn: int, dropout: float, layers: _Layers):
        super().__init__(width, heads, ffn, dropout, layers)
        self.encoder_attn = MultiHeadAttention(width, heads, layers)
        self.encoder_attn_layer_norm = layers.norm(width)

    def attend_to_text(
        self,
        x: jax.Array,
        mask: jax.Array,
        append: Append = lambda new: new,
        spans: jax.Array | None = None,
        drop: Drop = lambda x: x,
    ) -> tuple[jax.Array, KeysValues]:
        """x [B,S,D], mask [B,1,S,S'] -> ([B,S,D], the S' keys and values attended to).

        `append` puts the keys and values of x behind those of the past, if there is one; `spans` [B] of them are used.
        """
        h = self.self_attn_layer_norm(x).astype(x.dtype)
        kv = append(self.self_attn.keys_values(h))
        return x + drop(self.self_attn(h, kv, mask, spans)), kv

    def attend_to_audio(self, x: jax.Array, cross: KeysValues, drop: Drop = lambda x: x) -> jax.Array:
        """x [B,S,D], cross [B/G,H,T,K] -> [B,S,D]."""
        h = self.encoder_attn_layer_norm(x).astype(x.dtype)
        # The G rows of a window are G more queries to the same keys: read once, not G times.
        h = self.encoder_attn(h.reshape(cross.k.shape[0], -1, h.shape[-1]), cross).reshape(x.shape)
        return x + drop(h)

    def __call__(  # type: ignore[override]
        self,
        x: jax.Array,
        rngs: nnx.Rngs | None,
        cross: KeysValues,
        mask: jax.Array,
        heads: Sequence[int],
        deterministic: bool = True,
    ) -> tuple[jax.Array, jax.Array]:
        """All parts, without a past: x [B,S,D] -> ([B,S,D], some heads' scores of the audio [B,len(heads),S,T])."""
        drop = partial(self.dropout, deterministic=deterministic, rngs=rngs)
        x, _ = self.attend_to_text(x, mask, drop=drop)
        h = self.encoder_attn_layer_norm(x).astype(x.dtype)
        scores = self.encoder_attn.scores(h, cross.k, heads)
        return self.feed_forward(self.attend_to_audio(x, cross, drop), drop), scores


class AudioEncoder(nnx.Module):
    """Two convolutions, of which the second halves the time, and a stack of self-attention layers."""

    def __init__(self, config: WhisperConfig, layers: _Layers):
        width = config.d_model
        self.max_positions = config.max_source_positions
        self.conv1 = layers.conv(config.num_mel_bins, width, stride=1)
        self.conv2 = layers.conv(width, width, stride=2)
        self.embed_positions = Constant(jnp.asarray(sinusoids(self.max_positions, width), layers.param_dtype))
        shape = (width, config.encoder_attention_heads, config.encoder_ffn_dim, config.dropout)
        self.layers = nnx.List(EncoderLayer(*shape, layers) for _ in range(config.encoder_layers))
        self.layer_norm = layers.norm(width)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self,
        input_features: jax.Array,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
        first_position: jax.Array | None = None,
        remat: bool = False,
    ) -> jax.Array:
        """input_features [B,M,T] (log-mel, T frames of 10 ms) -> [B,ceil(T/2),D] (positions of 20 ms).

        first_position [B]: where in its window each row begins, if it is a part of one; default: at the start.
        remat: a layer's activations are computed again in the backward pass instead of kept.
        Raises ValueError for another number of mels or more frames than the model has positions for.
        """
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
        x = x + jax.lax.stop_gradient(self.embed_positions[...])[places].astype(x.dtype)
        x = self.dropout(x, deterministic=deterministic, rngs=rngs)
        for layer in self.layers:
            x = _run(remat, layer, x, rngs, deterministic=deterministic)
        return self.layer_norm(x).astype(self.conv1.dtype)


class TextDecoder(nnx.Module):
    """Token and position embeddings, masked self-attention, attention to the audio, logits over the vocabulary."""

    def __init__(self, config: WhisperConfig, layers: _Layers):
        width = config.d_model
        self.dtype = layers.dtype
        self.embed_tokens = layers.embedding(config.vocab_size, width)
        self.embed_positions = layers.embedding(config.max_target_positions, width)
        shape = (width, config.decoder_attention_heads, config.decoder_ffn_dim, config.dropout)
        self.layers = nnx.List(DecoderLayer(*shape, layers) for _ in range(config.decoder_layers))
        self.layer_norm = layers.norm(width)
        self.proj_out = None if config.tie_word_embeddings else layers.linear(width, config.vocab_size, use_bias=False)
        self.dropout = nnx.Dropout(config.dropout)

    def cross_attention(self, encoder_output: jax.Array) -> tuple[KeysValues, ...]:
        """encoder_output [B,T,D] -> each layer's keys and values [B,H,T,K], which serve a whole window."""
        return tuple(layer.encoder_attn.keys_values(encoder_output) for layer in self.layers)

    def _embed(self, ids: jax.Array, positions: jax.Array) -> jax.Array:
        """ids [B,S] and their positions [B,S] or [S] -> [B,S,D]."""
        return self.embed_tokens.rows(ids) + self.embed_positions.rows(positions)

    def logits_table(self) -> jax.Array:
        """[D,V], what `logits` multiplies by."""
        table = self.embed_tokens.table().T if self.proj_out is None else self.proj_out.kernel[...]
        return table.astype(self.dtype)

    def logits(self, hidden: jax.Array, table: jax.Array | None = None) -> jax.Array:
        """hidden [...,D] -> [...,V], float32. A loop may give the table, if it has made it once for all its steps."""
        if table is None and self.proj_out is None and multiplies_few(hidden, self.embed_tokens.embedding[...]):
            return self.embed_tokens.scores(hidden)
        table, precision = self.logits_table() if table is None else table, precision_of(hidden.dtype)
        return flat_product(hidden, table, precision=precision, preferred_element_type=jnp.float32)

    def __call__(
        self, ids: jax.Array, encoder_output: jax.Array, deterministic: bool = True, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        """Teacher forcing: ids [B,S], encoder_output [B,T,D] -> logits [B,S,V] of each next token.

        Raises ValueError for more ids than the model has positions for.
        """
        n = ids.shape[1]
        if n > self.embed_positions.num_embeddings:
            raise ValueError(
                f"{n} decoder_input_ids, but the model has {self.embed_positions.num_embeddings} positions; cut them"
            )
        cross = self.cross_attention(encoder_output.astype(self.dtype))
        return self.logits(self.alignment_scores(ids, cross, (), deterministic, rngs)[0])

    def alignment_scores(
        self,
        ids: jax.Array,
        cross: tuple[KeysValues, ...],
        heads: Sequence[tuple[int, int]],
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
        remat: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        """Teacher forcing: ids [B,S] -> (hidden [B,S,D] for `logits`, audio scores [B,A,S,T] of A (layer, head)s)."""
        n, scores = ids.shape[1], []
        x = self.dropout(self._embed(ids, jnp.arange(n)), deterministic=deterministic, rngs=rngs)
        mask = jnp.tril(jnp.ones((n, n), bool))
        for i, (layer, kv) in enumerate(zip(self.layers, cross, strict=True)):
            wanted = [head for at, head in heads if at == i]
            x, of_layer = _run(remat, layer, x, rngs, kv, mask=mask, heads=wanted, deterministic=deterministic)
            scores.append(of_layer)
        return self.layer_norm(x).astype(self.dtype), jnp.concatenate(scores, axis=1)

    def step(self, ids: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """ids [B,n] follow what the cache remembers -> (hidden [B,n,D] for `logits`, the cache n positions longer)."""
        new_positions = cache.length[:, None] + jnp.arange(ids.shape[1])
        mask = jnp.arange(cache.self_attention[0].k.shape[2]) <= new_positions[:, None, :, None]
        # A finished row may stand past the last position: whatever it then computes is not looked at.
        x = self._embed(ids, jnp.minimum(new_positions, self.embed_positions.num_embeddings - 1))
        written = []
        for i, (layer, cross) in enumerate(zip(self.layers, cache.cross_attention, strict=True)):
            x, kv = layer.attend_to_text(x, mask, partial(cache.append, i), new_positions[:, -1] + 1)
            x = layer.feed_forward(layer.attend_to_audio(x, cross))
            written.append(kv)
        return self.layer_norm(x).astype(self.dtype), cache.advance(written, ids.shape[1])


class Whisper(nnx.Module):
    """Speech in, text logits out. `load_model` gives a trained one, `create_whisper` a random one.

    `dtype` is that of the computation, `param_dtype` that of the parameters; LayerNorm, softmax and logits are float32.
    `tokenizer` is the checkpoint's own, None for a model without one.
    """

    def __init__(
        self,
        config: WhisperConfig,
        *,
        rngs: nnx.Rngs | None = None,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        tokenizer: Tokenizer | None = None,
    ):
        layers = _Layers(rngs or nnx.Rngs(0), dtype, param_dtype)
        self.config, self.tokenizer = config, tokenizer
        self.encoder = AudioEncoder(config, layers)
        self.decoder = TextDecoder(config, layers)

    def encode(
        self, input_features: jax.Array, deterministic: bool = True, rngs: nnx.Rngs | None = None, **options: Any
    ) -> jax.Array:
        """Log-mel input_features [B,M,T] -> encoder_output [B,ceil(T/2),D]; options: `AudioEncoder` has two more."""
        return self.encoder(input_features, deterministic, rngs, **options)

    def decode(
        self,
        decoder_input_ids: jax.Array,
        encoder_output: jax.Array,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """decoder_input_ids [B,S], encoder_output [B,T,D] -> logits [B,S,V], float32."""
        return self.decoder(decoder_input_ids, encoder_output, deterministic, rngs)

    def __call__(
        self,
        input_features: jax.Array,
        decoder_input_ids: jax.Array,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """input_features [B,M,T], decoder_input_ids [B,S] -> logits [B,S,V], float32.

        `deterministic=False` applies `config.dropout` and then needs `rngs` (nnx.Rngs(dropout=...), made inside of a
        function that is jitted or differentiated, since flax does not let its counter cross that border).
        """
        encoder_output = self.encode(input_features, deterministic, rngs)
        return self.decode(decoder_input_ids, encoder_output, deterministic, rngs)


def create_whisper(
    size: str | WhisperConfig,
    *,
    rngs: nnx.Rngs | None = None,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
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
    if "d_model" in changes:  # the perceptrons are four times as wide again
        changes = {"encoder_ffn_dim": 0, "decoder_ffn_dim": 0, **changes}
    return Whisper(replace(size, **changes), rngs=rngs, dtype=dtype, param_dtype=param_dtype)


create_whisper_tiny = partial(create_whisper, "tiny")
create_whisper_base = partial(create_whisper, "base")
create_whisper_small = partial(create_whisper, "small")
create_whisper_medium = partial(create_whisper, "medium")
create_whisper_large = partial(create_whisper, "large-v3")
create_whisper_turbo = partial(create_whisper, "large-v3-turbo")
