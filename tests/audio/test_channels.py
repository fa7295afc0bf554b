"""Speakers of stereo recordings and reading of channels."""

import io
import wave
from pathlib import Path

import av
import numpy as np
import pytest

from whisper_nnx.audio.channels import load_stereo, speakers
from whisper_nnx.audio.loading import SAMPLE_RATE, AudioError, load_audio, load_channels


def wav(channels: np.ndarray, rate: int = SAMPLE_RATE) -> bytes:
    """Makes a 16-bit WAV file of channels [C,N] in [-1, 1]."""
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setnchannels(len(channels))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.round(32768 * channels.T).clip(-32768, 32767).astype("<i2").tobytes())
    return data.getvalue()


@pytest.fixture(scope="module")
def dialogue() -> np.ndarray:
    """[2, N]: 2 s on the left, 2 s on the right, 1 s on both."""
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 5 * SAMPLE_RATE).astype(np.float32)
    loud = np.repeat([[1, 0.1, 1], [0.1, 1, 0.95]], [2 * SAMPLE_RATE, 2 * SAMPLE_RATE, SAMPLE_RATE], axis=1)
    return (noise * loud).astype(np.float32)


def test_the_speaker_is_the_channel_louder_by_a_tenth(dialogue: np.ndarray) -> None:
    assert speakers(dialogue, [(0.0, 2.0), (2.0, 4.0), (4.0, 5.0), (0.5, 3.0), (0.0, 4.0)]) == ["0", "1", "?", "0", "?"]


def test_empty_and_silent_spans_have_no_speaker(dialogue: np.ndarray) -> None:
    assert speakers(dialogue, [(3.0, 3.0), (9.0, 10.0)]) == ["?", "?"]
    assert speakers(np.zeros((2, 100), np.float32), [(0.0, 1.0)]) == ["?"]


def test_channels_equal_the_file_and_their_mix_equals_load_audio(dialogue: np.ndarray) -> None:
    samples, channels = load_channels(wav(dialogue))
    np.testing.assert_allclose(channels, dialogue, atol=2**-15)
    np.testing.assert_array_equal(samples, load_audio(wav(dialogue)))


@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_channels_stay_separate_at_any_rate(dialogue: np.ndarray, rate: int) -> None:
    samples, channels = load_channels(wav(dialogue, rate))
    np.testing.assert_array_equal(samples, load_audio(wav(dialogue, rate)))
    assert channels.shape == (2, len(samples))
    np.testing.assert_allclose(channels.mean(axis=0), samples, atol=2 * 2**-15)
    assert speakers(channels, [(0.0, 2 * SAMPLE_RATE / rate)]) == ["0"]


def test_arrays_and_files_have_the_same_channels(dialogue: np.ndarray) -> None:
    for array in (dialogue, dialogue.T):
        samples, channels = load_channels(array)
        np.testing.assert_array_equal(channels, dialogue)
        np.testing.assert_array_equal(samples, load_audio(array))
    slow, fast = load_channels(dialogue, 48_000), load_channels(wav(dialogue, 48_000))
    assert slow[1].shape == fast[1].shape
    np.testing.assert_allclose(slow[1], fast[1], atol=1e-3)
    np.testing.assert_array_equal(slow[0], load_audio(dialogue, 48_000))


def test_a_pipe_is_read_once(dialogue: np.ndarray) -> None:
    class Pipe(io.RawIOBase):
        rest = io.BytesIO(wav(dialogue))

        def readable(self) -> bool:
            return True

        def readinto(self, buffer) -> int:
            return self.rest.readinto(buffer)

    assert load_stereo(Pipe())[1].shape == dialogue.shape


def test_a_stream_that_becomes_mono_keeps_both_channels(dialogue: np.ndarray, tmp_path: Path) -> None:
    parts = []
    for layout, samples in (("stereo", dialogue), ("mono", dialogue[:1])):
        path = tmp_path / f"{layout}.aac"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=SAMPLE_RATE, layout=layout)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), "fltp", layout)
            frame.sample_rate = SAMPLE_RATE
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        parts.append(path.read_bytes())
    samples, channels = load_stereo(b"".join(parts))
    assert channels.shape == (2, len(samples))
    np.testing.assert_allclose(channels[0, -SAMPLE_RATE:], channels[1, -SAMPLE_RATE:], atol=1e-3)


@pytest.mark.parametrize(("count", "fault"), [(1, "has 1 channel, "), (3, "has 3 channels, "), (9, "has 9 channels, ")])
def test_recordings_that_are_not_stereo_are_rejected(count: int, fault: str) -> None:
    samples = np.full((count, SAMPLE_RATE), 0.1, np.float32)
    for source in (wav(samples), samples):
        with pytest.raises(AudioError, match=f"the recording {fault}but diarize compares 2; give a stereo recording"):
            load_stereo(source)
