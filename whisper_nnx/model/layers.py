"""Building blocks of the encoder and decoder, as Flax NNX modules. Paper: Radford et al. 2022, section 2.2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from whisper_nnx import ops
from whisper_nnx.model.cache import KeysValues, from_cache
from whisper_nnx.model.summary import Module

Dtype = Any
Rows = Callable[[jax.Array], jax.Array]
AttentionFn = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]


class Linear(nnx.Linear):
    """`nnx.Linear` that multiplies through `whisper_nnx.ops`."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """inputs [...,n_in] -> [...,n_out]."""
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = self.promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)
        return ops.linear(x, kernel, bias)


class Embedding(nnx.Embed):
    """A table [V,D]. Looks up rows before casting them, since V is large; ids are not validated."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Ids [...] -> [...,D]."""
        return ops.embed(inputs, self.embedding[...], self._scale()).astype(self.dtype)

    def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
        """query [...,D] -> its product with each row of the table [...,V], float32."""
        return ops.unembed(query, self.embedding[...], self._scale())

    def unembedding(self, rows: int) -> Callable[[jax.Array], jax.Array]:
        """`attend` for all steps of a loop over queries [rows,D]."""
        return ops.unembedding(self.embedding[...], self._scale(), self.dtype, rows)

    def _scale(self) -> jax.Array | None:
        """The scale [V] of an int8 table."""
        return None


class LayerFactory:
    """Builds the layers of one model with shared dtypes, precision, initializers and attention function."""

    def __init__(self, rngs: nnx.Rngs, dtype: Dtype, param_dtype: Dtype, attention_fn: AttentionFn | None = None):
        precision = ops.precision_of(dtype)
        init = nnx.initializers.normal(0.02)
        self.dtype, self.param_dtype, self.attention_fn = dtype, param_dtype, attention_fn
        self.common: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.product: dict[str, Any] = {"dtype": dtype, "precision": precision, "kernel_init": init, **self.common}
        self.embed: dict[str, Any] = {"dtype": dtype, "embedding_init": init, **self.common}

    def linear(self, n_in: int, n_out: int, use_bias: bool = True) -> Linear:
        return Linear(n_in, n_out, use_bias=use_bias, **self.product)

    def conv(self, n_in: int, n_out: int, stride: int) -> nnx.Conv:
        # padding=1, not "SAME": at stride 2 that would pad on the right alone and shift every frame by half a position.
        return nnx.Conv(n_in, n_out, (3,), strides=stride, padding=1, **self.product)

    def norm(self, width: int) -> nnx.LayerNorm:
        return nnx.LayerNorm(width, epsilon=1e-5, use_fast_variance=False, dtype=jnp.float32, **self.common)

    def embedding(self, n: int, width: int) -> Embedding:
        return Embedding(n, width, **self.embed)

    def attention(self, width: int, heads: int) -> MultiHeadAttention:
        return MultiHeadAttention(width, heads, self, self.attention_fn)


class MultiHeadAttention(Module):
    """Multi-head self- or cross-attention. The key projection has no bias.

    `attention_fn(q [B,H,S,K], k, v [B,H,T,K], mask)` -> [B,H,S,K] computes it; None: `ops.attention`, and to the text
    in the token loop `ops.cached_attention`.
    """

    def __init__(self, width: int, heads: int, make: LayerFactory, attention_fn: AttentionFn | None = None):
        self.heads, self.dtype, self.attention_fn = heads, make.dtype, attention_fn
        self.q_proj = make.linear(width, width)
        self.k_proj = make.linear(width, width, use_bias=False)
        self.v_proj = make.linear(width, width)
        self.out_proj = make.linear(width, width)

    def _split(self, x: jax.Array) -> jax.Array:
        """[B,S,D] -> [B,H,S,K]."""
        return x.reshape(*x.shape[:2], self.heads, -1).swapaxes(1, 2)

    def keys_values(self, x: jax.Array) -> KeysValues:
        """x [B,T,D] -> keys and values [B,H,T,K]."""
        return KeysValues(*(self._split(project(x)).astype(self.dtype) for project in (self.k_proj, self.v_proj)))

    def queries(self, x: jax.Array, heads: Sequence[int]) -> jax.Array:
        """x [B,S,D] -> queries of some heads [B,len(heads),S,K]."""
        return self._split(self.q_proj(x))[:, jnp.array(heads, jnp.int32)]

    def weights(self, x: jax.Array, k: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Attention weights of x [B,S,D] to k [B,H,T,K] where mask allows, after the softmax: [B,H,S,T], float32."""
        scores = ops.attention_scores(self._split(self.q_proj(x)), k)
        return jax.nn.softmax(scores if mask is None else jnp.where(mask, scores, -jnp.inf), axis=-1)

    def __call__(self, x: jax.Array, kv: KeysValues, mask: jax.Array | None = None) -> jax.Array:
        """x [B,S,D] attends to kv [B,H,T,K] where mask allows -> [B,S,D]."""
        q = self._split(self.q_proj(x))
        return self._join((self.attention_fn or ops.attention)(q, kv.k, kv.v, mask))

    def cached(
        self, x: jax.Array, kv: KeysValues, source: jax.Array | None = None, end: jax.Array | int = 0
    ) -> jax.Array:
        """x [R,n,D], rows that share windows, attends to a cache as in `ops.cached_attention` -> [R,n,D]."""
        windows = kv.k.shape[0]  # whose rows are more queries to it
        q = self._split(self.q_proj(x.reshape(windows, -1, x.shape[-1])))
        if self.attention_fn is None:
            return self._join(ops.cached_attention(q, kv.k, kv.v, source, end)).reshape(x.shape)
        mask = None
        if source is not None:
            mask = ops.cache_mask(source, end, x.shape[1], len(x) // windows, source.shape[1])
        kv = from_cache(kv, self.heads)
        return self._join(self.attention_fn(q, kv.k, kv.v, mask)).reshape(x.shape)

    def _join(self, attended: jax.Array) -> jax.Array:
        """[B,H,S,K] -> [B,S,D]: heads side by side, and projected."""
        return self.out_proj(attended.swapaxes(1, 2).reshape(len(attended), attended.shape[2], -1))


class Layer(Module):
    """Base class of encoder and decoder layers: self-attention and an MLP, each after its LayerNorm (pre-norm)."""

    def __init__(self, width: int, heads: int, ffn: int, dropout: float, make: LayerFactory):
        self.self_attn = make.attention(width, heads)
        self.self_attn_layer_norm = make.norm(width)
        self.fc1 = make.linear(width, ffn)
        self.fc2 = make.linear(ffn, width)
        self.final_layer_norm = make.norm(width)
        self.dropout = nnx.Dropout(dropout)

    def mlp(self, x: jax.Array) -> jax.Array:
        """x [B,S,D] -> [B,S,D]. fc1 and fc2 belong to the layer, to match Hugging Face's parameter names."""
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class EncoderLayer(Layer):
    """Self-attention and an MLP, each added to its input."""

    def __call__(
        self, x: jax.Array, *, output_attentions: bool = False, deterministic: bool = True, rngs: nnx.Rngs | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """x [B,T,D] -> ([B,T,D], attention weights [B,H,T,T] on request)."""
        drop = partial(self.dropout, deterministic=deterministic, rngs=rngs)
        h = self.self_attn_layer_norm(x).astype(x.dtype)
        kv = self.self_attn.keys_values(h)
        weights = self.self_attn.weights(h, kv.k) if output_attentions else None
        x = x + drop(self.self_attn(h, kv))
        h = self.final_layer_norm(x).astype(x.dtype)
        return x + drop(self.mlp(h)), weights


class LayerAttention(NamedTuple):
    """How one decoder layer attends: queries to the audio of the chosen heads [B,A,S,K]; and on request the weights of
    all heads, to the text [B,H,S,S] and to the audio [B,H,S,T]."""

    audio_queries: jax.Array
    text: jax.Array | None = None
    audio: jax.Array | None = None


class DecoderLayer(Layer):
    """Masked self-attention, attention to the audio, and an MLP, each added to its input."""

    def __init__(self, width: int, heads: int, ffn: int, dropout: float, make: LayerFactory):
        super().__init__(width, heads, ffn, dropout, make)
        self.encoder_attn = make.attention(width, heads)
        self.encoder_attn_layer_norm = make.norm(width)

    def __call__(
        self,
        x: jax.Array,
        cross: KeysValues,
        mask: jax.Array,
        *,
        heads: Sequence[int] = (),
        output_attentions: bool = False,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[jax.Array, LayerAttention]:
        """A whole text at once: x [B,S,D], cross [B,H,T,K], mask [S,S] -> ([B,S,D], how it attends).

        heads: those whose queries to the audio are returned.
        """
        drop = partial(self.dropout, deterministic=deterministic, rngs=rngs)
        h = self.self_attn_layer_norm(x).astype(x.dtype)
        kv = self.self_attn.keys_values(h)
        text = self.self_attn.weights(h, kv.k, mask) if output_attentions else None
        x = x + drop(self.self_attn(h, kv, mask))

        h = self.encoder_attn_layer_norm(x).astype(x.dtype)
        queries = self.encoder_attn.queries(h, heads)
        audio = self.encoder_attn.weights(h, cross.k) if output_attentions else None
        x = x + drop(self.encoder_attn(h, cross))

        h = self.final_layer_norm(x).astype(x.dtype)
        return x + drop(self.mlp(h)), LayerAttention(queries, text, audio)

    def step(
        self,
        x: jax.Array,
        cross: KeysValues,
        append: Callable[[KeysValues], KeysValues],
        source: jax.Array,
        end: jax.Array,
    ) -> tuple[jax.Array, KeysValues]:
        """The next tokens of a cached text: x [R,n,D] -> ([R,n,D], the cache's keys and values with those of x).

        cross: of the audio, as the cache stores it. append: adds keys and values to the cache. source, end: of it
        with these.
        """
        h = self.self_attn_layer_norm(x).astype(x.dtype)
        kv = append(self.self_attn.keys_values(h))
        x = x + self.self_attn.cached(h, kv, source, end)

        h = self.encoder_attn_layer_norm(x).astype(x.dtype)
        x = x + self.encoder_attn.cached(h, cross, end=cross.positions or 0)

        h = self.final_layer_norm(x).astype(x.dtype)
        return x + self.mlp(h), kv


def audio_scores(
    queries: jax.Array, cross: Sequence[KeysValues], heads: Sequence[tuple[int, int]], rows: Rows | None = None
) -> jax.Array:
    """Scores of heads' queries [B,A,S,K], from `TextDecoder.hidden_states`, before the softmax: [B,A,S,T].

    cross: of `cross_attention`, or as a cache stores it. rows: chooses some of the B rows of an array; default: all.
    """
    rows = rows or (lambda x: x)

    def keys(layer: int, head: int) -> jax.Array:
        """[B,T,K]."""
        return rows(from_cache(cross[layer], cross[layer].k.shape[-1] // queries.shape[-1]).k[:, head])

    chosen = [keys(*one) for one in sorted(heads, key=lambda one: one[0])]
    return ops.attention_scores(rows(queries), jnp.stack(chosen, axis=1))


def run_layer(remat: bool, layer: Layer, x: jax.Array, *args: Any, rngs: nnx.Rngs | None, **options: Any) -> Any:
    """layer(x, *args, rngs=rngs, **options); `remat`: the backward pass recomputes its activations.

    `jax.checkpoint`, not `nnx.remat`: the latter writes to the layer. Where the layer is not an argument of the
    transformation around it, as in the gradient with respect to the input, that fails and leaves it incomplete.
    """
    call: Callable[..., Any] = partial(layer, **options)
    if not remat:
        return call(x, *args, rngs=rngs)
    if rngs is None:
        return jax.checkpoint(call)(x, *args)

    def with_counts(counts: nnx.State, x: jax.Array, *args: Any) -> tuple[Any, nnx.State]:
        inner = nnx.merge(streams, counts)
        return call(x, *args, rngs=inner), nnx.state(inner)

    streams, counts = nnx.split(rngs)  # the counters of random numbers leave the checkpoint as values
    out, counts = jax.checkpoint(with_counts)(counts, x, *args)
    nnx.update(rngs, counts)
    return out
