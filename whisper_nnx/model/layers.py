"""What encoder and decoder are made of, as Flax NNX modules. Paper: Radford et al. 2022, section 2.2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from whisper_nnx.model.cache import KeysValues
from whisper_nnx.model.summary import Module
from whisper_nnx.ops.products import (
    attention_scores,
    dot_product_attention,
    few_rows_product,
    flat_product,
    precision_of,
    rows_at,
    within,
)

Dtype = Any
Append = Callable[[KeysValues], KeysValues]
Drop = Callable[[jax.Array], jax.Array]


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


class Layers:
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


def run_layer(remat: bool, layer: EncoderLayer, x: jax.Array, rngs: nnx.Rngs | None, *args: Any, **options: Any) -> Any:
    """layer(x, rngs, *args, **options); `remat`: the backward pass recomputes its activations instead of keeping them.

    `jax.checkpoint`, not `nnx.remat`: the latter writes to the layer. Where the layer is not an argument of the
    transformation around it, as in the gradient with respect to the input, that fails and leaves it incomplete.
    """
    if not remat:
        return layer(x, rngs, *args, **options)
    if rngs is None:
        return jax.checkpoint(lambda x, *args: layer(x, None, *args, **options))(x, *args)

    def call(counts: nnx.State, x: jax.Array, *args: Any) -> tuple[Any, nnx.State]:
        inner = nnx.merge(streams, counts)
        return layer(x, inner, *args, **options), nnx.state(inner)

    streams, counts = nnx.split(rngs)  # the counters of random numbers leave the checkpoint as values
    out, counts = jax.checkpoint(call)(counts, x, *args)
    nnx.update(rngs, counts)
    return out


class MultiHeadAttention(Module):
    """Queries come from one sequence, keys and values from another or the same. No bias on the keys."""

    def __init__(self, width: int, heads: int, layers: Layers):
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


class EncoderLayer(Module):
    """Self-attention and a two-layer perceptron, each behind a LayerNorm and beside a residual."""

    def __init__(self, width: int, heads: int, ffn: int, dropout: float, layers: Layers):
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

    def __init__(self, width: int, heads: int, ffn: int, dropout: float, layers: Layers):
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
