"""The jitted part of decoding: prefill, then one token a step for all rows until every row is done.

Whatever may differ between calls (prompt lengths, temperatures, languages, limits) is traced. Only the strategy, the
kinds of the rules and the vocabulary's special ids are static, so one compiled program serves all calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from whisper_nnx.decoding.rules import Rule
from whisper_nnx.decoding.strategies import Candidates, State, Strategy
from whisper_nnx.model.cache import KeysValues, KVCache
from whisper_nnx.model.whisper import TextDecoder
from whisper_nnx.runtime.programs import exportable, program
from whisper_nnx.text.special_tokens import SpecialTokens

PREFILL_CHUNK = 32  # ids fed at once; longer prompts take several passes of the same shape


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodingBatch:
    """How B windows are decoded.

    Attributes:
      initial_ids: [B,P], prompt, start sequence and prefix, padded on the right to `padded_positions`, the size of the
        cache.
      initial_length: [B], number of initial ids without the padding.
      sot_index: [B], position of `<|startoftranscript|>` among them.
      limit: [B], the most tokens to sample, including the end of text.
      temperature: [B], sampling temperature.
      seed: [B] uint32, sampling seed.
      rules: applied to the logits in this order; log-probabilities are those after all of them. The compiled program
        contains these rules only.
    """

    initial_ids: Any
    initial_length: Any
    sot_index: Any
    limit: Any
    temperature: Any
    seed: Any
    rules: tuple[Rule, ...] = ()


@exportable
class Generated(NamedTuple):
    """Candidates of each window, and no_speech_prob [B]: that token's probability after `<|startoftranscript|>`."""

    candidates: Candidates
    no_speech_prob: jax.Array


def padded_positions(max_positions: int) -> int:
    """Size of the cache for a model with that many text positions: rounded up to whole prefill chunks."""
    return -(-max_positions // PREFILL_CHUNK) * PREFILL_CHUNK


def prefill(
    decoder: TextDecoder, cross: tuple[KeysValues, ...], batch: DecodingBatch
) -> tuple[KVCache, jax.Array, jax.Array]:
    """Feeds the initial ids -> (cache, hidden [B,D] at `<|startoftranscript|>`, hidden [B,D] at the last id).

    The last ids of all rows are fed together, so that shorter rows have their padding before them.
    """
    rows, size = batch.initial_ids.shape
    cache = KVCache.init(cross, size)
    chunks = -(-batch.initial_length.max() // PREFILL_CHUNK)
    padding = chunks * PREFILL_CHUNK - batch.initial_length
    at_sot = padding + batch.sot_index

    def feed(carry: tuple[KVCache, jax.Array, jax.Array]) -> tuple[KVCache, jax.Array, jax.Array]:
        cache, found, _ = carry
        at = cache.end + jnp.arange(PREFILL_CHUNK) - padding[:, None]
        ids = jnp.take_along_axis(batch.initial_ids, jnp.clip(at, 0, size - 1), axis=1)
        kept = jnp.clip(cache.end + PREFILL_CHUNK - padding, 0, PREFILL_CHUNK)
        hidden, longer = decoder.step(ids, cache, kept)
        place = at_sot - cache.end
        here = jnp.take_along_axis(hidden, jnp.clip(place, 0, PREFILL_CHUNK - 1)[:, None, None], axis=1)[:, 0]
        found = jnp.where(((place >= 0) & (place < PREFILL_CHUNK))[:, None], here, found)
        return longer, found, hidden[:, -1]

    nothing = jnp.zeros((rows, decoder.embed_tokens.features), decoder.dtype)
    carry = (cache, nothing, nothing)
    return jax.lax.while_loop(lambda carry: carry[0].end < chunks * PREFILL_CHUNK, feed, carry)


class _Loop(NamedTuple):
    step: jax.Array
    hidden: jax.Array
    cache: KVCache
    rules: tuple[Rule, ...]
    state: State


@program(static_argnames=("strategy", "special"), rows=("cross", "batch"))
def generate(
    decoder: TextDecoder,
    cross: tuple[KeysValues, ...],
    batch: DecodingBatch,
    strategy: Strategy,
    special: SpecialTokens,
) -> Generated:
    """Decodes B windows, given their cross-attention, with one strategy."""
    cache, at_sot, at_last = prefill(decoder, cross, batch)
    group, size = strategy.group, batch.initial_ids.shape[1]

    def step(loop: _Loop) -> _Loop:
        logits = unembed(loop.hidden)
        for rule in loop.rules:
            logits = rule.apply(logits)
        token, source, state = strategy.step(loop.state, logits, loop.step, special.eot)
        rules, cache = loop.rules, loop.cache
        if source is not None:
            rules, cache = tuple(rule.take(source) for rule in rules), cache.reorder(source)
        rules = tuple(rule.append(token) for rule in rules)
        for rule in rules:
            if (stops := rule.stops()) is not None:
                state = state.stop(stops & ~loop.state.done)
        hidden, cache = decoder.step(token[:, None], cache)
        return _Loop(loop.step + 1, hidden[:, 0], cache, rules, state)

    unembed = decoder.unembedding(batch.limit.shape[0] * group)
    rules = tuple(rule.repeat(group) for rule in batch.rules)
    state = strategy.init(batch.limit, size, batch.temperature, batch.seed, special.eot)
    loop = _Loop(jnp.int32(0), jnp.repeat(at_last, group, axis=0), cache.repeat(group), rules, state)
    loop = jax.lax.while_loop(lambda loop: ~loop.state.done.all(), step, loop)
    return Generated(strategy.result(loop.state), _no_speech_prob(unembed(at_sot), special))


def _no_speech_prob(logits: jax.Array, special: SpecialTokens) -> jax.Array:
    """logits [B,V] at `<|startoftranscript|>` -> [B]; NaN where the vocabulary has no such token."""
    if special.no_speech is None:
        return jnp.full(logits.shape[:1], jnp.nan)
    # Gather the maximum by index, or XLA fuses the reduction into the matmul (10x slower on CPU).
    top = jnp.take_along_axis(logits, jnp.argmax(logits, axis=-1)[:, None], axis=-1)
    parts = jnp.exp(logits - top)
    return parts[:, special.no_speech] / parts.sum(axis=-1)
