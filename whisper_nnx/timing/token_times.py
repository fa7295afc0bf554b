"""When each token was spoken: the alignment heads' cross-attention, and dynamic time warping. Jitted, batched.

Source: the reference's timing.py; warping: Giorgino 2009 (doi 10.18637/jss.v031.i07), with the simplest steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from whisper_nnx.cache import KeysValues
from whisper_nnx.config import WhisperConfig, released_alignment_heads
from whisper_nnx.features import POSITIONS_PER_SECOND
from whisper_nnx.kernels import kernel
from whisper_nnx.model import TextDecoder
from whisper_nnx.products import kernels_usable
from whisper_nnx.programs import program

if TYPE_CHECKING:
    from whisper_nnx.tokenizer import Tokenizer

Heads = tuple[tuple[int, int], ...]  # (layer, head) pairs
BUCKETS = (64, 128, 256)  # text positions; longer texts take all that the model has
MEDIAN_WIDTH = 7
# Exchanges that bring the median of seven numbers to their middle (Paeth 1990, in Graphics Gems). Sorting takes longer.
_TO_MEDIAN = (
    *((0, 5), (0, 3), (1, 6), (2, 4), (0, 1), (3, 5), (2, 6)),
    *((2, 3), (3, 6), (4, 5), (1, 4), (1, 3), (3, 4)),
)
_FAR = 1e30  # cost of what cannot be reached
DIAGONAL, DOWN, RIGHT = 0, 1, 2  # steps of the warping: next token and position, next token, next position


def alignment_heads(config: WhisperConfig, chosen: Heads | Sequence[Sequence[int]] | int | None = None) -> Heads:
    """The (layer, head) pairs by which words are timed.

    chosen: pairs; or n, for all heads of the n top layers; None: those of the checkpoint, or else of the released size
    of this shape, or else all heads of the upper half of the layers, with a warning. ValueError for those that do not
    exist.
    """
    if chosen is None:
        return config.alignment_heads or released_alignment_heads(config) or _upper_half(config)
    layers, heads = config.decoder_layers, config.decoder_attention_heads
    if isinstance(chosen, int):
        if not 1 <= chosen <= layers:
            raise ValueError(f"alignment_heads={chosen} top layers, but the decoder has {layers}; choose 1 to {layers}")
        return _heads_from(config, layers - chosen)
    pairs = tuple((int(layer), int(head)) for layer, head in chosen)
    if not pairs:
        raise ValueError(
            "alignment_heads=() times no words; name at least one (layer, head), or None for the usual ones"
        )
    for layer, head in pairs:
        if not (0 <= layer < layers and 0 <= head < heads):
            raise ValueError(
                f"alignment head ({layer}, {head}) does not exist; choose layers below {layers} and heads below {heads}"
            )
    return tuple(sorted(set(pairs)))  # attention scores come layer by layer; the order means nothing


@lru_cache
def _upper_half(config: WhisperConfig) -> Heads:
    """Cached, so that a model is warned of once."""
    instead = (
        f"all heads of the upper {config.decoder_layers - config.decoder_layers // 2} decoder layers time the words"
    )
    warnings.warn(
        f"this checkpoint names no alignment heads: {instead}; find_alignment_heads() measures better ones",
        stacklevel=3,
    )
    return _heads_from(config, config.decoder_layers // 2)


def _heads_from(config: WhisperConfig, layer: int) -> Heads:
    return tuple((i, h) for i in range(layer, config.decoder_layers) for h in range(config.decoder_attention_heads))


def parse_heads(text: str) -> Heads | int:
    """Alignment heads as they are written on a command line: "3", the three top layers; "1:0,2:1", layer:head pairs."""
    try:
        if ":" not in text:
            return int(text)
        pairs = [pair.split(":") for pair in text.split(",")]
        return tuple((int(layer), int(head)) for layer, head in pairs)
    except ValueError:
        fix = "write layer:head pairs such as 1:0,2:1, or how many of the top layers"
        raise ValueError(f"alignment heads {text!r} cannot be read; {fix}") from None


@lru_cache
def text_ids(tokenizer: Tokenizer) -> np.ndarray:
    """bool [V]: which ids are text: those below the end of text, and what fine-tunes add behind the timestamps."""
    special, is_text = tokenizer.special, np.array(tokenizer.known_ids)
    is_text[special.eot : special.timestamp_end + 1] = False
    is_text.flags.writeable = False  # shared by all callers
    return is_text


def bucket(length: int, max_positions: int) -> int:
    """The padded length for that many ids."""
    return min(next((b for b in BUCKETS if b >= length), max_positions), max_positions)


@program(static_argnames=("heads",))
def token_times(
    decoder: TextDecoder,
    cross: tuple[KeysValues, ...],
    ids: jax.Array,
    length: jax.Array,
    rows: jax.Array,
    n_rows: jax.Array,
    positions: jax.Array,
    is_text: jax.Array,
    heads: Heads,
) -> tuple[jax.Array, jax.Array]:
    """Aligns the texts of B windows with their sound.

    ids [B,S]: start sequence, text, end of text; padded on the right. length [B]: without the padding. rows [B,R]: what
    lies along the sound, in order: the token that follows the id of that index; n_rows [B] of them count. positions
    [B]: of the sound, 20 ms each. is_text [V]: which ids are.
    Returns (begin [B,R] of each row, in positions; probability [B,R] of its token among all text).
    """
    hidden, scores = decoder.alignment_scores(ids, cross, heads)
    at = jnp.clip(rows, 0, ids.shape[1] - 1)
    logits = jnp.where(is_text, decoder.logits(jnp.take_along_axis(hidden, at[..., None], axis=1)), -jnp.inf)
    following = jnp.take_along_axis(ids, jnp.minimum(at + 1, ids.shape[1] - 1), axis=1)
    chosen = jnp.take_along_axis(logits, following[..., None], axis=-1)[..., 0]
    probability = jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1))
    matrix = jax.vmap(alignment_matrix)(scores, length, positions)
    likeness = jnp.take_along_axis(matrix, at[..., None], axis=1)
    return jax.vmap(first_positions)(-likeness, n_rows, positions), probability


@program(static_argnames=("heads",))
def row_begins(
    decoder: TextDecoder,
    cross: tuple[KeysValues, ...],
    ids: jax.Array,
    length: jax.Array,
    rows: jax.Array,
    n_rows: jax.Array,
    positions: jax.Array,
    pauses: jax.Array,
    sound: jax.Array,
    within: jax.Array,
    straying: jax.Array,
    heads: Heads,
) -> jax.Array:
    """As `token_times`, where pauses lie between words, and without probabilities -> begin [B,R] of each row.

    rows [B,R] of -1 are pauses, which take up what no token attends to; pauses [B,T]: the likeness of one to the sound;
    sound [B,T]: factors of the tokens' likeness, from 0, where nothing can be spoken, to 1.
    within [B,R,2]: first position and end, outside of which a row loses `straying` with each position.
    """
    _, scores = decoder.alignment_scores(ids, cross, heads)
    matrix = jax.vmap(alignment_matrix)(scores, length, positions)
    at = jnp.clip(rows, 0, ids.shape[1] - 1)
    likeness = jnp.take_along_axis(matrix, at[..., None], axis=1)
    likeness = jnp.where(likeness > 0, likeness * sound[:, None], likeness)
    likeness = jnp.where((rows >= 0)[..., None], likeness, pauses[:, None])
    t = jnp.arange(likeness.shape[-1])
    likeness -= straying * jnp.maximum(0, jnp.maximum(within[..., :1] - t, t + 1 - within[..., 1:]))
    return jax.vmap(first_positions)(-likeness, n_rows, positions)


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
    half, size = MEDIAN_WIDTH // 2, x.shape[-1]
    if size <= half:
        return x
    known = jnp.where(jnp.isnan(x), jnp.inf, x)  # what is no number counts as the largest
    left = known[..., 1 : half + 1][..., ::-1]
    right = jax.lax.dynamic_slice_in_dim(known, n - 1 - half, half, axis=-1)[..., ::-1]
    mirrored = jnp.concatenate([left, known, left], axis=-1)
    mirrored = jax.lax.dynamic_update_slice_in_dim(mirrored, right, n + half, axis=-1)
    near = [mirrored[..., i : i + size] for i in range(MEDIAN_WIDTH)]
    for i, j in _TO_MEDIAN:
        near[i], near[j] = jnp.minimum(near[i], near[j]), jnp.maximum(near[i], near[j])
    return jnp.where(n > half, jnp.where(near[half] == jnp.inf, jnp.nan, near[half]), x)


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


def first_positions(cost: jax.Array, n: jax.Array, m: jax.Array) -> jax.Array:
    """Dynamic time warping over cost [N,M], of which [n,m] counts -> [N]: where the cheapest path enters each row.

    Where the other two steps tie, the path goes right, even if that costs more: so does the reference's.
    """
    counts = jnp.stack([jnp.asarray(n, jnp.int32), jnp.asarray(m, jnp.int32)])
    return (warp_in_order if kernels_usable() else warp_by_diagonals)(cost, counts)


def warp_by_diagonals(cost: jax.Array, counts: jax.Array) -> jax.Array:
    """`first_positions` for counts [2] = n, m: a scan over the anti-diagonals, each held as a vector over the rows."""
    rows, columns = cost.shape
    row = jnp.arange(rows + 1)  # row and column 0 stand before the matrix
    column = jnp.arange(2, rows + columns + 1)[:, None] - row  # of each anti-diagonal [N+M-1,N+1]
    inside = (row >= 1) & (column >= 1) & (column <= columns)
    on_diagonal = cost[jnp.maximum(row - 1, 0), jnp.clip(column - 1, 0, columns - 1)]
    unreachable = _Sum(jnp.full(rows + 1, _FAR), jnp.zeros(rows + 1))

    def diagonal(carry: tuple[_Sum, _Sum], here: tuple[jax.Array, jax.Array]) -> tuple[tuple[_Sum, _Sum], jax.Array]:
        up_left, left = carry
        cost, inside = here
        up = _Sum(*jnp.roll(jnp.stack(left), 1, axis=1))  # each row sees the one above it
        is_diagonal = up_left.less(up) & up_left.less(left)
        is_down = up.less(up_left) & up.less(left)
        best = up_left.where(is_diagonal, up.where(is_down, left))
        step = jnp.where(is_diagonal, DIAGONAL, jnp.where(is_down, DOWN, RIGHT))
        return (up, best.plus(cost).where(inside, unreachable)), step.astype(jnp.int8)

    start = (unreachable._replace(high=unreachable.high.at[1].set(0.0)), unreachable)
    _, steps = jax.lax.scan(diagonal, start, (on_diagonal, inside))

    def back(carry: tuple[jax.Array, jax.Array, jax.Array], _: None) -> tuple[tuple, None]:
        i, j, first = carry
        first = jnp.where((row == i) & (i > 0), j - 1, first)
        step = jnp.where(j == 0, DOWN, jnp.where(i == 0, RIGHT, steps[jnp.maximum(i + j - 2, 0), i]))
        going = (i > 0) | (j > 0)
        i = jnp.where(going & (step != RIGHT), i - 1, i)
        j = jnp.where(going & (step != DOWN), j - 1, j)
        return (i, j, first), None

    end = (*counts, jnp.zeros(rows + 1, jnp.int32))
    (_, _, first), _ = jax.lax.scan(back, end, None, length=rows + columns)
    return first[1:]


warp_in_order = kernel("FirstPositions")(warp_by_diagonals)  # on a CPU: row by row, with sums of 64 bits


def align_tokens(
    decoder: TextDecoder,
    cross: tuple[KeysValues, ...],
    config: WhisperConfig,
    starts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    eot: int,
    positions: Sequence[int],
    *,
    heads: Heads | None = None,
    is_text: np.ndarray | None = None,
) -> list[tuple[list[float], list[float]]]:
    """For each window's text tokens [N]: begins [N+1] in s, the last being the end, and probabilities [N].

    starts: their start sequences, with `<|notimestamps|>`. positions: of each window's sound. heads: None for those of
    the config. is_text [V]: see `text_ids`; by default the ids below `eot`. Texts that exceed the context raise
    ValueError.
    """
    ids, length = padded_ids([[*start, *text, eot] for start, text in zip(starts, texts, strict=True)], config, eot)
    n_rows = np.array([len(text) + 1 for text in texts], np.int32)
    rows = np.array([len(start) - 1 for start in starts], np.int32)[:, None] + np.arange(ids.shape[1], dtype=np.int32)
    is_text = np.arange(config.vocab_size) < eot if is_text is None else is_text
    count, heads = np.array(positions, np.int32), heads or alignment_heads(config)
    begin, probability = jax.device_get(token_times(decoder, cross, ids, length, rows, n_rows, count, is_text, heads))
    timed = zip(texts, (begin / POSITIONS_PER_SECOND).tolist(), probability.tolist(), strict=True)
    return [(begins_s[: len(text) + 1], probs[: len(text)]) for text, begins_s, probs in timed]


def padded_ids(sequences: Sequence[Sequence[int]], config: WhisperConfig, eot: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids [B,S], padded to the bucket of the longest; length [B]); ValueError for one that exceeds the context."""
    length = np.array([len(sequence) for sequence in sequences], np.int32)
    if length.max() > (most := config.max_target_positions):
        raise ValueError(f"a text of {length.max()} tokens exceeds the context of {most}; split it")
    ids = np.full((len(sequences), bucket(int(length.max()), most)), eot, np.int32)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    return ids, length
