"""Encodes and decodes ggml's number formats: floats, or blocks of 32 integers that share a float16 scale.

A block of n-bit integers q represents q * scale + minimum or, without a minimum, (q - 2^(n-1)) * scale.
Rounding follows ggml's own quantizer, so that the bytes are equal (ggml-quants.c: `quantize_row_*_ref`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

BLOCK = 32  # numbers in a block


@dataclass(frozen=True)
class Storage:
    """A number format, with its ids in tensor headers (`tensor_id`) and file headers (`file_id`)."""

    name: str
    tensor_id: int
    file_id: int
    bits: int
    has_minimum: bool = False

    @property
    def is_quantized(self) -> bool:
        return self.bits < 16

    @cached_property
    def dtype(self) -> np.dtype:
        """Dtype of a number or of a block. The fifth bits of all numbers are stored separately."""
        if not self.is_quantized:
            return np.dtype(f"<f{self.bits // 8}")
        fields = [("scale", "<f2"), ("minimum", "<f2"), ("fifth_bits", "u1", BLOCK // 8), ("q", "u1", BLOCK // 2)]
        kept = {"scale", "q", *(["minimum"] if self.has_minimum else []), *(["fifth_bits"] if self.bits == 5 else [])}
        if self.bits == 8:
            fields[-1] = ("q", "i1", BLOCK)
        return np.dtype([field for field in fields if field[0] in kept])

    def count(self, shape: tuple[int, ...]) -> int:
        """Returns the number of `dtype` items of an array. Raises ValueError unless rows are whole blocks."""
        if not self.is_quantized:
            return int(np.prod(shape, dtype=object))  # Python integers, which a hostile header cannot overflow
        if not shape or shape[-1] % BLOCK:
            raise ValueError(f"rows of {shape[-1:]} numbers cannot be stored as {self.name}, in blocks of {BLOCK}")
        return int(np.prod(shape, dtype=object)) // BLOCK

    @np.errstate(invalid="ignore", over="ignore")  # a damaged file's scale may be infinite
    def decode(self, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Decodes an array of `dtype` to this shape; quantized numbers become float32."""
        if not self.is_quantized:
            return stored.reshape(shape)
        q = stored["q"]
        if self.bits < 8:  # the first half of the block in the low bits, the second in the high ones
            q = np.concatenate([q & 15, q >> 4], axis=-1)
        if self.bits == 5:
            q |= np.unpackbits(stored["fifth_bits"], axis=-1, bitorder="little") << 4
        values = q.astype(np.float32)
        if not (self.has_minimum or self.bits == 8):
            values -= 1 << (self.bits - 1)
        values *= stored["scale"].astype(np.float32)[:, None]
        if self.has_minimum:
            values += stored["minimum"].astype(np.float32)[:, None]
        return values.reshape(shape)

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Encodes numbers to an array of `dtype`. Raises ValueError if float16 overflows, and as `count` does."""
        stored = np.empty(self.count(values.shape), self.dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            if self.is_quantized:
                self._quantize(values.astype(np.float32).reshape(-1, BLOCK), stored)
                stored_floats = [stored["scale"], *([stored["minimum"]] if self.has_minimum else [])]
            else:
                stored[:] = values.reshape(-1)
                stored_floats = [stored]
        if not all(np.isfinite(floats).all() for floats in stored_floats):
            raise ValueError(f"numbers as large as {np.abs(values).max()} cannot be stored as {self.name}")
        return stored

    def _quantize(self, x: np.ndarray, stored: np.ndarray) -> None:
        """Quantizes x [blocks, BLOCK], float32, into `stored`."""
        top = np.float32((1 << self.bits) - 1)
        if self.has_minimum:
            zero = x.min(axis=1, keepdims=True)
            scale = (x.max(axis=1, keepdims=True) - zero) / top
            stored["minimum"] = zero[:, 0]
            shift = np.float32(0.5)
        else:
            peak = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)
            zero = np.float32(0)
            scale = np.abs(peak) / np.float32(127) if self.bits == 8 else peak / np.float32(-(1 << (self.bits - 1)))
            shift = np.float32(0.5 + (1 << (self.bits - 1)))
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
        stored["scale"] = scale[:, 0]
        scaled = (x - zero) * inverse
        if self.bits == 8:
            stored["q"] = np.copysign(np.floor(np.abs(scaled) + np.float32(0.5)), scaled)
            return
        q = np.minimum(scaled + shift, top).astype(np.uint8)
        if self.bits == 5:
            stored["fifth_bits"] = np.packbits(q >> 4, axis=1, bitorder="little")
        first, second = q[:, : BLOCK // 2], q[:, BLOCK // 2 :]
        stored["q"] = (first & 15) | (second & 15) << 4


STORAGES = (
    Storage("f32", 0, 0, 32),
    Storage("f16", 1, 1, 16),
    Storage("q4_0", 2, 2, 4),
    Storage("q4_1", 3, 3, 4, has_minimum=True),
    Storage("q5_0", 6, 8, 5),
    Storage("q5_1", 7, 9, 5, has_minimum=True),
    Storage("q8_0", 8, 7, 8),
)
