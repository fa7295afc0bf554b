"""Rules on the logits of the next token: pytrees that the loop carries and applies in order, to all rows at once.

A rule is a frozen dataclass that derives from `Rule`, registered with `jax.tree_util.register_dataclass`. The metadata
of each field names what it belongs to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from whisper_nnx.text.special_tokens import SpecialTokens

NO_LIMIT = 1 << 20  # more timestamps than any vocabulary has, and more tokens than any context
LONGEST_LOOP = 16  # how many tokens may be what repeats itself

# What a field of a rule belongs to.
PER_ROW = {"belongs_to": "row"}  # [R,...]: a sequence. It follows the sequence when beams are reordered.
PER_WINDOW = {"belongs_to": "window"}  # [R,...]: a window, and so all of its beams or samples alike.
SHARED = {"belongs_to": "batch"}  # any shape, such as a mask [V]: all rows.
STATIC = {"belongs_to": "program", "static": True}  # hashable; another value compiles another program.


@dataclass(frozen=True)
class Rule(ABC):
    """Changes the logits of R rows, depending on the tokens before. A new one is added to `DecodingBatch.rules`.

    Rows do not affect each other, and fields keep their shapes and dtypes.
    """

    @abstractmethod
    def apply(self, logits: jax.Array) -> jax.Array:
        """logits [R,V] of the next tokens -> [R,V]."""

    def append(self, token: jax.Array) -> Self:
        """The rule after the next tokens [R]. Tokens after the end of a row have no meaning."""
        return self

    def stops(self) -> jax.Array | None:
        """Which rows [R] stop without an end of text, as failed attempts; None for a rule that stops none."""
        return None

    def repeat(self, group: int) -> Self:
        """From B windows to B * group rows."""
        return self._changed(lambda x: jnp.repeat(x, group, axis=0), "row", "window")

    def take(self, rows: jax.Array) -> Self:
        """The rule where row i continues the sequence of row rows[i], which is of the same window."""
        return self._changed(lambda x: x[rows], "row")

    def _changed(self, change: Callable[[jax.Array], jax.Array], *owners: str) -> Self:
        for f in fields(self):
            if "belongs_to" not in f.metadata:
                where = f"{type(self).__name__}.{f.name}"
                raise TypeError(f"{where} has no metadata for what it belongs to; use field(metadata=PER_ROW), say")
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata["belongs_to"] in owners}
        return replace(self, **jax.tree.map(change, own))


def is_timestamp(token: jax.Array, special: SpecialTokens) -> jax.Array:
    """Which ids are timestamps. Ids above the last one are text that a fine-tuned checkpoint added."""
    return (token >= special.timestamp_begin) & (token <= special.timestamp_end)


def is_text(token: jax.Array, special: SpecialTokens) -> jax.Array:
    """Which ids are text: neither timestamps nor other special tokens."""
    return (token < special.eot) | (token > special.timestamp_end)


def suppress(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """logits [R,V] without the tokens of mask [V] or [R,V]."""
    return jnp.where(mask, -jnp.inf, logits)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SuppressRule(Rule):
    """Never samples the tokens of `always` [V], nor those of `at_start` [V] before another token."""

    always: Any = field(metadata=SHARED)
    at_start: Any = field(metadata=SHARED)
    started: Any = field(metadata=SHARED)

    @classmethod
    def from_masks(cls, always: np.ndarray, at_start: np.ndarray) -> SuppressRule:
        """Before the first token."""
        return cls(always, at_start, np.zeros((), bool))

    def apply(self, logits: jax.Array) -> jax.Array:
        return suppress(logits, self.always | (self.at_start & ~self.started))

    def append(self, token: jax.Array) -> SuppressRule:
        return replace(self, started=jnp.ones_like(self.started))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TimestampRule(Rule):
    """Keeps timestamps in order, as openai-whisper's ApplyTimestampRules.

    Timestamps come in pairs (end of a segment, start of the next) except before the end of text, never decrease, and
    leave no segment empty; the first token is one. Where all timestamps together are more probable than any single
    other token, it must be a timestamp.

    Attributes:
      enabled: [R], of which windows.
      max_initial: [R], the latest first timestamp, in steps of 20 ms; NO_LIMIT for any.
      started: [R], there are tokens (sampled, or a prefix).
      last_was, penultimate_was: [R], these were timestamps. A sequence of fewer than two tokens counts as if one
        preceded it.
      last: [R], the id of the latest timestamp.
    """

    enabled: Any = field(metadata=PER_WINDOW)
    max_initial: Any = field(metadata=PER_WINDOW)
    started: Any = field(metadata=PER_ROW)
    last_was: Any = field(metadata=PER_ROW)
    penultimate_was: Any = field(metadata=PER_ROW)
    last: Any = field(metadata=PER_ROW)
    special: SpecialTokens = field(metadata=STATIC)

    @classmethod
    def from_prefixes(
        cls,
        prefixes: Sequence[Sequence[int]],
        special: SpecialTokens,
        *,
        enabled: Sequence[bool],
        max_initial: Sequence[int],
    ) -> TimestampRule:
        """R rows that begin with these ids, possibly none; on the host."""
        was = [[special.timestamp_begin <= i <= special.timestamp_end for i in ids] for ids in prefixes]
        latest = [[i for i, w in zip(ids, ws, strict=True) if w] for ids, ws in zip(prefixes, was, strict=True)]
        return cls(
            enabled=np.array(enabled, bool),
            max_initial=np.array(max_initial, np.int32),
            started=np.array([bool(ids) for ids in prefixes]),
            last_was=np.array([bool(w) and w[-1] for w in was]),
            penultimate_was=np.array([len(w) < 2 or w[-2] for w in was]),
            last=np.array([ids[-1] if ids else special.timestamp_begin - 1 for ids in latest], np.int32),
            special=special,
        )

    def append(self, token: jax.Array) -> TimestampRule:
        now = is_timestamp(token, self.special)
        return replace(
            self,
            started=jnp.ones_like(self.started),
            last_was=now,
            penultimate_was=self.last_was | ~self.started,
            last=jnp.where(now, token, self.last),
        )

    def apply(self, logits: jax.Array) -> jax.Array:
        token, special = jnp.arange(logits.shape[-1]), self.special
        timestamp, text = is_timestamp(token, special), is_text(token, special)
        if special.sot_lm is not None:
            text |= token == special.sot_lm  # where it may be sampled, it marks speaker turns
        column = jax.tree.map(lambda x: x[:, None], self)

        opened = column.last_was & ~column.penultimate_was  # after an end: its start may follow, text may not
        lowest = column.last + jnp.where(opened, 0, 1)
        forbidden = token == special.no_timestamps
        forbidden |= opened & text
        forbidden |= column.last_was & column.penultimate_was & timestamp
        forbidden |= timestamp & (token < lowest)
        forbidden |= ~column.started & (~timestamp | (token > special.timestamp_begin + column.max_initial))
        ruled = suppress(logits, forbidden)

        first, end = special.timestamp_begin, special.timestamp_end + 1
        all_timestamps = jax.nn.logsumexp(ruled[:, first:end], axis=-1, keepdims=True)
        best_other = jnp.max(ruled[:, :first], axis=-1, keepdims=True)
        if end < ruled.shape[1]:
            best_other = jnp.maximum(best_other, jnp.max(ruled[:, end:], axis=-1, keepdims=True))
        ruled = suppress(ruled, (all_timestamps > best_other) & ~timestamp)
        return jnp.where(column.enabled, ruled, logits)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RepetitionRule(Rule):
    """Penalizes text tokens that were sampled, rules out those that would repeat an n-gram, and stops rows that loop.

    Attributes:
      penalty, ngram, repeats: [R], repetition_penalty, no_repeat_ngram_size and max_repeats (NO_LIMIT for none).
      tokens: [R,N], the prefix and what was sampled, of which the first `length` [R] count.
      matched: [R,N], how many tokens before each of them equal the latest ones: it would continue an n-gram that
        occurred before.
      recent: [R,P], the latest text tokens that were sampled, last first, without timestamps.
      runs: [R,P], how many of them without a break equal the one that was p+1 tokens earlier.
    """

    penalty: Any = field(metadata=PER_WINDOW)
    ngram: Any = field(metadata=PER_WINDOW)
    repeats: Any = field(metadata=PER_WINDOW)
    tokens: Any = field(metadata=PER_ROW)
    length: Any = field(metadata=PER_ROW)
    matched: Any = field(metadata=PER_ROW)
    recent: Any = field(metadata=PER_ROW)
    runs: Any = field(metadata=PER_ROW)
    special: SpecialTokens = field(metadata=STATIC)

    @classmethod
    def from_prefixes(
        cls,
        prefixes: Sequence[Sequence[int]],
        special: SpecialTokens,
        *,
        size: int,
        penalty: Sequence[float],
        ngram: Sequence[int],
        repeats: Sequence[int | None],
    ) -> RepetitionRule:
        """R rows that begin with these ids, possibly none, with room for `size` tokens; on the host."""
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
            special=special,
        )

    def apply(self, logits: jax.Array) -> jax.Array:
        rows, nowhere = jnp.arange(logits.shape[0])[:, None], logits.shape[1]
        text = (jnp.arange(self.tokens.shape[1]) < self.length[:, None]) & is_text(self.tokens, self.special)

        def put(logits: jax.Array, where: jax.Array, value: jax.Array | float) -> jax.Array:
            return logits.at[rows, jnp.where(where, self.tokens, nowhere)].set(value, mode="drop")

        penalty, ngram = self.penalty[:, None], self.ngram[:, None]
        known = jnp.take_along_axis(logits, self.tokens, axis=1)
        logits = put(logits, text, jnp.where(known > 0, known / penalty, known * penalty))
        return put(logits, text & (ngram > 0) & (self.matched >= ngram - 1), -jnp.inf)

    def append(self, token: jax.Array) -> RepetitionRule:
        position, new, text = jnp.arange(self.tokens.shape[1]), token[:, None], is_text(token, self.special)[:, None]
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

    def stops(self) -> jax.Array:
        """Which rows [R] end in some tokens that occur `repeats` times in a row."""
        return (self.runs >= (self.repeats[:, None] - 1) * jnp.arange(1, LONGEST_LOOP + 1)).any(axis=1)


def _common_end(a: Sequence[int], b: Sequence[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[-1 - n] == b[-1 - n]:
        n += 1
    return n
