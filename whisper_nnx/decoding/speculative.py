"""Greedy decoding with a draft: proposed tokens are verified together, in one pass of the decoder (arXiv:2211.17192).

The pass computes the logits after the last token and after each proposed one. The rules and the choice are applied to
them position by position, as in `loop.run`, for as long as the chosen token is the proposed one. So the tokens are
those of `loop.generate`. Each pass gives at least one, and at most one more than were proposed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from whisper_nnx.decoding.loop import PREFILL_CHUNK, DecodingBatch, Generated, choose, prefill, prefilled, ruled
from whisper_nnx.decoding.rules import Rule
from whisper_nnx.decoding.strategies import Samples, Sampling
from whisper_nnx.model.cache import KeysValues, KVCache, to_cache
from whisper_nnx.model.whisper import TextDecoder
from whisper_nnx.ops import argmax
from whisper_nnx.runtime.programs import program
from whisper_nnx.text.special_tokens import SpecialTokens

PROPOSED = 4  # tokens in each pass
GREEDY = Sampling()
# Positions beyond those of the initial ids: the padding before them, and proposed tokens after the last one.
_MORE_POSITIONS = 2 * PREFILL_CHUNK
_MATCH = 2, 3  # tokens, at least and at most: after one alone, too little of what is proposed is right


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Speculation:
    """R rows in the loop: their last tokens [R], which are still to be fed, and as in `loop.Rows`.

    draft: the state of the draft.
    """

    token: Any
    cache: KVCache
    rules: tuple[Rule, ...]
    state: Samples
    draft: Any


class Draft(Protocol):
    """Proposes tokens. `is_sure`: it always does."""

    is_sure: bool

    def init(self) -> Any:
        """Its state before the first token."""

    def propose(self, rows: Speculation) -> tuple[jax.Array, Any]:
        """The next tokens [R,PROPOSED], -1 for none, and its state."""

    def keep(self, state: Any, kept: jax.Array) -> Any:
        """Its state, in which of the last token and what it proposed the first `kept` [R] are part of the text."""

    def closed_up(self, state: Any, going: jax.Array) -> Any:
        """Its state, after the `KVCache.closed_up` of the model's cache."""


class NGrams:
    """Proposes what followed the latest tokens where they occurred before: in the prompt or in what was decoded."""

    is_sure = False

    def __init__(self, batch: DecodingBatch):
        self._initial, self._length = batch.initial_ids, batch.initial_length

    def init(self) -> tuple[()]:
        return ()

    def propose(self, rows: Speculation) -> tuple[jax.Array, tuple[()]]:
        text, length = self._text(rows.state)
        return propose_ngrams(text, length), ()

    def keep(self, state: tuple[()], kept: jax.Array) -> tuple[()]:
        return ()

    def closed_up(self, state: tuple[()], going: jax.Array) -> tuple[()]:
        return ()

    def _text(self, state: Samples) -> tuple[jax.Array, jax.Array]:
        """All tokens so far [R,S], and how many there are [R]."""
        tokens, size = state.sequences.tokens, self._initial.shape[1]
        position, start = jnp.arange(size), self._length[:, None]
        sampled = jnp.take_along_axis(tokens, jnp.clip(position - start, 0, size - 1), axis=1)
        return jnp.where(position < start, self._initial, sampled), self._length + state.sequences.length


def propose_ngrams(text: jax.Array, length: jax.Array) -> jax.Array:
    """text [R,S], of which the first `length` [R] tokens count -> what may follow [R,PROPOSED], -1 for none.

    The longest match with the last two or three tokens counts; of several, the latest. What it repeats is continued
    beyond the end of the text, as in a loop.
    """
    position, last = jnp.arange(text.shape[1]), length[:, None] - 1
    equal, matched = jnp.ones(text.shape, bool), jnp.zeros(text.shape, jnp.int32)
    for back in range(_MATCH[1]):
        token = jnp.take_along_axis(text, jnp.maximum(last - back, 0), axis=1)
        equal &= (jnp.roll(text, back, axis=1) == token) & (position >= back) & (last >= back)
        matched += equal
    matched = jnp.where(position < last, matched, 0)
    found = jnp.argmax(matched * text.shape[1] + position, axis=1)[:, None]
    period = jnp.maximum(last - found, 1)
    proposed = jnp.take_along_axis(text, found + 1 + jnp.arange(PROPOSED) % period, axis=1)
    return jnp.where(jnp.take_along_axis(matched, found, axis=1) >= _MATCH[0], proposed, -1)


class DraftModel:
    """Proposes the most probable tokens of a smaller decoder with the same vocabulary, under the same rules."""

    is_sure = True

    def __init__(self, decoder: TextDecoder, cross: tuple[KeysValues, ...], batch: DecodingBatch):
        self._decoder, self._cross, self._batch = decoder, cross, batch
        self._unembed = decoder.unembedding(len(batch.initial_ids))

    def init(self) -> KVCache:
        cache, _, _ = prefill(self._decoder, self._cross, self._batch)
        return replace(cache, cross_attention=())

    def propose(self, rows: Speculation) -> tuple[jax.Array, KVCache]:
        def next_token(carry: Any, _: None) -> tuple[Any, jax.Array]:
            token, rules, cache = carry
            hidden, cache = self._feed(token, cache)
            logits, bonus = ruled(self._unembed(hidden), rules)
            token = argmax(logits if bonus is None else logits + bonus).astype(jnp.int32)
            return (token, tuple(rule.append(token) for rule in rules), cache), token

        carry = (rows.token, rows.rules, rows.draft)
        (last, _, cache), proposed = jax.lax.scan(next_token, carry, length=PROPOSED)
        return proposed.T, self._feed(last, cache)[1]  # all that the decoder may keep

    def _feed(self, token: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        hidden, cache = self._decoder.step(token[:, None], replace(cache, cross_attention=self._cross))
        return hidden[:, 0], replace(cache, cross_attention=())

    def keep(self, state: KVCache, kept: jax.Array) -> KVCache:
        return state.keep(PROPOSED + 1, kept)

    def closed_up(self, state: KVCache, going: jax.Array) -> KVCache:
        return state.closed_up(going)


@program(static_argnames=("special",), rows=("cross", "batch", "draft_cross"))
def generate_speculative(
    decoder: TextDecoder,
    cross: tuple[KeysValues, ...],
    batch: DecodingBatch,
    draft: TextDecoder | None,
    draft_cross: tuple[KeysValues, ...],
    special: SpecialTokens,
) -> Generated:
    """Decodes B windows as `generate` does greedily, with tokens that a draft proposes.

    Args:
      decoder: of the model.
      cross: audio keys and values of the windows.
      batch: how they are decoded; the temperature is 0.
      draft: the decoder of a smaller model; None: n-grams.
      draft_cross: its audio keys and values.
      special: the vocabulary's special ids.
    """
    cross, draft_cross = to_cache(cross), to_cache(draft_cross)
    room = ((0, 0), (0, _MORE_POSITIONS))
    batch = replace(batch, initial_ids=jnp.pad(batch.initial_ids, room, constant_values=special.eot))
    rows = prefilled(decoder, cross, batch, GREEDY, special)
    token, _, rules, state = choose(decoder.logits(rows.hidden), rows.rules, rows.state, GREEDY, special)
    proposer: Draft = NGrams(batch) if draft is None else DraftModel(draft, draft_cross, batch)
    begun = Speculation(token, rows.cache, rules, state, proposer.init())
    ended = _run(decoder, cross, begun, proposer, special)
    return Generated(GREEDY.result(ended.state), rows.no_speech_prob)


def _run(
    decoder: TextDecoder, cross: tuple[KeysValues, ...], rows: Speculation, draft: Draft, special: SpecialTokens
) -> Speculation:
    """Samples tokens until all rows are done. While nothing is proposed, a pass feeds single tokens."""

    def goes_on(rows: Speculation) -> jax.Array:
        return ~rows.state.done.all()

    def has_proposal(rows: Speculation) -> jax.Array:
        proposed, _ = draft.propose(rows)
        return ((proposed[:, 0] >= 0) & ~rows.state.done).any()

    def feed_one(rows: Speculation) -> Speculation:
        return _verified(decoder, cross, rows, jnp.zeros((len(rows.token), 0), jnp.int32), special)[0]

    def feed_proposed(rows: Speculation) -> Speculation:
        proposed, state = draft.propose(rows)
        rows, kept = _verified(decoder, cross, rows, proposed, special)
        return replace(rows, draft=draft.keep(state, kept))

    def has_room(rows: Speculation) -> jax.Array | bool:
        """Rows that keep less than others have gaps. A single row has none, and its cache has room for all."""
        return len(rows.token) == 1 or rows.cache.end < rows.cache.source.shape[1] - PROPOSED

    def close_up(rows: Speculation) -> Speculation:
        going = ~rows.state.done
        return replace(rows, cache=rows.cache.closed_up(going), draft=draft.closed_up(rows.draft, going))

    def feed_any(rows: Speculation) -> Speculation:
        if len(rows.token) > 1:
            rows = jax.lax.while_loop(lambda rows: ~has_room(rows), close_up, rows)
        if draft.is_sure:
            return feed_proposed(rows)
        rows = jax.lax.while_loop(lambda rows: goes_on(rows) & has_room(rows) & ~has_proposal(rows), feed_one, rows)
        return jax.lax.while_loop(lambda rows: goes_on(rows) & has_room(rows) & has_proposal(rows), feed_proposed, rows)

    return jax.lax.while_loop(goes_on, feed_any, rows)


def _verified(
    decoder: TextDecoder,
    cross: tuple[KeysValues, ...],
    rows: Speculation,
    proposed: jax.Array,
    special: SpecialTokens,
) -> tuple[Speculation, jax.Array]:
    """Feeds the last tokens and the proposed ones [R,n] -> (the rows after it, how many of these were kept [R])."""
    count, n = proposed.shape
    ids = jnp.concatenate([rows.token[:, None], jnp.maximum(proposed, 0)], axis=1)
    hidden, cache = decoder.step(ids, replace(rows.cache, cross_attention=cross))
    logits = decoder.logits(hidden)
    expected = jnp.pad(proposed, ((0, 0), (0, 1)), constant_values=-1)

    def choose_next(loop: Any) -> Any:
        at, active, kept, token, rules, state = loop

        def where_active(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(jnp.expand_dims(active, range(1, new.ndim)), new, old)

        chosen, _, new_rules, new_state = choose(logits[:, at], rules, state, GREEDY, special)
        rules = tuple(new.changed(where_active, old) for new, old in zip(new_rules, rules, strict=True))
        state = jax.tree.map(where_active, new_state, state)
        token, kept = where_active(chosen, token), kept + active
        return at + 1, active & (expected[:, at] == chosen) & ~state.done, kept, token, rules, state

    kept = jnp.zeros(count, jnp.int32)
    loop = (jnp.int32(0), ~rows.state.done, kept, rows.token, rows.rules, rows.state)
    _, _, kept, token, rules, state = jax.lax.while_loop(lambda loop: loop[1].any(), choose_next, loop)
    cache = replace(cache.keep(n + 1, kept), cross_attention=())
    return Speculation(token, cache, rules, state, rows.draft), kept
