"""Keeps the samples of waiting recordings on disk where they would take too much memory."""

from __future__ import annotations

import tempfile
import threading

import numpy as np


class Spool:
    """Samples in memory up to a limit; what exceeds it is in temporary files, which have no name and vanish with it.

    Args:
      limit_bytes: of all samples in memory.
    """

    def __init__(self, limit_bytes: int):
        self._limit, self._used = limit_bytes, 0
        self._lock = threading.Lock()

    def keep(self, samples: np.ndarray) -> tuple[np.ndarray, int]:
        """The samples, in memory or mapped from a file, and the bytes of memory to give to `release` later."""
        with self._lock:
            if self._used + samples.nbytes <= self._limit:
                self._used += samples.nbytes
                return samples, samples.nbytes
        if not samples.size:
            return samples, 0
        with tempfile.TemporaryFile(prefix="whisper-nnx-") as file:
            samples.tofile(file)
            return np.memmap(file, samples.dtype, "r", shape=samples.shape), 0

    def release(self, n_bytes: int) -> None:
        with self._lock:
            self._used -= n_bytes
