"""Waveform augmentation (speed, noise, gain) and synthetic non-speech audio."""

from __future__ import annotations

import numpy as np

from whisper_nnx.audio.loading import SAMPLE_RATE
from whisper_nnx.training.config import AugmentConfig


def draw_speed(config: AugmentConfig, rng: np.random.Generator) -> float:
    """Draws a speed factor."""
    return float(rng.uniform(1 - config.speed, 1 + config.speed)) if config.speed else 1.0


def change_speed(waveform: np.ndarray, speed: float) -> np.ndarray:
    """Resamples [N] to about [N / speed]: t s moves to t / speed, and the pitch changes too."""
    import soxr

    return waveform if speed == 1.0 else soxr.resample(waveform, speed * SAMPLE_RATE, SAMPLE_RATE)


def noise(kind: str, length: int, rng: np.random.Generator) -> np.ndarray:
    """Returns noise [length], float32, of mean square 1; kind: "white" or "pink" (power falls with frequency)."""
    samples: np.ndarray = rng.standard_normal(length, dtype=np.float32)
    if kind == "pink":
        spectrum = np.fft.rfft(samples)
        samples = np.fft.irfft(spectrum / np.sqrt(np.arange(1, len(spectrum) + 1, dtype=np.float32)), length)
    return samples / max(_rms(samples), 1e-9)


def add_noise_and_gain(waveform: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Adds noise and gain to a waveform [N] as configured.

    The signal-to-noise ratio is relative to the nonzero samples, so gaps and padding do not lower the noise.
    """
    waveform = waveform.astype(np.float32, copy=False)
    if rng.random() < config.noise_rate and waveform.any():
        level = _rms(waveform[waveform != 0]) * 10 ** (-rng.uniform(*config.noise_snr_db) / 20)
        waveform = waveform + np.float32(level) * noise(_kind(rng), len(waveform), rng)
    if config.gain_db:
        waveform = waveform * np.float32(10 ** (rng.uniform(-config.gain_db, config.gain_db) / 20))
    return waveform


def non_speech(length: int, rng: np.random.Generator) -> np.ndarray:
    """Returns [length] float32: digital silence, faint noise (below -60 dB full scale) or noise (up to -20 dB)."""
    loudest = (None, -60.0, -20.0)[rng.integers(3)]
    if loudest is None:
        return np.zeros(length, np.float32)
    level = np.float32(10 ** (rng.uniform(loudest - 40, loudest) / 20))
    return level * noise(_kind(rng), length, rng)


def _kind(rng: np.random.Generator) -> str:
    return "pink" if rng.random() < 0.5 else "white"


def _rms(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(samples))))
