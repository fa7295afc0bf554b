"""Rules on the logits of the next token, as pure functions over all rows at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from whisper_nnx.config import SpecialTokens

NO_LIMIT = 1 << 20  # more timestamps than any vocabulary has


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
    text = (token < special.eot) | (token > special.timestamp_end)
    column = jax.tree.map(lambda x: x[:, None], history)

    opened = column.last_was & ~column.penultimate_was  # an end was just written: its start may follow, text may not
    lowest = column.last + jnp.where(opened, 0, 1)
    forbidden = token == special.no_timestamps
    forbidden |= opened & text
    forbidden |= column.last_was & column.penultimate_was & timestamp
    forbidden |= timestamp & (token < lowest)
    forbidden |= ~column.begun & (~timestamp | (token > special.timestamp_begin + max_initial[:, None]))
    logits = suppress(logits, forbidden)

    all_timestamps = jax.nn.logsumexp(logits, axis=-1, where=timestamp, keepdims=True)
    best_other = jnp.max(logits, axis=-1, where=~timestamp, initial=-jnp.inf, keepdims=True)
    return suppress(logits, (all_timestamps > best_other) & ~timestamp)
