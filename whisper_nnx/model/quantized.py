"""8-bit weights: matrices of integers from -127 to 127, with a scale per output channel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
from flax import nnx

from whisper_nnx import ops
from whisper_nnx.model.layers import Embedding
from whisper_nnx.model.summary import Module

if TYPE_CHECKING:
    from whisper_nnx.model.whisper import Whisper


class Scale(nnx.Param):
    """The factor of each output channel's integers."""


class Int8Linear(Module):
    """`layers.Linear` whose kernel is int8. The scales are applied to the product, so the operand stays int8."""

    def __init__(self, linear: nnx.Linear):
        kernel = ops.quantize(linear.kernel[...], axis=0)
        self.kernel, self.scale = nnx.Param(kernel.values), Scale(kernel.scale[0])
        self.bias, self.dtype = linear.bias, linear.dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [...,n_in] -> [...,n_out]."""
        bias = None if self.bias is None else self.bias[...]
        return ops.linear(x.astype(self.dtype), self.kernel[...], bias, self.scale[...])


class Int8Embedding(Embedding):
    """`layers.Embedding` whose table is int8, with a scale for each token."""

    def __init__(self, embedding: Embedding):
        table = ops.quantize(embedding.embedding[...], axis=1)
        self.embedding, self.scale = nnx.Param(table.values), Scale(table.scale[:, 0])
        self.num_embeddings, self.features, self.dtype = embedding.num_embeddings, embedding.features, embedding.dtype

    def _scale(self) -> jax.Array:
        return self.scale[...]


def quantize_model(model: Whisper) -> None:
    """Replaces the model's linear layers and token embedding, one by one, by their int8 versions.

    Convolutions, norms, biases and position embeddings stay: they are small. So does an output matrix that is not tied
    to the token embedding; no released Whisper has one.
    """
    for _, module in list(nnx.iter_modules(model)):
        for name, layer in list(vars(module).items()):
            if isinstance(layer, nnx.Linear) and name != "proj_out":
                setattr(module, name, Int8Linear(layer))
    model.decoder.embed_tokens = Int8Embedding(model.decoder.embed_tokens)
