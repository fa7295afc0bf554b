"""Augmentation: speed, noise, gain; and synthetic non-speech audio."""

import numpy as np
import pytest

from whisper_nnx.training.augment import add_noise_and_gain, change_speed, draw_speed, noise, non_speech
from whisper_nnx.training.config import AugmentConfig


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def decibels(samples: np.ndarray) -> float:
    return 10 * np.log10(np.mean(np.square(samples, dtype=np.float64)) + 1e-20)


@pytest.mark.parametrize("speed", [0.8, 0.9137, 1.1, 1.25])
def test_times_are_divided_by_the_speed(speed):
    click = np.zeros(16_000, np.float32)
    click[9_000:9_010] = 1
    changed = change_speed(click, speed)
    assert changed.dtype == np.float32
    assert len(changed) == pytest.approx(16_000 / speed, abs=1)
    assert np.argmax(changed) == pytest.approx(9_005 / speed, abs=8)


def test_speed_1_returns_the_input():
    samples = noise("white", 1000, rng())
    assert change_speed(samples, 1.0) is samples
    assert draw_speed(AugmentConfig(), rng()) == 1.0


def test_speeds_are_within_their_limits():
    speeds = [draw_speed(AugmentConfig(speed=0.1), rng(seed)) for seed in range(200)]
    assert 0.9 <= min(speeds) < 0.92
    assert 1.08 < max(speeds) <= 1.1


@pytest.mark.parametrize(("kind", "per_octave"), [("white", 0.0), ("pink", -3.01)])
def test_noise_has_its_color_and_power(kind, per_octave):
    samples = noise(kind, 2**18, rng())
    assert samples.dtype == np.float32
    assert decibels(samples) == pytest.approx(0, abs=0.01)
    power = np.abs(np.fft.rfft(samples)) ** 2
    octaves = [10 * np.log10(power[2**n : 2 ** (n + 1)].mean()) for n in range(10, 17)]
    assert np.diff(octaves) == pytest.approx(per_octave, abs=0.35)


def test_the_noise_ratio_is_relative_to_the_nonzero_part():
    clip = np.zeros(32_000, np.float32)
    clip[:8_000] = 0.1 * noise("white", 8_000, rng(1))
    noisy = add_noise_and_gain(clip, AugmentConfig(noise_rate=1.0, noise_snr_db=(12.0, 12.0)), rng())
    assert decibels(clip[:8_000]) - decibels(noisy - clip) == pytest.approx(12, abs=0.1)
    assert noisy.dtype == np.float32


def test_gains_are_within_their_limit():
    clip = noise("white", 1_000, rng(1))
    gains = [decibels(add_noise_and_gain(clip, AugmentConfig(gain_db=6.0), rng(seed))) for seed in range(100)]
    assert -6.01 < min(gains) < -5
    assert 5 < max(gains) < 6.01


def test_disabled_augmentation_returns_the_input():
    clip = noise("white", 1_000, rng(1))
    assert np.array_equal(add_noise_and_gain(clip, AugmentConfig(), rng()), clip)
    silent = np.zeros(1_000, np.float32)
    assert not add_noise_and_gain(silent, AugmentConfig(noise_rate=1.0, gain_db=6.0), rng()).any()


def test_non_speech_is_silence_faint_noise_or_noise():
    made = [decibels(non_speech(4_000, rng(seed))) for seed in range(90)]
    assert max(made) <= -19.9
    for low, high in ((-201, -199), (-101, -60), (-60, -19.9)):  # -200: digital silence
        assert 15 <= sum(low <= loudness < high for loudness in made) <= 45


def test_equal_generators_give_equal_results():
    clip, config = noise("white", 1_000, rng(1)), AugmentConfig(gain_db=6.0, noise_rate=0.5)
    for seed in range(4):
        assert np.array_equal(add_noise_and_gain(clip, config, rng(seed)), add_noise_and_gain(clip, config, rng(seed)))
        assert np.array_equal(non_speech(100, rng(seed)), non_speech(100, rng(seed)))
