"""Synthetic recordings for training tests, each identified by its constant level."""

import io
import wave
from itertools import pairwise
from pathlib import Path

import numpy as np

RATE = 16_000


def level(number: int) -> float:
    """The level of recording `number`."""
    return (number + 1) / 64


def steady(number: int, seconds: float, rate: int = RATE) -> bytes:
    """Makes a WAV file of constant `level(number)`."""
    return wav(np.full(round(seconds * rate), level(number)), rate)


def wav(samples: np.ndarray, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((samples * 2**15).astype("<i2").tobytes())
    return file.getvalue()


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def stretches(waveform: np.ndarray) -> list[tuple[int, int, float]]:
    """Returns (first, end, level) of all parts that are not silent."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0.0], waveform, [0.0]])))
    return [(int(a), int(b), float(waveform[a])) for a, b in pairwise(edges) if waveform[a]]
