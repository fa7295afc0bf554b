"""`EncoderCache`: the encoder's results of recent windows, found by their content."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import jax
import numpy as np

from whisper_nnx.model.whisper import Whisper
from whisper_nnx.transcription.windows import EncodedWindows, encode_windows


class EncoderCache:
    """Encodes windows as `encode_windows` does, unless the same one is still there: a retry skips the encoder.

    Args:
      limit_bytes: what all results together may take; those that were used least recently are discarded.
    """

    def __init__(self, limit_bytes: int):
        self._limit = limit_bytes
        self._found: OrderedDict[bytes, EncodedWindows] = OrderedDict()
        self._bytes = 0
        self.hits = 0

    def __call__(self, model: Whisper, windows: jax.Array) -> EncodedWindows:
        """windows: log-mel [B,M,T], always of the same model."""
        if not self._limit:
            return encode_windows(model, windows)
        key = hashlib.blake2b(np.asarray(windows).tobytes()).digest()
        if key in self._found:
            self._found.move_to_end(key)
            self.hits += 1
            return self._found[key]
        encoded = encode_windows(model, windows)
        self._found[key] = encoded
        self._bytes += _size(encoded)
        while self._bytes > self._limit:
            self._bytes -= _size(self._found.popitem(last=False)[1])
        return encoded


def _size(encoded: EncodedWindows) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(encoded))
