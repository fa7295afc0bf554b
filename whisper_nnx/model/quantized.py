"""Weights of 8 bits: the matrices as whole numbers from -127 to 127, with a scale for each of their outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from whisper_nnx.model.summary import Module
from whisper_nnx.ops.products import few_rows_product, flat_product, narrow_product

if TYPE_CHECKING:
    from whisper_nnx.model.whisper import Whisper

Dtype = Any


class Scale(nnx.Param):
    """What the whole numbers of one output are multiplied by."""


def quantize(matrix: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Whole numbers of `matrix` [M,N] and the scales [M or N], float32, by which they come back; one per sum over axis.

    The largest of a channel becomes 127, so nothing is off by more than half a scale.
    """
    matrix = matrix.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(matrix).max(axis=axis), jnp.finfo(jnp.float32).tiny) / 127
    return jnp.round(matrix / jnp.expand_dims(scale, axis)).astype(jnp.int8), scale


class Int8Linear(Module):
    """`nnx.Linear` whose kernel is int8. The scales are applied to the product, so whole numbers are multiplied."""

    def __init__(self, linear: nnx.Linear):
        kernel, scale = quantize(linear.kernel[...], axis=0)
        self.kernel, self.scale, self.bias = nnx.Param(kernel), Scale(scale), linear.bias
        self.dtype, self.precision = linear.dtype, linear.precision

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [...,n_in] -> [...,n_out]."""
        kernel, x = self.kernel[...], x.astype(self.dtype)
        product = narrow_product(x, kernel)
        if product is None:
            product = flat_product(x, kernel.astype(self.dtype), precision=self.precision)
        product = product * self.scale[...].astype(product.dtype)
        return product if self.bias is None else product + self.bias[...].astype(product.dtype)


class Int8Embedding(Module):
    """`layers.Embedding` whose table is int8, with a scale for each token."""

    def __init__(self, embedding: nnx.Embed):
        table, scale = quantize(embedding.embedding[...], axis=1)
        self.embedding, self.scale = nnx.Param(table), Scale(scale)
        self.num_embeddings, self.features, self.dtype = embedding.num_embeddings, embedding.features, embedding.dtype

    def rows(self, ids: jax.Array) -> jax.Array:
        """ids [...] -> [...,D]."""
        return (self.embedding[...][ids] * self.scale[...][ids][..., None]).astype(self.dtype)

    def table(self) -> jax.Array:
        """[V,D]."""
        return (self.embedding[...] * self.scale[...][:, None]).astype(self.dtype)

    def scores(self, x: jax.Array) -> jax.Array:
        """x [...,D] of a few rows -> their product with each row of the table [...,V], float32."""
        return few_rows_product(x, self.embedding[...]) * self.scale[...]


def quantize_model(model: Whisper) -> None:
    """Replaces the linear layers and the tokens' embedding of the model, one after the other, by those of 8 bits.

    Convolutions, norms, biases and the embeddings of positions stay: they are small. So does an output matrix that is
    not the tokens' embedding; no released Whisper has one.
    """
    for _, module in list(nnx.iter_modules(model)):
        for name, layer in list(vars(module).items()):
            if type(layer) is nnx.Linear and name != "proj_out":
                setattr(module, name, Int8Linear(layer))
    model.decoder.embed_tokens = Int8Embedding(model.decoder.embed_tokens)  # type: ignore[assignment]
