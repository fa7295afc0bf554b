"""When each token was spoken: the alignment heads' cross-attention, and dynamic time warping. Jitted, batched.

Source: the reference's timing.py; warping: Giorgino 2009 (doi 10.18637/jss.v031.i07), with the simplest steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from whisper_nnx.cache import KeysValues
from whisper_nnx.config import WhisperConfig
from whisper_nnx.features import POSITIONS_PER_SECOND
from whisper_nnx.model import TextDecoder

BUCKETS = (64, 128, 256)  # text positions; longer texts take all that the model has
MEDIAN_WIDTH = 7
DIAGONAL, DOWN, RIGHT = 0, 1, 2  # steps of the warping: next token and position, next token, next position


def alignment_heads(config: WhisperConfig) -> tuple[tuple[int, int], ...]:
    """The checkpoint's (layer, head) pairs; where it names none, all heads of the upper half of the layers."""
    if config.alignment_heads:
        return config.alignment_heads
    upper = range(config.decoder_layers // 2, config.decoder_layers)
    return tuple((layer, head) for layer in upper for head in range(config.decoder_attention_heads))


def bucket(length: int, max_positions: int) -> int:
    """The padded length for that many ids."""
    return min(next((b for b in BUCKETS if b >= length), max_positions), max_positions)


@partial(jax.jit, static_argnames=("heads", "n_text"))
def token_times(
    decoder: TextDecoder,
    cross: tuple[KeysValues, ...],
    ids: jax.Array,
    length: jax.Array,
    first: jax.Array,
    positions: jax.Array,
    heads: tuple[tuple[int, int], ...],
    n_text: int,
) -> tuple[jax.Array, jax.Array]:
    """Aligns the texts of B windows with their sound.

    ids [B,S]: start sequence, text, end of text; padded on the right. length [B]: without the padding. first [B]: index
    of the id that the first text token follows. positions [B]: of the sound, 20 ms each. n_text: ids below are text.
    Returns (begin [B,S], in positions, of the token that follows id `first + i`; probability [B,S] of that token among
    all text). Entries behind the text mean nothing.
    """
    hidden, scores = decoder.alignment_scores(ids, cross, heads)
    rows = jnp.minimum(first[:, None] + jnp.arange(ids.shape[1]), ids.shape[1] - 1)

    logits = decoder.logits(jnp.take_along_axis(hidden, rows[..., None], axis=1))[..., :n_text]
    following = jnp.take_along_axis(ids, jnp.minimum(rows + 1, ids.shape[1] - 1), axis=1)
    chosen = jnp.take_along_axis(logits, jnp.minimum(following, n_text - 1)[..., None], axis=-1)[..., 0]
    probability = jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1))

    matrix = jax.vmap(alignment_matrix)(scores, length, positions)
    matrix = jnp.take_along_axis(matrix, rows[..., None], axis=1)
    begin = jax.vmap(first_positions)(-matrix, length - 1 - first, positions)
    return begin, probability


def alignment_matrix(scores: jax.Array, length: jax.Array, positions: jax.Array) -> jax.Array:
    """scores [A,S,T] before the softmax, of which `length` ids and `positions` positions count -> likeness [S,T].

    Softmax over the positions, standardised over the ids, median-filtered over the positions, averaged over the heads.
    """
    token = (jnp.arange(scores.shape[1]) < length)[:, None]
    sound = jnp.arange(scores.shape[2]) < positions
    # Standardising does not care for the scale: the largest weight at each position is made 1, or else those in long
    # silences, 1e-38 and less, would be flushed to zero.
    logs = jax.nn.log_softmax(scores, axis=-1, where=sound)
    weights = jnp.exp(logs - jnp.max(logs, axis=1, where=token & sound, initial=-jnp.inf, keepdims=True))
    mean = jnp.sum(weights, axis=1, keepdims=True, where=token) / length
    variance = jnp.sum(jnp.square(weights - mean), axis=1, keepdims=True, where=token) / length
    standard = jnp.where(token & sound, (weights - mean) / jnp.sqrt(variance), 0.0)
    return median_filter(standard, positions).mean(axis=0)


def median_filter(x: jax.Array, n: jax.Array) -> jax.Array:
    """x [...,T], of whose last axis n entries count, mirrored at both of their ends; as it is where n is too small."""
    half = MEDIAN_WIDTH // 2
    at = jnp.arange(x.shape[-1])[:, None] + jnp.arange(-half, half + 1)
    at = jnp.abs(at)
    at = jnp.clip(jnp.where(at >= n, 2 * (n - 1) - at, at), 0, x.shape[-1] - 1)
    return jnp.where(n > half, jnp.sort(x[..., at], axis=-1)[..., half], x)


class _Sum(NamedTuple):
    """A sum in twice float32's precision: high + low. The costs of two paths often differ by less than float32 sees."""

    high: jax.Array
    low: jax.Array

    def plus(self, x: jax.Array) -> _Sum:
        """Knuth's exact addition of high and x, whose error joins low."""
        high = self.high + x
        added = high - self.high
        low = self.low + ((self.high - (high - added)) + (x - added))
        total = high + low
        return _Sum(total, low - (total - high))

    def less(self, other: _Sum) -> jax.Array:
        return (self.high < other.high) | ((self.high == other.high) & (self.low < other.low))

    def where(self, condition: jax.Array, other: _Sum) -> _Sum:
        return _Sum(*(jnp.where(condition, a, b) for a, b in zip(self, other, strict=True)))

    def next_row(self) -> _Sum:
        """Each row sees the one above it."""
        return _Sum(*(jnp.roll(x, 1) for x in self))


def first_positions(cost: jax.Array, n: jax.Array, m: jax.Array) -> jax.Array:
    """Dynamic time warping over cost [N,M], of which [n,m] counts -> [N]: where the cheapest path enters each row.

    A scan over the anti-diagonals, each held as a vector over the rows. Where the other two steps tie, the path goes
    right, even if that costs more: so does the reference's.
    """
    rows, columns = cost.shape
    row = jnp.arange(rows + 1)  # row and column 0 stand before the matrix
    unreachable = _Sum(jnp.full(rows + 1, 1e30), jnp.zeros(rows + 1))

    def diagonal(carry: tuple[_Sum, _Sum], d: jax.Array) -> tuple[tuple[_Sum, _Sum], jax.Array]:
        before_last, left = carry
        up_left, up = before_last.next_row(), left.next_row()
        is_diagonal = up_left.less(up) & up_left.less(left)
        is_down = up.less(up_left) & up.less(left)
        best = up_left.where(is_diagonal, up.where(is_down, left))
        column = d - row
        inside = (row >= 1) & (column >= 1) & (column <= columns)
        here = cost[jnp.maximum(row - 1, 0), jnp.clip(column - 1, 0, columns - 1)]
        step = jnp.where(is_diagonal, DIAGONAL, jnp.where(is_down, DOWN, RIGHT))
        return (left, best.plus(here).where(inside, unreachable)), step.astype(jnp.int8)

    start = (unreachable._replace(high=unreachable.high.at[0].set(0.0)), unreachable)
    _, steps = jax.lax.scan(diagonal, start, jnp.arange(2, rows + columns + 1))

    def back(carry: tuple[jax.Array, jax.Array, jax.Array], _: None) -> tuple[tuple, None]:
        i, j, first = carry
        first = jnp.where((row == i) & (i > 0), j - 1, first)
        step = jnp.where(j == 0, DOWN, jnp.where(i == 0, RIGHT, steps[jnp.maximum(i + j - 2, 0), i]))
        going = (i > 0) | (j > 0)
        i = jnp.where(going & (step != RIGHT), i - 1, i)
        j = jnp.where(going & (step != DOWN), j - 1, j)
        return (i, j, first), None

    end = (jnp.asarray(n, jnp.int32), jnp.asarray(m, jnp.int32), jnp.zeros(rows + 1, jnp.int32))
    (_, _, first), _ = jax.lax.scan(back, end, None, length=rows + columns)
    return first[1:]


def align_tokens(
    decoder: TextDecoder,
    cross: tuple[KeysValues, ...],
    config: WhisperConfig,
    starts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    eot: int,
    positions: Sequence[int],
) -> list[tuple[list[float], list[float]]]:
    """For each window's text tokens [N]: begins [N+1] in s, the last being the end, and probabilities [N].

    starts: their start sequences, with `<|notimestamps|>`. positions: of each window's sound. Texts that exceed the
    context raise ValueError.
    """
    sequences = [[*start, *text, eot] for start, text in zip(starts, texts, strict=True)]
    longest = max(map(len, sequences))
    if longest > config.max_target_positions:
        raise ValueError(f"a text of {longest} tokens exceeds the context of {config.max_target_positions}; split it")
    ids = np.full((len(texts), bucket(longest, config.max_target_positions)), eot, np.int32)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    length = np.array([len(sequence) for sequence in sequences], np.int32)
    first = np.array([len(start) - 1 for start in starts], np.int32)
    count = np.array(positions, np.int32)
    begin, probability = jax.device_get(
        token_times(decoder, cross, ids, length, first, count, alignment_heads(config), eot)
    )
    rows = zip(texts, (begin / POSITIONS_PER_SECOND).tolist(), probability.tolist(), strict=True)
    return [(begins_s[: len(text) + 1], probs[: len(text)]) for text, begins_s, probs in rows]
