"""When each token was spoken: the alignment heads' cross-attention, and dynamic time warping. Jitted, batched.

Source: the reference's timing.py. The warping itself is in `ops/warping.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from whisper_nnx.audio.features import POSITIONS_PER_SECOND
from whisper_nnx.model.cache import KeysValues
from whisper_nnx.model.config import WhisperConfig
from whisper_nnx.model.heads import Heads
from whisper_nnx.model.layers import Rows, audio_scores
from whisper_nnx.model.whisper import TextDecoder
from whisper_nnx.ops import first_positions
from whisper_nnx.runtime.devices import fetch
from whisper_nnx.runtime.programs import program
from whisper_nnx.timing.alignment_heads import alignment_heads

if TYPE_CHECKING:
    from whisper_nnx.text.tokenizer import Tokenizer


BUCKETS = (64, 128, 256)  # text positions; longer texts take all that the model has
MEDIAN_WIDTH = 7
_CHUNK_BYTES = 2**27  # of the scores and logits that are in memory at a time
# Exchanges that bring the median of seven numbers to their middle (Paeth 1990, in Graphics Gems). Sorting takes longer.
_TO_MEDIAN = (
    *((0, 5), (0, 3), (1, 6), (2, 4), (0, 1), (3, 5), (2, 6)),
    *((2, 3), (3, 6), (4, 5), (1, 4), (1, 3), (3, 4)),
)


@lru_cache
def text_ids(tokenizer: Tokenizer) -> np.ndarray:
    """bool [V]: which ids are text: those below the end of text, and those above the timestamps (of fine-tuning)."""
    special, is_text = tokenizer.special, np.array(tokenizer.known_ids)
    is_text[special.eot : special.timestamp_end + 1] = False
    is_text.flags.writeable = False  # shared by all callers
    return is_text


def bucket(length: int, max_positions: int) -> int:
    """The padded length for that many ids."""
    return min(next((b for b in BUCKETS if b >= length), max_positions), max_positions)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AlignedText:
    """Known texts of B windows, and which of their tokens are placed along the audio.

    Attributes:
      ids: [B,S], start sequence, text, end of text; padded on the right.
      length: [B], ids without the padding.
      rows: [B,R], what is placed, in order: the token that follows the id of this index; -1: a pause (`row_begins`).
      n_rows: [B], how many of them count.
      positions: [B], encoder positions of 20 ms that contain audio.
    """

    ids: Any
    length: Any
    rows: Any
    n_rows: Any
    positions: Any


@program(static_argnames=("heads",), rows=("cross", "text"))
def token_times(
    decoder: TextDecoder, cross: tuple[KeysValues, ...], text: AlignedText, is_text: jax.Array, heads: Heads
) -> tuple[jax.Array, jax.Array]:
    """Aligns the texts of B windows with their audio; is_text [V]: which ids are text.

    Returns:
      the start [B,R] of each row, in positions, and the probability [B,R] of its token among all text.
    """
    hidden, queries, *_ = decoder.hidden_states(text.ids, cross, heads)

    def place(rows: Rows) -> tuple[jax.Array, jax.Array]:
        own = jax.tree.map(rows, text)
        at = jnp.clip(own.rows, 0, own.ids.shape[1] - 1)
        states = jnp.take_along_axis(rows(hidden), at[..., None], axis=1)
        logits = jnp.where(is_text, decoder.logits(states), -jnp.inf)
        following = jnp.take_along_axis(own.ids, jnp.minimum(at + 1, own.ids.shape[1] - 1), axis=1)
        chosen = jnp.take_along_axis(logits, following[..., None], axis=-1)[..., 0]
        probability = jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1))
        attention = _attention(audio_scores(queries, cross, heads, rows), own, at)
        return jax.vmap(first_positions)(-attention, own.n_rows, own.positions), probability

    return _in_chunks(place, text.ids.shape, len(heads) * _audio_positions(cross) + len(is_text))


def _attention(scores: jax.Array, text: AlignedText, at: jax.Array) -> jax.Array:
    """scores [B,A,S,T] -> `alignment_matrix` of the ids at [B,R]: [B,R,T]."""
    matrix = jax.vmap(alignment_matrix)(scores, text.length, text.positions)
    return jnp.take_along_axis(matrix, at[..., None], axis=1)


def _audio_positions(cross: tuple[KeysValues, ...]) -> int:
    return cross[0].positions or cross[0].k.shape[-2]


def _in_chunks(place: Callable[[Rows], Any], shape: tuple[int, int], numbers: int) -> Any:
    """place(rows), which computes for some rows of a batch, for all of them, so that it takes little memory at a time.

    Args:
      place: is given a function that chooses its rows of an array [batch,...].
      shape: number of rows, and ids of a row.
      numbers: float32 that it computes for an id.
    """
    batch, length = shape
    most = max(1, _CHUNK_BYTES // (4 * length * numbers))
    chunks = next(n for n in range(1, batch + 1) if batch % n == 0 and batch // n <= most)
    if chunks == 1:
        return place(lambda x: x)

    def chunk(i: jax.Array) -> Any:
        """Rows i, i + chunks, ...: of a batch on several devices, as many on each."""
        return place(lambda x: jax.lax.dynamic_index_in_dim(jnp.reshape(x, (-1, chunks, *x.shape[1:])), i, 1, False))

    placed = jax.lax.map(chunk, jnp.arange(chunks))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch, *x.shape[2:]), placed)


@program(static_argnames=("heads",), rows=("cross", "text", "pauses", "speech", "within"))
def row_begins(
    decoder: TextDecoder,
    cross: tuple[KeysValues, ...],
    text: AlignedText,
    *,
    pauses: jax.Array,
    speech: jax.Array,
    within: jax.Array,
    distance_cost: jax.Array,
    heads: Heads,
) -> jax.Array:
    """As `token_times`, with pauses between words and without probabilities -> the start [B,R] of each row.

    Args:
      decoder: of the model.
      cross: cross-attention of the windows.
      text: pauses among its rows take up what no token attends to.
      pauses: [B,T], how well a pause fits each position, on the scale of the attention.
      speech: [B,T], factors of the tokens' attention, from 0 (nothing can be spoken) to 1.
      within: [B,R,2], first position and end of where each row is expected.
      distance_cost: subtracted for each position between a row and where it is expected.
      heads: (layer, head) pairs.
    """
    queries = decoder.hidden_states(text.ids, cross, heads).audio_queries

    def place(rows: Rows) -> jax.Array:
        own, expected = jax.tree.map(rows, text), rows(within)
        at = jnp.clip(own.rows, 0, own.ids.shape[1] - 1)
        attention = _attention(audio_scores(queries, cross, heads, rows), own, at)
        attention = jnp.where(attention > 0, attention * rows(speech)[:, None], attention)
        attention = jnp.where((own.rows >= 0)[..., None], attention, rows(pauses)[:, None])
        t = jnp.arange(attention.shape[-1])
        attention -= distance_cost * jnp.maximum(0, jnp.maximum(expected[..., :1] - t, t + 1 - expected[..., 1:]))
        return jax.vmap(first_positions)(-attention, own.n_rows, own.positions)

    return _in_chunks(place, text.ids.shape, len(heads) * _audio_positions(cross))


def alignment_matrix(scores: jax.Array, length: jax.Array, positions: jax.Array) -> jax.Array:
    """scores [A,S,T] before the softmax, of which `length` ids and `positions` positions count -> attention [S,T].

    Softmax over the positions, standardized over the ids, median-filtered over the positions, averaged over the heads.
    """
    token = (jnp.arange(scores.shape[1]) < length)[:, None]
    audio = jnp.arange(scores.shape[2]) < positions
    # Standardizing is independent of the scale: the largest weight at each position becomes 1. Otherwise those in long
    # silences, 1e-38 and less, would be flushed to zero.
    logs = jax.nn.log_softmax(scores, axis=-1, where=audio)
    weights = jnp.exp(logs - jnp.max(logs, axis=1, where=token & audio, initial=-jnp.inf, keepdims=True))
    mean = jnp.sum(weights, axis=1, keepdims=True, where=token) / length
    variance = jnp.sum(jnp.square(weights - mean), axis=1, keepdims=True, where=token) / length
    standard = jnp.where(token & audio, (weights - mean) / jnp.sqrt(variance), 0.0)
    return median_filter(standard, positions).mean(axis=0)


def median_filter(x: jax.Array, n: jax.Array) -> jax.Array:
    """x [...,T], of whose last axis n entries count, mirrored at both of their ends; as it is where n is too small."""
    half, size = MEDIAN_WIDTH // 2, x.shape[-1]
    if size <= half:
        return x
    known = jnp.where(jnp.isnan(x), jnp.inf, x)  # NaN counts as the largest
    left = known[..., 1 : half + 1][..., ::-1]
    right = jax.lax.dynamic_slice_in_dim(known, n - 1 - half, half, axis=-1)[..., ::-1]
    mirrored = jnp.concatenate([left, known, left], axis=-1)
    mirrored = jax.lax.dynamic_update_slice_in_dim(mirrored, right, n + half, axis=-1)
    near = [mirrored[..., i : i + size] for i in range(MEDIAN_WIDTH)]
    for i, j in _TO_MEDIAN:
        near[i], near[j] = jnp.minimum(near[i], near[j]), jnp.maximum(near[i], near[j])
    return jnp.where(n > half, jnp.where(near[half] == jnp.inf, jnp.nan, near[half]), x)


def align_tokens(
    decoder: TextDecoder,
    cross: tuple[KeysValues, ...],
    config: WhisperConfig,
    *,
    starts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    positions: Sequence[int],
    eot: int,
    heads: Heads | None = None,
    is_text: np.ndarray | None = None,
) -> list[tuple[list[float], list[float]]]:
    """For each window's text tokens [N]: starts [N+1] in s, the last being the end, and probabilities [N].

    Args:
      decoder: of the model.
      cross: cross-attention of the windows.
      config: of the model.
      starts: start sequence of each window, with `<|notimestamps|>`.
      texts: text tokens of each window.
      positions: encoder positions of each window that contain audio.
      eot: id of the end of text.
      heads: (layer, head) pairs; None: those of the config.
      is_text: [V], see `text_ids`; by default the ids below `eot`.

    Raises:
      ValueError: a text that exceeds the context.
    """
    ids, length = padded_ids([[*start, *text, eot] for start, text in zip(starts, texts, strict=True)], config, eot)
    aligned = AlignedText(
        ids,
        length,
        rows=np.array([len(start) - 1 for start in starts], np.int32)[:, None]
        + np.arange(ids.shape[1], dtype=np.int32),
        n_rows=np.array([len(text) + 1 for text in texts], np.int32),
        positions=np.array(positions, np.int32),
    )
    is_text = np.arange(config.vocab_size) < eot if is_text is None else is_text
    times = token_times(decoder, cross, aligned, is_text, heads or alignment_heads(config))
    begin, probability = fetch(times)
    timed = zip(texts, (begin / POSITIONS_PER_SECOND).tolist(), probability.tolist(), strict=True)
    return [(begins_s[: len(own) + 1], probs[: len(own)]) for own, begins_s, probs in timed]


def padded_ids(sequences: Sequence[Sequence[int]], config: WhisperConfig, eot: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids [B,S], padded to the bucket of the longest; length [B]); ValueError for one that exceeds the context."""
    length = np.array([len(sequence) for sequence in sequences], np.int32)
    if length.max() > (most := config.max_target_positions):
        raise ValueError(f"a text of {length.max()} tokens exceeds the context of {most}; split it")
    ids = np.full((len(sequences), bucket(int(length.max()), most)), eot, np.int32)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    return ids, length
