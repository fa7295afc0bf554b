"""Audio without speech, made up and taken from the pauses of recordings."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.speech import music, pink
from benchmarks.systems import SAMPLE_RATE

_MARGIN_S = 0.15  # that is left out on both sides of a word


def speechless(seconds: float, recordings: Sequence[Path] = (), seed: int = 0) -> dict[str, np.ndarray]:
    """Returns audio without speech by name.

    recordings: the pauses between their words (`NAME.words.json` beside each), joined and repeated to this length.
    """
    source, size = np.random.default_rng(seed), int(seconds * SAMPLE_RATE)
    t = np.arange(size) / SAMPLE_RATE
    swell = 0.6 + 0.4 * np.sin(2 * np.pi * t / 7)
    pitches = source.choice([220, 440, 1000, 3000], size // 8000 + 1).repeat(8000)[:size]
    signals = {
        "silence": np.zeros(size),
        "white noise": 0.03 * source.standard_normal(size),
        "pink noise": 0.05 * pink(size, source),
        "brown noise": 0.05 * pink(size, source, power=2),
        "hum": 0.05 * sum(np.sin(2 * np.pi * 50 * k * t + k) / k for k in range(1, 8)),
        "music": music(t, source),
        "clicks": _impulses(size, source, 2, 16) + 1e-4 * source.standard_normal(size),
        "tones": 0.1 * np.sin(2 * np.pi * np.cumsum(pitches) / SAMPLE_RATE),
        "chords": 0.04 * swell * sum(np.sin(2 * np.pi * 220 * r * t) for r in (1, 1.26, 1.498, 2)),
        "beeps": 0.2 * np.sin(2 * np.pi * 1000 * t) * (t % 1.0 < 0.1),
        "rain": 0.1 * swell * _impulses(size, source, 400, 40) + 0.01 * source.standard_normal(size),
        "wind": 0.1 * swell**2 * pink(size, source, power=2),
        "babble": _babble(size, source),
    }
    if recordings:
        signals["pauses"] = np.resize(np.concatenate([_pauses(path) for path in recordings]), size)
    return {name: signal.astype(np.float32) for name, signal in signals.items()}


def _impulses(size: int, source: np.random.Generator, per_second: float, decay: float) -> np.ndarray:
    """Impulses at random times that decay within some samples."""
    n = int(per_second * size / SAMPLE_RATE)
    signal = np.zeros(size)
    signal[source.integers(0, size, n)] = source.uniform(-0.8, 0.8, n)
    return np.convolve(signal, np.exp(-np.arange(5 * decay) / decay))[:size]


def _babble(size: int, source: np.random.Generator) -> np.ndarray:
    """Noise with the spectrum of speech, and its rhythm of four syllables a second, of six voices at once."""
    syllable = SAMPLE_RATE // 4
    signal = np.zeros(size)
    for _ in range(6):
        level = source.gamma(1.0, 1.0, size // syllable + 2)
        signal += np.interp(np.arange(size) / syllable, np.arange(len(level)), level) * source.standard_normal(size)
    spectrum, hz = np.fft.rfft(signal), np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    shape = np.where(hz < 100, 0, 1 / (1 + (hz / 500) ** 1.5))
    signal = np.fft.irfft(spectrum * shape, size)
    return 0.05 * signal / signal.std()


def _pauses(path: Path) -> np.ndarray:
    from whisper_nnx.audio.loading import load_audio

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        audio = load_audio(path)
    words = json.loads(path.with_suffix(".words.json").read_text())["words"]
    edges = [0.0, *(t for w in words for t in (w["start"] - _MARGIN_S, w["end"] + _MARGIN_S)), len(audio) / SAMPLE_RATE]
    spans = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b > a]
    return np.concatenate([audio[int(a * SAMPLE_RATE) : int(b * SAMPLE_RATE)] for a, b in spans])
