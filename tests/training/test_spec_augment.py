"""SpecAugment."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.small import quick_compilation  # noqa: F401
from whisper_nnx.training.config import AugmentConfig
from whisper_nnx.training.spec_augment import spec_augment

MEL = jnp.asarray(np.random.default_rng(0).normal(size=(64, 20, 100)), jnp.float32)
KEY = jax.random.key(3)


def masked(**config) -> np.ndarray:
    changed = np.asarray(spec_augment(MEL, KEY, AugmentConfig(**config)))
    return changed != np.asarray(MEL)


def test_without_masks_the_input_is_returned():
    assert spec_augment(MEL, KEY, AugmentConfig()) is MEL


def test_a_time_mask_covers_all_bins_of_its_frames():
    at = masked(time_masks=1, time_mask_s=0.1)
    np.testing.assert_array_equal(at, np.broadcast_to(at[:, :1], at.shape))
    widths = at[:, 0].sum(axis=1)
    assert widths.min() == 0
    assert widths.max() == 10
    assert (np.abs(np.diff(at[:, 0], axis=1)).sum(axis=1) <= 2).all()  # one band


def test_a_frequency_mask_covers_all_frames_of_its_bins():
    at = masked(frequency_masks=1, frequency_mask_bins=4)
    np.testing.assert_array_equal(at, np.broadcast_to(at[:, :, :1], at.shape))
    assert set(at[:, :, 0].sum(axis=1)) == {0, 1, 2, 3, 4}


def test_every_place_can_be_masked():
    at = masked(time_masks=8, frequency_masks=4)
    assert at.any(axis=0).all()


def test_masked_values_are_the_rows_mean():
    at = masked(time_masks=2)
    changed = np.asarray(spec_augment(MEL, KEY, AugmentConfig(time_masks=2)))
    means = np.broadcast_to(MEL.mean(axis=(1, 2), keepdims=True), MEL.shape)
    np.testing.assert_allclose(changed[at], means[at], rtol=1e-6)


def test_masks_are_limited_to_the_spectrogram():
    assert masked(time_masks=1, time_mask_s=50.0, frequency_masks=1, frequency_mask_bins=99).any()
