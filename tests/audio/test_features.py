"""Properties and cost of the log-mel spectrogram. For its values see tests/reference/test_features.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.small import quick_compilation  # noqa: F401
from whisper_nnx.audio import features
from whisper_nnx.audio.features import (
    CHUNK_LENGTH_S,
    HOP_LENGTH,
    N_FRAMES,
    RecordingMel,
    log_mel_spectrogram,
    mel_filters,
)

SAMPLE_RATE = 16_000
CHUNK = CHUNK_LENGTH_S * SAMPLE_RATE


def noise(n_samples: int, seed: int = 0) -> np.ndarray:
    """Noise that swells and fades, so that recordings and their parts differ in loudness."""
    random = np.random.default_rng(seed)
    loudness = 0.2 * (1.1 + np.sin(np.arange(n_samples) / 9000 + seed))
    return (loudness * random.normal(size=n_samples)).clip(-1, 1).astype(np.float32)


@pytest.mark.parametrize("n_mels", [1, 40, 80, 128])
def test_mel_filters_are_ordered_triangles_of_area_one(n_mels):
    filters = mel_filters(n_mels)
    assert filters.shape == (n_mels, 201)
    assert (filters >= 0).all()
    wide = (filters > 0).sum(axis=1) > 12  # narrower ones cover too few bins to measure their area
    np.testing.assert_allclose(filters[wide].sum(axis=1) * 40, 1, rtol=0.02)  # bins are 40 Hz apart
    centres = (filters * np.arange(201)).sum(axis=1) / filters.sum(axis=1)
    assert (np.diff(centres) >= 0).all()


def test_a_tone_is_loudest_in_the_filter_of_its_frequency():
    for bin_index in (10, 25, 60, 150):
        tone = np.sin(2 * np.pi * bin_index * 40 * np.arange(SAMPLE_RATE) / SAMPLE_RATE).astype(np.float32)
        mel = log_mel_spectrogram(tone, 128)
        assert mel[:, 50].argmax() == mel_filters(128)[:, bin_index].argmax()


def test_there_is_one_frame_for_each_10_ms():
    for n_samples, padding in [(160, 0), (319, 0), (320, 0), (16_000, 80), (100, 60), (50, CHUNK)]:
        assert log_mel_spectrogram(noise(n_samples), padding=padding).shape == (80, (n_samples + padding) // HOP_LENGTH)


def test_a_batch_equals_its_rows():
    batch = np.stack([noise(40_000, seed) * 10.0**-seed for seed in range(6)]).reshape(2, 3, -1)
    mel = log_mel_spectrogram(batch, padding=480)
    assert mel.shape == (2, 3, 80, 253)
    for i, j in np.ndindex(2, 3):
        np.testing.assert_allclose(mel[i, j], log_mel_spectrogram(batch[i, j], padding=480), atol=1e-6)
    np.testing.assert_allclose(jax.vmap(lambda row: log_mel_spectrogram(row, padding=480))(batch[0]), mel[0], atol=1e-6)


def test_a_long_recording_equals_the_same_samples_frame_by_frame():
    long = noise(100 * SAMPLE_RATE)
    mel = log_mel_spectrogram(long)  # four blocks
    for start in (0, 2400, 2499, 2500, 7498, 9900):
        piece = np.pad(long, 200, mode="reflect")[start * HOP_LENGTH :][: 100 * HOP_LENGTH + 240]
        window = 0.5 - 0.5 * np.cos(np.arange(400) * np.pi / 200)
        frames = np.lib.stride_tricks.sliding_window_view(piece, 400)[::HOP_LENGTH] * window
        power = np.abs(np.fft.rfft(frames.astype(np.float64))) ** 2
        expected = np.log10(np.maximum(mel_filters(80).astype(np.float64) @ power.T, 1e-10))
        expected = np.maximum(expected / 4 + 1, mel.max() - 2)
        np.testing.assert_allclose(mel[:, start : start + 100], expected[:, :100], atol=2e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, jnp.bfloat16])
def test_the_result_is_float32_for_every_float(dtype):
    samples = (np.round(noise(16_000) * 128) / 128).astype(dtype)  # exact in each
    mel = log_mel_spectrogram(jnp.asarray(samples))
    assert mel.dtype == jnp.float32
    np.testing.assert_array_equal(mel, log_mel_spectrogram(samples.astype(np.float32)))


def test_silence_gives_a_constant_and_a_zero_gradient():
    silence = jnp.zeros(16_000)
    np.testing.assert_allclose(log_mel_spectrogram(silence), -1.5)
    assert not jax.grad(lambda x: log_mel_spectrogram(x).sum())(silence).any()


def test_the_gradient_equals_the_slope():
    samples, direction = noise(8_000), noise(8_000, seed=1)
    weights = np.random.default_rng(2).normal(size=(80, 50)).astype(np.float32)

    def weighted(step):
        return (log_mel_spectrogram(samples + step * direction) * weights).sum()

    slope = (weighted(1e-3) - weighted(-1e-3)) / 2e-3
    np.testing.assert_allclose(jax.grad(weighted)(0.0), slope, rtol=0.02)


@pytest.mark.parametrize("backwards", [False, True])
def test_memory_grows_with_the_samples_and_not_with_the_spectra(backwards):
    def temporary_bytes(seconds: int) -> int:
        f = jax.grad(lambda x: log_mel_spectrogram(x).sum()) if backwards else log_mel_spectrogram
        shape = jax.ShapeDtypeStruct((seconds * SAMPLE_RATE,), jnp.float32)
        return jax.jit(f).lower(shape).compile().memory_analysis().temp_size_in_bytes

    added_samples = 4 * 600 * SAMPLE_RATE
    assert temporary_bytes(720) - temporary_bytes(120) < 5 * added_samples  # spectra alone would add 6.3, or twice that


@pytest.mark.parametrize(
    ("waveform", "padding", "message"),
    [
        (np.zeros(16_000, np.int16), 0, "dtype int16, expected floats"),
        (np.zeros(100), 0, r"shape \(100,\).*at least 160 samples"),
        (np.zeros((0, 16_000)), 0, r"shape \(0, 16000\)"),
        (np.float32(1), 0, r"shape \(\)"),
        (np.zeros(16_000), -1, "padding=-1"),
    ],
)
def test_invalid_waveforms_are_rejected(waveform, padding, message):
    with pytest.raises(ValueError, match=message):
        log_mel_spectrogram(waveform, padding=padding)
    with pytest.raises(ValueError, match="n_mels=0"):
        mel_filters(0)


@pytest.mark.parametrize("n_samples", [0, 1, 150, 201, 16_000, CHUNK - 1, CHUNK, CHUNK + 161, 2 * CHUNK + 12_345])
def test_windows_equal_slices_of_the_whole_spectrogram(n_samples):
    samples = noise(n_samples)
    whole = np.asarray(log_mel_spectrogram(np.pad(samples, (0, CHUNK))))
    recording = RecordingMel(samples)
    assert recording.content_frames == whole.shape[1] - N_FRAMES == n_samples // HOP_LENGTH
    end = recording.content_frames
    for start, n_frames in [(0, N_FRAMES), (1, 700), (2, 1), (end // 2, end - end // 2), (end, 500), (end + 2999, 9)]:
        part = whole[:, start : start + n_frames][:, :N_FRAMES]
        expected = np.pad(part, [(0, 0), (0, N_FRAMES - part.shape[1])])
        np.testing.assert_allclose(
            recording.window(start, n_frames), expected, atol=1e-5, err_msg=f"{start}, {n_frames}"
        )
    assert not recording.window(end + N_FRAMES, 1).any()


def test_windows_of_other_lengths_hold_as_many_frames():
    samples = noise(50_000)
    recording = RecordingMel(samples, 128, n_window_frames=100)
    whole = log_mel_spectrogram(samples, 128, padding=100 * HOP_LENGTH)
    np.testing.assert_allclose(recording.window(150, 1000), whole[:, 150:250], atol=1e-5)


@pytest.mark.parametrize(("n_samples", "computed"), [(5_000, 1), (CHUNK, 1), (2 * CHUNK, 2)])
def test_the_first_window_is_computed_once(n_samples, computed, monkeypatch):
    calls, louder = [], features._louder
    monkeypatch.setattr(features, "_louder", lambda *args: calls.append(args) or louder(*args))
    recording = RecordingMel(noise(n_samples))
    assert len(calls) == computed
    recording.window(0, N_FRAMES)
    assert len(calls) == computed
    recording.window(1, N_FRAMES)
    assert len(calls) == computed + 1


def test_nothing_is_compiled_for_another_recording_or_window():
    compilations = []

    def count(event: str, duration: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(duration)

    RecordingMel(noise(5_000), 41).window(0, 31)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for n_samples in (50, 100_000, 1_500_000):
            recording = RecordingMel(noise(n_samples), 41)
            for start, n_frames in [(0, 3000), (np.int64(7), np.int64(100)), (recording.content_frames, 2)]:
                recording.window(start, n_frames)
        assert not compilations
        RecordingMel(noise(5_000), 42)
        assert compilations  # the counter counts
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


def test_negative_starts_and_waveforms_with_channels_are_rejected():
    with pytest.raises(ValueError, match="start_frame=-1"):
        RecordingMel(noise(1_000)).window(-1, 10)
    with pytest.raises(ValueError, match=r"shape \(2, 500\), expected \[N\]"):
        RecordingMel(noise(1_000).reshape(2, 500))
