"""A text aligned with one window: how much each token looks at each position, and the path of the warping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from whisper_nnx.audio.features import POSITIONS_PER_SECOND, RecordingMel
from whisper_nnx.audio.loading import FRAMES_PER_SECOND, load_audio
from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.model.cache import KeysValues
from whisper_nnx.model.heads import Heads
from whisper_nnx.model.layers import audio_scores
from whisper_nnx.model.whisper import TextDecoder, Whisper
from whisper_nnx.runtime.devices import fetch
from whisper_nnx.timing.alignment_heads import alignment_heads as heads_of
from whisper_nnx.timing.token_times import align_tokens, alignment_matrix, padded_ids, text_ids
from whisper_nnx.transcription.attempts import DecodingResult
from whisper_nnx.transcription.windows import decode, encode_windows, tokenizer_of


@dataclass(frozen=True)
class Alignment:
    """Where in a window N tokens were spoken.

    matrix [N+1,T]: how much each token, and after them the end of the text, looks at each position of 20 ms, as
    standardized, filtered and averaged for the warping. begins_s [N+1]: where the cheapest path enters each row, in s
    from the recording's start. labels [N+1]: their text. probabilities [N]: of the tokens, among all text.
    """

    matrix: np.ndarray
    begins_s: np.ndarray
    labels: tuple[str, ...]
    probabilities: np.ndarray
    start_s: float = 0.0

    @property
    def path(self) -> np.ndarray:
        """The path's steps [P,2], (row, position), from the first to the last of both."""
        begins = np.round((self.begins_s - self.start_s) * POSITIONS_PER_SECOND).astype(int)
        ends = np.maximum(begins, np.append(begins[1:], self.matrix.shape[1]) - 1)
        steps = [np.arange(a, b + 1) for a, b in zip(begins, ends, strict=True)]
        return np.stack([np.repeat(np.arange(len(steps)), [*map(len, steps)]), np.concatenate(steps)], axis=1)


def align_window(
    model: Whisper,
    audio: Any,
    text: str | Sequence[int] | None = None,
    *,
    language: str | None = None,
    start_s: float = 0.0,
    alignment_heads: Heads | int | None = None,
) -> Alignment:
    """Aligns a text (or its ids) with the window of a recording that starts at start_s, as `transcribe` does.

    audio: whatever `load_audio` reads. text: None for what `decode` returns. language: None to detect it.
    alignment_heads: (layer, head) pairs, or n for the n top layers; None for the checkpoint's. Raises ValueError for a
    window without audio, a text that exceeds the model's context, and heads that do not exist.
    """
    tokenizer, config = tokenizer_of(model), model.config
    window_frames = 2 * config.max_source_positions
    mel = RecordingMel(load_audio(audio), config.num_mel_bins, window_frames)
    start_frame = round(start_s * FRAMES_PER_SECOND)
    n_frames = min(window_frames, mel.content_frames - start_frame)
    if start_frame < 0 or n_frames < 2:
        raise ValueError(f"start_s={start_s} is not within the {mel.content_frames / FRAMES_PER_SECOND} s of audio")
    encoded = encode_windows(model, mel.window(start_frame, n_frames)[None])
    if text is None or language is None:
        options = DecodingOptions(task="transcribe" if text is None else "lang_id", language=language)
        decoded = decode(model, encoded.features[0], options, without_timestamps=True)
        assert isinstance(decoded, DecodingResult)
        language, text = decoded.language, decoded.tokens if text is None else text
    ids = tokenizer.text_tokens(tokenizer.encode(" " + text.strip()) if isinstance(text, str) else text)

    start, eot, positions = tokenizer.sot_sequence(language, timestamps=False), tokenizer.special.eot, n_frames // 2
    heads, is_text = heads_of(config, alignment_heads), text_ids(tokenizer)
    texts: dict[str, Any] = {"starts": [start], "texts": [ids], "positions": [positions], "eot": eot}
    [(begins_s, probabilities)] = align_tokens(
        model.decoder, encoded.cross, config, **texts, heads=heads, is_text=is_text
    )
    padded, [length] = padded_ids([[*start, *ids, eot]], config, eot)
    matrix = fetch(_matrix(model.decoder, encoded.cross, padded, length, positions, heads))
    rows = matrix[len(start) - 1 : length - 1, :positions]
    labels = [
        piece if i == 0 else "…"  # a character of several tokens stands at the first of them
        for piece, group in zip(*tokenizer.split_tokens_on_unicode(ids), strict=True)
        for i in range(len(group))
    ]
    return Alignment(rows, np.array(begins_s) + start_s, (*labels, "(end)"), np.array(probabilities), start_s)


@partial(jax.jit, static_argnames="heads")
def _matrix(
    decoder: TextDecoder,
    cross: tuple[KeysValues, ...],
    ids: jax.Array,
    length: jax.Array,
    positions: jax.Array,
    heads: Heads,
) -> jax.Array:
    """ids [1,S] -> [S,T]; see `token_times`."""
    scores = audio_scores(decoder.hidden_states(ids, cross, heads).audio_queries, cross, heads)
    return alignment_matrix(scores[0], length, positions)
