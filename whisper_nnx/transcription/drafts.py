"""Drafts, whose tokens a model verifies, and a model with its draft. `decoding/speculative.py` has the loop."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from whisper_nnx.model.audio_context import with_audio_ctx
from whisper_nnx.model.sharding import mesh_of, on_devices
from whisper_nnx.model.whisper import Whisper
from whisper_nnx.runtime.flat import Flat
from whisper_nnx.transcription.options import NGRAM

_ROUNDING = 0.01  # of the largest number of an array, in 16 bits


class DraftModel(NamedTuple):
    """The parts of a smaller model that propose tokens. encoder: None if it is the model's own."""

    decoder: Any
    encoder: Any

    @property
    def flat(self) -> DraftModel:
        return DraftModel(Flat(self.decoder), self.encoder and Flat(self.encoder))


@jax.tree_util.register_pytree_node_class
class DraftedWhisper:
    """A model with a draft, in place of a `Whisper` in all of transcription. Other attributes are the model's."""

    def __init__(self, model: Whisper, draft: DraftModel | str):
        self.draft, self._model = draft, model

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._model, name)

    def tree_flatten(self) -> tuple[tuple[Any, Any], None]:
        return (self._model, self.draft), None

    @classmethod
    def tree_unflatten(cls, _: None, parts: tuple[Any, Any]) -> DraftedWhisper:
        return cls(*parts)


def draft_of(model: Any) -> DraftModel | str | None:
    """The draft of a model in transcription."""
    return getattr(model, "draft", None)


def with_draft(model: Any, draft: Whisper | str | None) -> Any:
    """The model with a draft: a smaller model, or "ngram"; None: the model as it is.

    A draft with the model's encoder uses the model's encoder output. Raises ValueError for one with another vocabulary.
    """
    if draft is None:
        return model
    if isinstance(draft, str):
        return DraftedWhisper(model, NGRAM)
    own, other = draft.config.vocab_size, model.config.vocab_size
    if own != other or (draft.tokenizer and draft.tokenizer.special != model.tokenizer.special):
        raise ValueError(
            f"draft has another vocabulary than the model ({other} tokens, not {own}, or others); choose a draft with "
            "the tokenizer of the model"
        )
    if draft.config.max_source_positions > (positions := model.config.max_source_positions):
        draft = with_audio_ctx(draft, positions)
    if (mesh := mesh_of(model)) is not None:
        draft = on_devices(draft, mesh)
    return DraftedWhisper(model, DraftModel(draft.decoder, None if has_same_encoder(model, draft) else draft.encoder))


def has_same_encoder(model: Any, draft: Whisper) -> bool:
    """Whether two encoders are equal but for the rounding of their weights; 8-bit matrices are not compared."""
    if model.encoder is draft.encoder:
        return True
    ours, theirs = (dict(nnx.to_flat_state(nnx.state(one.encoder))) for one in (model, draft))
    sizes = ("d_model", "num_mel_bins", "max_source_positions", "encoder_layers", "encoder_attention_heads")
    if any(getattr(model.config, name) != getattr(draft.config, name) for name in sizes):
        return False

    def is_near(a: jax.Array, b: jax.Array) -> bool:
        if jnp.int8 in (a.dtype, b.dtype):
            return True
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return a.shape == b.shape and bool(jnp.abs(a - b).max() <= _ROUNDING * jnp.abs(a).max())

    return all(is_near(ours[path][...], theirs[path][...]) for path in ours.keys() & theirs.keys())
