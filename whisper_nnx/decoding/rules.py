"""Rules on the logits of the next token: pytrees that the loop carries and applies in order, to all rows at once.

A rule is a frozen dataclass derived from `Rule` and registered with `jax.tree_util.register_dataclass`. The metadata of
each field states what the field belongs to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from whisper_nnx.runtime.programs import exportable
from whisper_nnx.text.special_tokens import SpecialTokens

NO_LIMIT = 1 << 20  # more timestamps than any vocabulary has, and more tokens than any context
LONGEST_LOOP = 16  # the most tokens of a repeated phrase

# What a field of a rule belongs to.
PER_ROW = {"belongs_to": "row"}  # [R,...], per sequence; reordered with the beams
PER_WINDOW = {"belongs_to": "window"}  # [R,...], equal for all beams or samples of a window
SHARED = {"belongs_to": "batch"}  # any shape, such as a mask [V]; for all rows
STATIC = {"belongs_to": "program", "static": True}  # hashable; another value compiles another program


@dataclass(frozen=True)
class Rule(ABC):
    """Changes the logits of R rows, depending on earlier tokens. `DecodingBatch.rules` lists the rules in use.

    Rows do not affect each other, and fields keep their shapes and dtypes.
    """

    @abstractmethod
    def apply(self, logits: jax.Array) -> jax.Array:
        """logits [R,V] of the next tokens -> [R,V]."""

    def append(self, token: jax.Array) -> Self:
        """Returns the rule after the next tokens [R]. Tokens after the end of a row are arbitrary."""
        return self

    def bonus(self, logits: jax.Array) -> jax.Array | None:
        """logits [R,V] after all rules -> what is added to them [R,V] when tokens are chosen; None: nothing.

        Log-probabilities do not include it; the ranking of beams and samples does.
        """
        return None

    def stops(self) -> jax.Array | None:
        """Rows [R] to stop without an end of text, as failed attempts; None if the rule never stops rows."""
        return None

    def repeat(self, group: int) -> Self:
        """Returns the rule for B * group rows instead of B windows."""
        return self.changed(lambda x: jnp.repeat(x, group, axis=0))

    def take(self, rows: jax.Array) -> Self:
        """Returns the rule in which row i continues the sequence of row rows[i], of the same window."""
        return self.changed(lambda x: x[rows], owners=("row",))

    def changed(self, change: Callable[..., Any], *others: Self, owners: Sequence[str] = ("row", "window")) -> Self:
        """Returns the rule with change(own, that of others...) in place of each array [R,...] of these owners."""
        for f in fields(self):
            if "belongs_to" not in f.metadata:
                where = f"{type(self).__name__}.{f.name}"
                raise TypeError(f"{where} does not state what it belongs to; use field(metadata=PER_ROW), for example")
        names = [f.name for f in fields(self) if f.metadata["belongs_to"] in owners]
        return replace(
            self,
            **{n: jax.tree.map(change, getattr(self, n), *(getattr(other, n) for other in others)) for n in names},
        )

    def by_rows(self, row: Any, other: Any) -> Self:
        """Returns the rule with `row` in place of each array [R,...], and `other` in place of the others."""
        owners = {f.name: f.metadata["belongs_to"] for f in fields(self)}
        placed = {"row": row, "window": row, "batch": other}
        return replace(self, **{name: placed[owner] for name, owner in owners.items() if owner in placed})


def is_timestamp(token: jax.Array, special: SpecialTokens) -> jax.Array:
    """Whether ids are timestamps. Ids above the last one are text added by a fine-tuned checkpoint."""
    return (token >= special.timestamp_begin) & (token <= special.timestamp_end)


def is_text(token: jax.Array, special: SpecialTokens) -> jax.Array:
    """Whether ids are text: neither timestamps nor other special tokens."""
    return (token < special.eot) | (token > special.timestamp_end)


def suppress(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Sets logits [R,V] to -inf where mask [V] or [R,V] is True."""
    return jnp.where(mask, -jnp.inf, logits)


@exportable
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SuppressRule(Rule):
    """Excludes the tokens of mask `always` [V], and those of `at_start` [V] as the first token of a row."""

    always: Any = field(metadata=SHARED)
    at_start: Any = field(metadata=SHARED)
    started: Any = field(metadata=PER_ROW)

    @classmethod
    def from_masks(cls, always: np.ndarray, at_start: np.ndarray, rows: int) -> SuppressRule:
        """The rule before the first token of R rows."""
        return cls(always, at_start, np.zeros(rows, bool))

    def apply(self, logits: jax.Array) -> jax.Array:
        return suppress(logits, self.always | (self.at_start & ~self.started[:, None]))

    def append(self, token: jax.Array) -> SuppressRule:
        return replace(self, started=jnp.ones_like(self.started))


@exportable
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TimestampRule(Rule):
    """Keeps timestamps in order, as openai-whisper's ApplyTimestampRules.

    Timestamps come in pairs (end of a segment, start of the next) except before the end of text, never decrease, and
    leave no segment empty; the first token is a timestamp. If all timestamps together are more probable than any
    other single token, the next token must be a timestamp.

    Attributes:
      enabled: [R], whether the rule applies.
      max_initial: [R], the latest first timestamp, in steps of 20 ms; NO_LIMIT for any.
      started: [R], whether there are tokens (sampled, or a prefix).
      last_was, penultimate_was: [R], whether these tokens were timestamps. A sequence of fewer than two tokens is
        treated as if a timestamp preceded it.
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
        """Creates the rule on the host for R rows that start with these ids (possibly none)."""
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
            text |= token == special.sot_lm  # where it is not suppressed, it marks speaker turns
        column = jax.tree.map(lambda x: x[:, None], self)

        opened = column.last_was & ~column.penultimate_was  # after an end timestamp: a start may follow, text may not
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


@exportable
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RepetitionRule(Rule):
    """Penalizes sampled text tokens, excludes those that would repeat an n-gram, and stops rows that loop.

    Attributes:
      penalty, ngram, repeats: [R], repetition_penalty, no_repeat_ngram_size and max_repeats (NO_LIMIT for none).
      tokens: [R,N], the prefix and sampled tokens, of which the first `length` [R] are valid.
      matched: [R,N], how many tokens before each of them equal the latest ones: it would continue an n-gram that
        occurred before.
      recent: [R,P], the latest sampled text tokens, without timestamps, newest first.
      runs: [R,P], how many consecutive ones, from the newest back, equal the one p+1 tokens earlier.
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
        """Creates the rule on the host for R rows that start with these ids (possibly none); room for `size` tokens."""
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
        """Rows [R] that end in a phrase that occurs `repeats` times in a row."""
        return (self.runs >= (self.repeats[:, None] - 1) * jnp.arange(1, LONGEST_LOOP + 1)).any(axis=1)


def _common_end(a: Sequence[int], b: Sequence[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[-1 - n] == b[-1 - n]:
        n += 1
    return n
