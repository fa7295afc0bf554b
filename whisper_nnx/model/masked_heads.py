"""`with_masked_heads`: a model without some heads of its decoder."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import nnx

from whisper_nnx.model.heads import check_heads, parse_heads
from whisper_nnx.model.whisper import Whisper


def with_masked_heads(model: Whisper, heads: Sequence[Sequence[int]] | str | None) -> Whisper:
    """A model that shares the weights of another, without the output of some heads of the decoder's self-attention.

    A few of these heads cause most of what Whisper invents without speech (arXiv:2505.12969), but speech may need
    them. benchmarks/invented.py finds such heads.

    Args:
      model: the model, which stays as it is.
      heads: (layer, head) pairs, or as text "0:2,1:7"; None: none, the model as it is.

    Raises:
      ValueError: heads that do not exist.
    """
    if heads is None:
        return model
    chosen = parse_heads(heads) if isinstance(heads, str) else heads
    if isinstance(chosen, int):
        raise ValueError(f"masked_heads={heads!r} must be layer:head pairs such as 0:2,1:7")
    check_heads(model.config, chosen)
    config, masked = model.config, nnx.merge(*nnx.split(model))
    width = config.d_model // config.decoder_attention_heads
    for layer, head in chosen:
        projection = masked.decoder.layers[layer].self_attn.out_proj
        kernel = projection.kernel[...]
        without = kernel.at[head * width : (head + 1) * width].set(0)
        projection.kernel = type(projection.kernel)(jax.device_put(without, kernel.sharding))
    return masked
