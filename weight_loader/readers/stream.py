"""A file of numbers, texts and arrays, read one after the other."""

from __future__ import annotations

import os
import struct
from typing import Any, BinaryIO

import numpy as np

from weight_loader.folder import CheckpointError


class Stream:
    """Little-endian reads that never allocate more than the file holds, whatever its length fields say.

    Every method raises CheckpointError, in one line that begins with `where`, for what is not there.
    """

    def __init__(self, file: BinaryIO, where: str):
        self._file, self.where = file, where
        self._left = os.fstat(file.fileno()).st_size - file.tell()

    @property
    def left(self) -> int:
        """How many bytes are still to be read."""
        return self._left

    def tell(self) -> int:
        return self._file.tell()

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.where} {what}; it is damaged or no Whisper's, get it anew")

    def skip(self, n_bytes: int, what: str) -> None:
        self._take(n_bytes, what)
        self._file.seek(n_bytes, os.SEEK_CUR)

    def bytes(self, n_bytes: int, what: str) -> bytes:
        self._take(n_bytes, what)
        return self._file.read(n_bytes)

    def numbers(self, kinds: str, what: str) -> tuple[Any, ...]:
        """kinds: the letters of `struct`."""
        return struct.unpack("<" + kinds, self.bytes(struct.calcsize("<" + kinds), what))

    def text(self, n_bytes: int, what: str) -> str:
        raw = self.bytes(n_bytes, what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.error(f"has {what} that is no UTF-8 before byte {self.tell()}") from error

    def array(self, dtype: np.dtype, count: int, what: str) -> np.ndarray:
        """[count]"""
        self._take(count * dtype.itemsize, what)
        return np.fromfile(self._file, dtype, count)

    def _take(self, n_bytes: int, what: str) -> None:
        if not 0 <= n_bytes <= self._left:
            raise self.error(f"has {self._left} bytes from {self.tell()} on, expected {n_bytes} with {what}")
        self._left -= n_bytes
