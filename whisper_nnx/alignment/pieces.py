"""First pass of `align`: a recording of any length, cut into pieces that are transcribed independently."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from whisper_nnx.audio.features import POSITIONS_PER_SECOND, RecordingMel
from whisper_nnx.audio.loading import FRAMES_PER_SECOND, SAMPLE_RATE
from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.model.whisper import Whisper
from whisper_nnx.text.languages import language_or_none, to_language_code
from whisper_nnx.text.words import words_of
from whisper_nnx.timing.word_times import first_sample, pause_scores
from whisper_nnx.transcription.fallback import FallbackOptions
from whisper_nnx.transcription.windows import (
    decode_windows,
    detect_languages,
    encode_windows,
    most_probable,
    tokenizer_of,
)

QUIET_S = 0.3  # how long the quiet should be where a recording is cut


class RecognizedWord(NamedTuple):
    """A word of a piece's transcript, and the timestamps around it, in s from the beginning of the piece."""

    word: str
    start_s: float
    end_s: float


@dataclass
class Piece:
    """A part of a recording that fits a window: encoder output [T,D], language, and its words as transcribed.

    pauses [T']: see `pause_scores`, of as many positions as the part has.
    """

    start_frame: int
    n_frames: int
    features: jax.Array
    language: str
    pauses: np.ndarray
    recognized: list[RecognizedWord] = field(default_factory=list)
    no_speech_prob: float = 0.0

    @property
    def start_s(self) -> float:
        return self.start_frame / FRAMES_PER_SECOND


def transcribe_pieces(
    model: Whisper, samples: np.ndarray, language: str | None, task: str, batch_size: int
) -> list[Piece]:
    """Samples [N] -> pieces of at most one window, cut where it is quiet, each with its words by a greedy decoder.

    Each piece is decoded once: it is not a `Recording`, whose next window would start at the last timestamp.
    """
    tokenizer, frames = tokenizer_of(model), 2 * model.config.max_source_positions
    language = language_or_none(language)
    if language is not None and language not in tokenizer.languages:
        language = to_language_code(language)
    mel = RecordingMel(samples, model.config.num_mel_bins, frames)
    pieces, probs = [], []
    places = quiet_cuts(samples, mel.content_frames, frames)
    for chunk, rows in batches(places, batch_size):
        encoded = encode_windows(model, jnp.stack([mel.window(*place) for place in rows]))
        if language is None and tokenizer.is_multilingual:
            probs += detect_languages(model, encoded)[: len(chunk)]
        for i, (start_frame, n_frames) in enumerate(chunk):
            pauses = pause_scores(samples, first_sample(start_frame), max(1, n_frames // 2))
            pieces.append(Piece(start_frame, n_frames, encoded.features[i], language or "en", pauses))
    for piece, own in zip(pieces, probs, strict=False):  # a piece is likely to be in the others' language
        piece.language = most_probable({code: p * sum(other[code] for other in probs) for code, p in own.items()})
    for chunk, rows in batches(pieces, batch_size):
        encoded = encode_windows(model, jnp.stack([piece.features for piece in rows]))
        options = [DecodingOptions(language=piece.language, task=task) for piece in rows]
        results = decode_windows(model, encoded, options, [0] * len(rows))
        for piece, result in zip(chunk, results, strict=False):
            assert result is not None
            piece.no_speech_prob = result.no_speech_prob
            if not FallbackOptions().is_silence(result):
                piece.recognized = _recognized_words(model, result.tokens, piece)
    return pieces


def quiet_cuts(samples: np.ndarray, n_frames: int, longest: int) -> list[tuple[int, int]]:
    """(first frame, frames) of pieces of at most `longest` frames, each cut off where its second half is quietest."""
    power = np.square(samples[: n_frames * (SAMPLE_RATE // FRAMES_PER_SECOND)]).reshape(n_frames, -1).sum(axis=1)
    width = max(1, min(round(QUIET_S * FRAMES_PER_SECOND), longest // 10))
    loudness = np.convolve(power, np.ones(width), "same")
    cuts = [0]
    while n_frames - cuts[-1] > longest:
        first = cuts[-1] + (longest + 1) // 2
        cuts.append(first + int(np.argmin(loudness[first : cuts[-1] + longest])))
    return [(a, b - a) for a, b in zip(cuts, [*cuts[1:], n_frames], strict=True) if b > a]


def _recognized_words(model: Whisper, tokens: Sequence[int], piece: Piece) -> list[RecognizedWord]:
    """Words between each two timestamps."""
    tokenizer, recognized = tokenizer_of(model), list[RecognizedWord]()
    start, end_s = 0.0, piece.n_frames / FRAMES_PER_SECOND
    groups = [(is_time, list(ids)) for is_time, ids in groupby(tokens, tokenizer.is_timestamp)]
    for i, (is_time, ids) in enumerate(groups):
        times = [(token - tokenizer.special.timestamp_begin) / POSITIONS_PER_SECOND for token in ids] if is_time else []
        if is_time:
            start = times[-1]
            continue
        after = groups[i + 1][1][0] if i + 1 < len(groups) else None
        end = (after - tokenizer.special.timestamp_begin) / POSITIONS_PER_SECOND if after is not None else end_s
        text = words_of(tokenizer.decode(ids), tokenizer, piece.language)
        recognized += [RecognizedWord(word.text, start, max(start, end)) for word in text]
    return recognized


def batches(items: Sequence[Any], size: int) -> Iterator[tuple[Sequence[Any], Sequence[Any]]]:
    """(up to `size` items, the same filled up to `size` with the last), so that all batches have one shape."""
    for begin in range(0, len(items), size):
        chunk = items[begin : begin + size]
        yield chunk, [*chunk, *[chunk[-1]] * (size - len(chunk))]
