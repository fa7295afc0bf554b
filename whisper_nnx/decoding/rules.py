"""Rules on the logits of the next token, as pure functions over all rows at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from whisper_nnx.text.special_tokens import SpecialTokens

NO_LIMIT = 1 << 20  # more timestamps than any vocabulary has, and more tokens than any context
LONGEST_LOOP = 16  # how many tokens may be what repeats itself


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TimestampHistory:
    """What the timestamp rules need to know of the tokens so far; each field [R], one for each row.

    begun: there are tokens (sampled, or a prefix); last_was, penultimate_was: these were timestamps (a sequence that
    has just begun counts as if one stood before it); last: the id of the latest one.
    """

    begun: Any
    last_was: Any
    penultimate_was: Any
    last: Any

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], special: SpecialTokens) -> TimestampHistory:
        """What R rows of ids, possibly empty, lead to; on the host."""
        was = [[special.timestamp_begin <= i <= special.timestamp_end for i in ids] for ids in rows]
        latest = [[i for i, w in zip(ids, ws, strict=True) if w] for ids, ws in zip(rows, was, strict=True)]
        return cls(
            np.array([bool(ids) for ids in rows]),
            np.array([bool(w) and w[-1] for w in was]),
            np.array([len(w) < 2 or w[-2] for w in was]),
            np.array([ids[-1] if ids else special.timestamp_begin - 1 for ids in latest], np.int32),
        )

    def append(self, token: jax.Array, special: SpecialTokens) -> TimestampHistory:
        """token [R] comes next."""
        now = is_timestamp(token, special)
        return TimestampHistory(
            jnp.ones_like(self.begun), now, self.last_was | ~self.begun, jnp.where(now, token, self.last)
        )


def is_timestamp(token: jax.Array, special: SpecialTokens) -> jax.Array:
    """Which ids are timestamps. Ids behind the last one are text that a fine-tune added."""
    return (token >= special.timestamp_begin) & (token <= special.timestamp_end)


def is_text(token: jax.Array, special: SpecialTokens) -> jax.Array:
    """Which ids are text: neither timestamps nor other special tokens."""
    return (token < special.eot) | (token > special.timestamp_end)


def suppress(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """logits [R,V] without the tokens that mask [V] (or [R,V]) names."""
    return jnp.where(mask, -jnp.inf, logits)


def timestamp_rules(
    logits: jax.Array, history: TimestampHistory, max_initial: jax.Array, special: SpecialTokens
) -> jax.Array:
    """logits [R,V] of tokens that keep the timestamps in order; as openai-whisper's ApplyTimestampRules.

    Timestamps come in pairs (end of a segment, start of the next) except before the end of text, never decrease, and
    leave no segment empty; the first token is one, at most max_initial [R] steps of 20 ms. Where all timestamps
    together are more probable than any single other token, it must be a timestamp.
    """
    token = jnp.arange(logits.shape[-1])
    timestamp = is_timestamp(token, special)
    text = is_text(token, special)
    if special.sot_lm is not None:
        text |= token == special.sot_lm  # where it may be sampled, it marks the turns of speakers
    column = jax.tree.map(lambda x: x[:, None], history)

    opened = column.last_was & ~column.penultimate_was  # an end was just written: its start may follow, text may not
    lowest = column.last + jnp.where(opened, 0, 1)
    forbidden = token == special.no_timestamps
    forbidden |= opened & text
    forbidden |= column.last_was & column.penultimate_was & timestamp
    forbidden |= timestamp & (token < lowest)
    forbidden |= ~column.begun & (~timestamp | (token > special.timestamp_begin + max_initial[:, None]))
    logits = suppress(logits, forbidden)

    first, end = special.timestamp_begin, special.timestamp_end + 1
    all_timestamps = jax.nn.logsumexp(logits[:, first:end], axis=-1, keepdims=True)
    best_other = jnp.max(logits[:, :first], axis=-1, keepdims=True)
    if end < logits.shape[1]:
        best_other = jnp.maximum(best_other, jnp.max(logits[:, end:], axis=-1, keepdims=True))
    return suppress(logits, (all_timestamps > best_other) & ~timestamp)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Repetition:
    """What R rows said, and how far they may repeat it.

    penalty [R], ngram [R], repeats [R]: repetition_penalty, no_repeat_ngram_size and max_repeats (NO_LIMIT for none).
    tokens [R,N]: the prefix and what was sampled, of which the first `length` [R] count. matched [R,N]: how many tokens
    before each of them are the same as the latest ones, so that it would go on an n-gram that was there already.
    recent [R,P]: the latest text tokens that were sampled, last first, timestamps left out; runs [R,P]: how many of
    them without a break equal the one that was p+1 tokens before them.
    """

    penalty: Any
    ngram: Any
    repeats: Any
    tokens: Any
    length: Any
    matched: Any
    recent: Any
    runs: Any

    @classmethod
    def of(
        cls,
        prefixes: Sequence[Sequence[int]],
        size: int,
        penalty: Sequence[float],
        ngram: Sequence[int],
        repeats: Sequence[int | None],
    ) -> Repetition:
        """R rows that begin with a prefix, possibly empty, with room for `size` tokens; on the host."""
        rows = len(prefixes)
        tokens, matched = np.zeros((2, rows, size), np.int32)
        for row, ids in enumerate(prefixes):
            tokens[row, : len(ids)] = ids
            matched[row, : len(ids)] = [_common_end(ids[:i], ids) for i in range(len(ids))]
        recent = np.full((rows, LONGEST_LOOP), -1, np.int32)
        return cls(
            penalty=np.array(penalty, np.float32),
            ngram=np.minimum(ngram, NO_LIMIT).astype(np.int32),
            repeats=np.array([min(x or NO_LIMIT, NO_LIMIT) for x in repeats], np.int32),
            tokens=tokens,
            length=np.array([len(ids) for ids in prefixes], np.int32),
            matched=matched,
            recent=recent,
            runs=np.zeros_like(recent),
        )

    def append(self, token: jax.Array, special: SpecialTokens) -> Repetition:
        """token [R] comes next."""
        position, new, text = jnp.arange(self.tokens.shape[1]), token[:, None], is_text(token, special)[:, None]
        same = (self.tokens == new) & (position < self.length[:, None])
        matched = jnp.where(same, self.matched + 1, 0)
        runs = jnp.where(self.recent == new, self.runs + 1, 0)
        return replace(
            self,
            tokens=jnp.where(position == self.length[:, None], new, self.tokens),
            length=self.length + 1,
            matched=jnp.pad(matched[:, :-1], ((0, 0), (1, 0))),
            recent=jnp.where(text, jnp.concatenate([new, self.recent[:, :-1]], axis=1), self.recent),
            runs=jnp.where(text, runs, self.runs),
        )

    def loops(self) -> jax.Array:
        """Which rows [R] end in some tokens that come `repeats` times in a row."""
        return (self.runs >= (self.repeats[:, None] - 1) * jnp.arange(1, LONGEST_LOOP + 1)).any(axis=1)


def _common_end(a: Sequence[int], b: Sequence[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[-1 - n] == b[-1 - n]:
        n += 1
    return n


def repetition_rules(logits: jax.Array, said: Repetition, special: SpecialTokens) -> jax.Array:
    """logits [R,V] with the text tokens that were said penalised, and those that would complete an n-gram ruled out."""
    rows = jnp.arange(logits.shape[0])[:, None]
    text = (jnp.arange(said.tokens.shape[1]) < said.length[:, None]) & is_text(said.tokens, special)

    def put(logits: jax.Array, where: jax.Array, value: jax.Array | float) -> jax.Array:
        nowhere = logits.shape[1]
        return logits.at[rows, jnp.where(where, said.tokens, nowhere)].set(value, mode="drop")

    penalty, ngram = said.penalty[:, None], said.ngram[:, None]
    of_said = jnp.take_along_axis(logits, said.tokens, axis=1)
    logits = put(logits, text, jnp.where(of_said > 0, of_said / penalty, of_said * penalty))
    return put(logits, text & (ngram > 0) & (said.matched >= ngram - 1), -jnp.inf)
