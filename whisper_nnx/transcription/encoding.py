"""Encodes the next windows of recordings, in groups, and starts the detection of their languages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from whisper_nnx.audio.features import RecordingMel
from whisper_nnx.model.whisper import Whisper
from whisper_nnx.transcription.rows import Prepared, Row
from whisper_nnx.transcription.windows import NO_FEATURES, EncodedWindows, start_detection

Encode = Callable[[Whisper, jax.Array], EncodedWindows]


def encode_rows(model: Whisper, rows: Sequence[Row | None], encode: Encode) -> list[Prepared]:
    """Encodes the windows of a group of rows; None, at its end: the last window again. Waits for nothing.

    A window that is encoded already, which is alone in its group, is not encoded again.
    """
    own = [row for row in rows if row is not None]
    encoded = _known(own[0]) if len(own) == 1 else None
    if encoded is None:
        encoded = encode(model, _mel([row or own[-1] for row in rows]))
    encoded = encoded._replace(features=NO_FEATURES)  # it takes memory and is not used here
    detects = any(row.live.recording.options.multilingual or row.live.on_language for row in own)
    languages = start_detection(model, encoded) if detects else None
    return [Prepared(row, encoded, at, languages) for at, row in enumerate(own)]


def is_known(row: Row) -> bool:
    """Whether its window is encoded already."""
    return row.window.place in row.live.encoded


def _known(row: Row) -> EncodedWindows | None:
    known, row.live.encoded = row.live.encoded, {}
    return known.get(row.window.place)


def _mel(rows: Sequence[Row]) -> Any:
    """Log-mel [B,M,T]."""
    places = [(row.live.mel, *row.window.place) for row in rows]
    if len(places) > 1 and all(isinstance(mel, RecordingMel) for mel, *_ in places):
        return RecordingMel.windows(places)
    windows = [mel.window(*place) for mel, *place in places]
    return jnp.stack(windows) if len(windows) > 1 else windows[0][None]
