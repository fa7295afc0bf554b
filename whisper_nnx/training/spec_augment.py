"""SpecAugment (Park et al. 2019): masks bands of the log-mel spectrogram on the device, inside the step."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from whisper_nnx.audio.loading import FRAMES_PER_SECOND
from whisper_nnx.training.config import AugmentConfig


def spec_augment(log_mel: jax.Array, key: jax.Array, config: AugmentConfig) -> jax.Array:
    """Sets `time_masks` and `frequency_masks` bands of each row of log_mel [B,M,T] to the row's mean.

    Widths are uniform from 0 to the widest inclusive, starts are uniform where the band fits. Without masks, the input
    is returned.
    """
    _, mels, frames = log_mel.shape
    time_key, frequency_key = jax.random.split(key)
    longest = round(config.time_mask_s * FRAMES_PER_SECOND)
    masked = jnp.zeros((), bool)
    if config.time_masks:
        masked = masked | _bands(time_key, len(log_mel), config.time_masks, longest, frames)[:, None, :]
    if config.frequency_masks:
        bands = _bands(frequency_key, len(log_mel), config.frequency_masks, config.frequency_mask_bins, mels)
        masked = masked | bands[:, :, None]
    if masked.ndim == 0:
        return log_mel
    return jnp.where(masked, log_mel.mean(axis=(1, 2), keepdims=True), log_mel)


def _bands(key: jax.Array, rows: int, bands: int, widest: int, size: int) -> jax.Array:
    """Draws bands; returns a mask, bool [rows,size], that is True inside any of them."""
    width_key, start_key = jax.random.split(key)
    width = jax.random.randint(width_key, (rows, bands, 1), 0, min(widest, size) + 1)
    start = jax.random.randint(start_key, (rows, bands, 1), 0, size - width + 1)
    at = jnp.arange(size)
    return ((start <= at) & (at < start + width)).any(axis=1)
