"""The log-mel spectrogram against openai-whisper's and against one in float64, on real recordings."""

from pathlib import Path

import numpy as np
import pytest
import whisper

from tests.small import quick_compilation  # noqa: F401
from whisper_nnx.audio.features import N_FRAMES, RecordingMel, log_mel_spectrogram, mel_filters
from whisper_nnx.audio.loading import load_audio


@pytest.fixture(scope="module")
def recordings(shared: Path) -> dict[str, np.ndarray]:
    paths = [p for p in sorted((shared / "audio").iterdir()) if p.suffix in (".flac", ".wav")]
    assert len(paths) > 10
    return {p.name: load_audio(p) for p in paths if "silence" not in p.name}


def in_float64(waveform: np.ndarray, filters: np.ndarray) -> np.ndarray:
    """The definition, at a precision that leaves no doubt."""
    padded = np.pad(waveform.astype(np.float64), 200, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, 400)[::160][: len(waveform) // 160]
    power = np.abs(np.fft.rfft(frames * (0.5 - 0.5 * np.cos(np.arange(400) * np.pi / 200)))) ** 2
    log_mel = np.log10(np.maximum(filters.astype(np.float64) @ power.T, 1e-10))
    return (np.maximum(log_mel, log_mel.max() - 8) + 4) / 4


@pytest.mark.parametrize("n_mels", [80, 128])
def test_mel_filters_equal_the_shipped_ones(n_mels):
    np.testing.assert_allclose(mel_filters(n_mels), whisper.audio.mel_filters("cpu", n_mels), rtol=0, atol=1e-8)


@pytest.mark.parametrize("n_mels", [80, 128])
def test_spectrograms_of_speech_equal_the_references(recordings, n_mels):
    for name, waveform in recordings.items():
        expected = whisper.log_mel_spectrogram(waveform, n_mels).numpy()
        # Both are 3e-5 from the truth (see below), in bins 70 dB below the loudest.
        np.testing.assert_allclose(log_mel_spectrogram(waveform, n_mels), expected, rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("n_mels", [80, 128])
def test_spectrograms_of_speech_are_as_near_to_the_truth_as_the_references(recordings, n_mels):
    ours, references = [], []
    for waveform in recordings.values():
        truth = in_float64(waveform, mel_filters(n_mels))
        ours.append(np.abs(log_mel_spectrogram(waveform, n_mels) - truth).max())
        references.append(np.abs(whisper.log_mel_spectrogram(waveform, n_mels).numpy() - truth).max())
    assert max(ours) < 5e-5
    assert np.mean(ours) < 1.5 * np.mean(references)


def test_windows_equal_those_that_the_reference_cuts_from_the_padded_recording(recordings):
    for name in ("en_short_3s.flac", "en_pauses_60s.flac", "mixed_languages_2min.flac"):
        waveform = recordings[name]
        mel = whisper.log_mel_spectrogram(waveform, padding=30 * 16_000)
        recording = RecordingMel(waveform)
        assert recording.content_frames == mel.shape[1] - N_FRAMES
        for seek in range(0, recording.content_frames, 1234):
            n_frames = min(N_FRAMES, recording.content_frames - seek)
            expected = whisper.pad_or_trim(mel[:, seek : seek + n_frames], N_FRAMES)
            np.testing.assert_allclose(recording.window(seek, n_frames), expected, rtol=0, atol=1e-4)
        # What the language is told from holds part of the padding.
        np.testing.assert_allclose(recording.window(0, N_FRAMES), whisper.pad_or_trim(mel, N_FRAMES), rtol=0, atol=1e-4)


def test_silence_equals_the_references():
    silence = np.zeros(20_000, np.float32)
    np.testing.assert_allclose(log_mel_spectrogram(silence), whisper.log_mel_spectrogram(silence), rtol=0, atol=1e-6)
