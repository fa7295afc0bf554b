"""`with_masked_heads`: a model without those heads that invent text where nobody speaks."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import nnx

from whisper_nnx.model.config import released_inventing_heads
from whisper_nnx.model.whisper import Whisper
from whisper_nnx.timing.alignment_heads import alignment_heads, parse_heads

MEASURED = "measured"


def with_masked_heads(model: Whisper, heads: Sequence[Sequence[int]] | str | None = MEASURED) -> Whisper:
    """A model that shares the weights of another, without the output of some heads of the decoder's self-attention.

    A few of these heads cause most of what Whisper invents where nobody speaks (arXiv:2505.12969). Fine-tuned models of
    a released shape have the same ones only by likelihood.

    Args:
      model: the model, which stays as it is.
      heads: (layer, head) pairs, or as text "0:2,1:7"; "measured": those that were found for the released size of this
        shape by benchmarks/invented.py; None: none, the model as it is.

    Raises:
      ValueError: heads that do not exist, or were not measured for this shape.
    """
    if heads is None:
        return model
    config = model.config
    chosen: Sequence[Sequence[int]] | int | None
    if heads == MEASURED:
        chosen = released_inventing_heads(config)
    else:
        chosen = parse_heads(heads) if isinstance(heads, str) else heads
    if chosen is None:
        raise ValueError(
            f"masked_heads={MEASURED!r}: none were measured for a model of this size; name (layer, head) pairs "
            "(benchmarks/invented.py finds them), or drop it"
        )
    if isinstance(chosen, int):
        raise ValueError(f"masked_heads={heads!r} must be {MEASURED!r}, or layer:head pairs such as 0:2,1:7")
    masked = nnx.merge(*nnx.split(model))
    width = config.d_model // config.decoder_attention_heads
    for layer, head in alignment_heads(config, chosen):
        projection = masked.decoder.layers[layer].self_attn.out_proj
        kernel = projection.kernel[...]
        without = kernel.at[head * width : (head + 1) * width].set(0)
        projection.kernel = type(projection.kernel)(jax.device_put(without, kernel.sharding))
    return masked
