"""Sequential reads of numbers, text and arrays from a file."""

from __future__ import annotations

import os
import struct
from typing import Any, BinaryIO

import numpy as np

from weight_loader.folder import CheckpointError


class Stream:
    """Little-endian reads that never allocate more than the file's size, whatever its length fields claim.

    Every method raises CheckpointError, in one line that starts with `where`, if the data is missing.
    """

    def __init__(self, file: BinaryIO, where: str):
        self._file, self.where = file, where
        self._left = os.fstat(file.fileno()).st_size - file.tell()

    @property
    def left(self) -> int:
        """Number of unread bytes."""
        return self._left

    def tell(self) -> int:
        return self._file.tell()

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.where} {what}; it is damaged or not a Whisper checkpoint, download it again")

    def skip(self, n_bytes: int, what: str) -> None:
        self._take(n_bytes, what)
        self._file.seek(n_bytes, os.SEEK_CUR)

    def bytes(self, n_bytes: int, what: str) -> bytes:
        self._take(n_bytes, what)
        return self._file.read(n_bytes)

    def numbers(self, kinds: str, what: str) -> tuple[Any, ...]:
        """Reads numbers; kinds: format characters of `struct`."""
        return struct.unpack("<" + kinds, self.bytes(struct.calcsize("<" + kinds), what))

    def text(self, n_bytes: int, what: str) -> str:
        raw = self.bytes(n_bytes, what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.error(f"has {what} that is not UTF-8 before byte {self.tell()}") from error

    def array(self, dtype: np.dtype, count: int, what: str) -> np.ndarray:
        """Reads an array [count]."""
        self._take(count * dtype.itemsize, what)
        return np.fromfile(self._file, dtype, count)

    def _take(self, n_bytes: int, what: str) -> None:
        if not 0 <= n_bytes <= self._left:
            raise self.error(f"has {self._left} bytes from {self.tell()}, expected {n_bytes} with {what}")
        self._left -= n_bytes
