"""Language detection: the token that follows `<|startoftranscript|>`. Paper, section 2.3."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from whisper_nnx.model.cache import KeysValues, KVCache
from whisper_nnx.model.whisper import TextDecoder
from whisper_nnx.runtime.programs import program
from whisper_nnx.text.special_tokens import SpecialTokens


@program(static_argnames=("special",), rows=("cross",))
def language_probs(decoder: TextDecoder, cross: tuple[KeysValues, ...], special: SpecialTokens) -> jax.Array:
    """cross-attention of B windows -> probabilities [B, languages], in the order of `special.languages`."""
    cache = KVCache.init(cross, 1)
    ids = jnp.full((cache.length.shape[0], 1), special.sot, jnp.int32)
    hidden, _ = decoder.step(ids, cache)
    logits = decoder.logits(hidden[:, 0])[:, jnp.array([token for _, token in special.languages])]
    return jax.nn.softmax(logits, axis=-1)
