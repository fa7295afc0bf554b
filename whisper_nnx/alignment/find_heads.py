"""Which cross-attention heads follow the audio in time: measured, for checkpoints that do not name them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from whisper_nnx.alignment.align import Reader
from whisper_nnx.alignment.pieces import transcribe_pieces
from whisper_nnx.audio.features import POSITIONS_PER_SECOND
from whisper_nnx.audio.loading import FRAMES_PER_SECOND, SAMPLE_RATE, load_audio
from whisper_nnx.model.cache import KeysValues
from whisper_nnx.model.heads import Heads
from whisper_nnx.model.layers import audio_scores
from whisper_nnx.model.whisper import TextDecoder, Whisper
from whisper_nnx.ops import first_positions
from whisper_nnx.runtime.devices import fetch
from whisper_nnx.text.words import words_of
from whisper_nnx.timing.token_times import AlignedText, alignment_matrix, padded_ids
from whisper_nnx.transcription.windows import tokenizer_of

Times = Sequence[Mapping[str, Any]]  # of each word of a text, in order: "start" and "end" in s


def find_alignment_heads(
    model: Whisper,
    recordings: Iterable[tuple[Any, str] | tuple[Any, str, Times]],
    n: int = 6,
    *,
    short_pieces: bool = False,
    language: str | None = None,
    sampling_rate: int | None = None,
) -> Heads:
    """The n (layer, head) pairs that time words best, the best one first, for `WhisperConfig.alignment_heads`.

    With true times, heads are ranked by the median error of the starts and ends of words; without, by the share of
    their attention along the best path through it. Some minutes of ordinary speech suffice, in any spelling.

    Args:
      recordings: (audio, its text), of at most 30 s each, or (audio, text, the true times of its words).
      short_pieces: rank heads for `align` and refine_word_times=True, not for the configuration (ordinary tokens).

    Raises ValueError for recordings that are too long or too few or times that do not match; AudioError, OSError.
    """
    config, tokenizer = model.config, tokenizer_of(model)
    heads = tuple((i, h) for i in range(config.decoder_layers) for h in range(config.decoder_attention_heads))
    if not 1 <= n <= len(heads):
        raise ValueError(f"n={n} heads, but the decoder has {len(heads)}; choose 1 to {len(heads)}")
    errors: list[np.ndarray] = []  # of each recording [A, 2 words], in s
    attentions: list[np.ndarray] = []  # [A]
    for number, (audio, text, *times) in enumerate(recordings):
        samples, window_s = load_audio(audio, sampling_rate), 2 * config.max_source_positions / FRAMES_PER_SECOND
        duration_s = len(samples) / SAMPLE_RATE
        if not (1 / FRAMES_PER_SECOND <= duration_s <= window_s and text.strip()):
            has = f"{duration_s:.2f} s and the text {text[:40]!r}"
            raise ValueError(f"recording {number} has {has}; give some words, and at most {window_s:g} s")
        [piece] = transcribe_pieces(model, samples, language, "transcribe", 1)
        words = [word.text for word in words_of(text, tokenizer, piece.language)]
        reader = Reader(model, [piece], words, "transcribe", 1)
        layout = reader.layout(0, reader.spellings(np.arange(len(words)))[0], short_pieces)
        ids, length = padded_ids([layout.ids], config, tokenizer.special.eot)
        tokens = np.flatnonzero(layout.rows >= 0)
        rows = np.pad(layout.rows[tokens], (0, ids.shape[1] - len(tokens)))
        counts = np.array([len(tokens)]), np.array([len(piece.pauses)])
        aligned = AlignedText(ids, length, rows[None], *counts)
        begin, attention = fetch(head_paths(model.decoder, reader.cross([0]), aligned, heads))
        attentions.append(attention)
        if times:
            true_s = np.array([(word["start"], word["end"]) for word in times[0]], float)
            if len(true_s) != len(words):
                raise ValueError(
                    f"recording {number} has {len(words)} words, but times of {len(true_s)}; give one each"
                )
            bounds = np.searchsorted(tokens, np.array(layout.words))
            errors.append(np.abs(begin[:, bounds] / POSITIONS_PER_SECOND - true_s).reshape(len(heads), -1))
    if not attentions or (errors and len(errors) < len(attentions)):
        raise ValueError(
            f"{len(attentions)} recordings, {len(errors)} with times; give at least one, and times for all"
        )
    if errors:
        order = np.argsort(np.median(np.concatenate(errors, axis=1), axis=1), kind="stable")
    else:
        order = np.argsort(-np.mean(attentions, axis=0), kind="stable")
    return tuple(heads[i] for i in order[:n])


@partial(jax.jit, static_argnames="heads")
def head_paths(
    decoder: TextDecoder, cross: tuple[KeysValues, ...], text: AlignedText, heads: Heads
) -> tuple[jax.Array, jax.Array]:
    """As `token_times` of one window (B = 1), but for each of A heads by itself.

    Returns:
      the start [A,R] of each row, in positions, and the mean attention [A] along the path.
    """
    scores = audio_scores(decoder.hidden_states(text.ids, cross, heads).audio_queries, cross, heads)
    length, rows, n_rows, positions = text.length[0], text.rows[0], text.n_rows[0], text.positions[0]

    def path(own: jax.Array) -> tuple[jax.Array, jax.Array]:
        matrix = alignment_matrix(own[None], length, positions)[rows]
        begin = first_positions(-matrix, n_rows, positions)
        row, t = jnp.arange(len(rows)), jnp.arange(matrix.shape[1])
        end = jnp.where(row + 1 < n_rows, jnp.roll(begin, -1), positions)
        on_path = (t >= begin[:, None]) & (t < end[:, None]) & (row < n_rows)[:, None]
        return begin, jnp.sum(matrix, where=on_path) / positions

    return jax.lax.map(path, scores[0])
