"""`FusionRule` prefers text that a language model finds probable (shallow fusion, arXiv:1503.03535)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from whisper_nnx.decoding.rules import PER_ROW, PER_WINDOW, SHARED, STATIC, Rule, is_text
from whisper_nnx.runtime.programs import exportable
from whisper_nnx.text.special_tokens import SpecialTokens

CONTEXT = 64  # tokens
_LEAST = -100.0
LanguageModel = Callable[[jax.Array], jax.Array]


@exportable
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FusionRule(Rule):
    """Adds weight * log P(token | text so far), by a language model, to text tokens when they are chosen.

    A language model does not know timestamps and the end of text. They get the average of the text tokens, by the
    model's own probabilities, so that they are as probable beside text as without the language model.

    Attributes:
      weight: [R], 0 for no effect.
      tokens: [R,CONTEXT], the text tokens of the window, the latest one last, -1 before the first.
      lm: tokens -> logits [R,V] of the next token; traceable by JAX. Its arrays are inputs of the program. With a true
        attribute `is_normalized`, they are log-probabilities.
    """

    weight: Any = field(metadata=PER_WINDOW)
    tokens: Any = field(metadata=PER_ROW)
    lm: LanguageModel = field(metadata=SHARED)
    special: SpecialTokens = field(metadata=STATIC)

    @classmethod
    def from_prefixes(
        cls,
        prefixes: Sequence[Sequence[int]],
        special: SpecialTokens,
        *,
        weight: Sequence[float],
        lm: LanguageModel,
    ) -> FusionRule:
        """Creates the rule on the host for R rows that start with these ids (possibly none)."""
        tokens = np.full((len(prefixes), CONTEXT), -1, np.int32)
        for row, ids in zip(tokens, prefixes, strict=True):
            text = [i for i in ids if i < special.eot or i > special.timestamp_end][-CONTEXT:]
            row[CONTEXT - len(text) :] = text
        return cls(np.array(weight, np.float32), tokens, _as_pytree(lm), special)

    def apply(self, logits: jax.Array) -> jax.Array:
        return logits

    def bonus(self, logits: jax.Array) -> jax.Array:
        text = is_text(jnp.arange(logits.shape[1]), self.special)
        scores = jnp.asarray(self.lm(self.tokens), jnp.float32)
        logprobs = jnp.where(text, scores, -jnp.inf)
        if not getattr(self.lm, "is_normalized", False):
            logprobs = jax.nn.log_softmax(logprobs, axis=-1)
        own = jnp.where(text, logits, -jnp.inf)
        own = jnp.where((own > -jnp.inf).any(axis=1, keepdims=True), own, jnp.where(text, 0.0, -jnp.inf))
        finite = jnp.maximum(logprobs, _LEAST)  # a token that the language model excludes stays comparable
        average = (jax.nn.softmax(own, axis=-1) * jnp.where(text, finite, 0.0)).sum(axis=1, keepdims=True)
        weight = self.weight[:, None]
        return jnp.where(weight > 0, weight * jnp.where(text, finite, average), 0)

    def append(self, token: jax.Array) -> FusionRule:
        longer = jnp.concatenate([self.tokens[:, 1:], token[:, None]], axis=1)
        return replace(self, tokens=jnp.where(is_text(token, self.special)[:, None], longer, self.tokens))


def _as_pytree(lm: LanguageModel) -> LanguageModel:
    """A function as a pytree without arrays, of which programs depend; a pytree of arrays as it is."""
    return jax.tree_util.Partial(lm) if jax.tree_util.all_leaves([lm]) else lm


def identity_of(lm: object) -> Hashable:
    """What two language models are compared by: themselves, or which object it is where it has no hash."""
    try:
        hash(lm)
    except TypeError:  # a dataclass with arrays
        return id(lm)
    return lm


def check_lm(lm: LanguageModel, vocab_size: int) -> None:
    """Raises ValueError for a language model of another vocabulary."""
    found = jax.eval_shape(lm, jax.ShapeDtypeStruct((2, CONTEXT), jnp.int32))
    if getattr(found, "shape", None) != (2, vocab_size):
        raise ValueError(f"lm returns {found} for tokens [2,{CONTEXT}]; it must return logits [2,{vocab_size}]")
