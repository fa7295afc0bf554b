"""Loading valid and invalid sources and arrays. For values see tests/reference/test_audio.py."""

import contextlib
import io
import sys
import types
import warnings
import wave
from pathlib import Path

import av
import jax.numpy as jnp
import numpy as np
import pytest

from whisper_nnx.audio.loading import SAMPLE_RATE, AudioError, load_audio, pad_or_trim

STEP = 2.0**-15


def tone(duration_s: float, sampling_rate: int = SAMPLE_RATE, hz: float = 440) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(round(duration_s * sampling_rate)) / sampling_rate)).astype("f4")


def as_int16(samples: np.ndarray) -> np.ndarray:
    return np.round(samples / STEP).clip(-(2**15), 2**15 - 1).astype("<i2")


def write_wav(path: Path, samples: np.ndarray, sampling_rate: int = SAMPLE_RATE) -> Path:
    """samples: [N] or [N, channels], int16."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(sampling_rate)
        file.writeframes(samples.tobytes())
    return path


def encode(path: Path, *signals: np.ndarray, codec: str, sampling_rate: int = SAMPLE_RATE, **metadata: str) -> Path:
    """Writes each signal ([channels, N], one or two channels) as an audio stream of its own."""
    with av.open(str(path), "w") as container:
        container.metadata.update(metadata)
        layouts = {1: "mono", 2: "stereo"}
        streams = [container.add_stream(codec, rate=sampling_rate, layout=layouts[len(s)]) for s in signals]
        for stream, signal in zip(streams, signals, strict=True):
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(signal), "fltp", layouts[len(signal)])
            frame.sample_rate = sampling_rate
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return path


@pytest.fixture
def wav(tmp_path: Path) -> Path:
    return write_wav(tmp_path / "tone.wav", as_int16(tone(0.5)))


@pytest.fixture
def mp3(tmp_path: Path) -> Path:
    return encode(tmp_path / "tone.mp3", tone(8.0)[None], codec="libmp3lame")


def test_16_bit_samples_at_16_khz_are_read_exactly(wav):
    samples = load_audio(wav)
    assert samples.dtype == np.float32
    np.testing.assert_array_equal(samples, as_int16(tone(0.5)) * STEP)


def test_every_kind_of_file_source_gives_the_same_samples(wav, monkeypatch):
    class Pipe(io.RawIOBase):
        def __init__(self):
            self.rest = io.BytesIO(wav.read_bytes())

        def readable(self):
            return True

        def readinto(self, buffer):
            return self.rest.readinto(buffer)

    expected = load_audio(wav)
    data = wav.read_bytes()
    with open(wav, "rb") as file:
        for source in (str(wav), data, bytearray(data), memoryview(data), io.BytesIO(data), file, Pipe()):
            np.testing.assert_array_equal(load_audio(source), expected)
        assert not file.closed
    after_a_header = io.BytesIO(b"header" + data)
    after_a_header.seek(6)
    np.testing.assert_array_equal(load_audio(after_a_header), expected)
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(data)))
    np.testing.assert_array_equal(load_audio("-"), expected)


def test_any_rate_gives_16_khz(tmp_path):
    for rate in (8_000, 11_025, 22_050, 44_100, 48_000, 96_000):
        samples = load_audio(write_wav(tmp_path / "a.wav", as_int16(tone(1.0, rate)), rate))
        assert len(samples) == SAMPLE_RATE
        np.testing.assert_allclose(samples[100:-100], tone(1.0)[100:-100], atol=1e-3)


def test_layouts_that_ffmpeg_cannot_mix_are_averaged(tmp_path):
    nine = as_int16(np.stack([tone(0.5, hz=100 * c) for c in range(1, 10)], axis=1))
    samples = load_audio(write_wav(tmp_path / "nine.wav", nine))
    np.testing.assert_allclose(samples, nine.mean(axis=1) * STEP, atol=STEP)


def test_nine_planar_channels_are_averaged(tmp_path):
    nine = np.stack([tone(0.5, hz=100 * c) for c in range(1, 10)])
    with av.open(str(tmp_path / "nine.nut"), "w") as container:
        stream = container.add_stream("pcm_s16le_planar", rate=SAMPLE_RATE, layout="9 channels")
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(nine.T).reshape(1, -1), "flt", "9 channels")
        frame.sample_rate = SAMPLE_RATE
        for planar in av.AudioResampler("s16p", "9 channels", SAMPLE_RATE).resample(frame):
            container.mux(stream.encode(planar))
        container.mux(stream.encode(None))
    np.testing.assert_allclose(load_audio(tmp_path / "nine.nut"), nine.mean(axis=0), atol=2 * STEP)


def test_a_stream_is_chosen_by_its_index_or_by_its_channels(tmp_path):
    low, high = tone(1.0, hz=200)[None], np.repeat(tone(1.0, hz=2000)[None], 2, axis=0)
    path = encode(tmp_path / "two.mkv", low, high, codec="pcm_s16le")

    def loudest_hz(samples: np.ndarray) -> int:
        return int(np.abs(np.fft.rfft(samples[:SAMPLE_RATE])).argmax())

    assert [loudest_hz(load_audio(path, stream=i)) for i in (0, 1)] == [200, 2000]
    assert loudest_hz(load_audio(path)) == 2000
    for stream in (2, -1):
        with pytest.raises(AudioError, match=rf"stream={stream} does not exist: .*two.mkv has 2 audio streams"):
            load_audio(path, stream=stream)


def test_tags_with_invalid_unicode_are_harmless(tmp_path):
    path = encode(tmp_path / "latin.flac", tone(0.5)[None], codec="flac", title="a cafe")
    data = path.read_bytes()
    assert b"a cafe" in data
    np.testing.assert_array_equal(load_audio(data.replace(b"a cafe", b"a caf\xe9")), load_audio(path))


@pytest.mark.parametrize(
    "convert",
    [
        np.asarray,
        jnp.asarray,
        lambda x: x.astype(np.float64),
        lambda x: x.astype(np.float16),
        lambda x: (x * 2**7).round().astype(np.int8),
        lambda x: (x * 2**7 + 2**7).round().astype(np.uint8),
        lambda x: (x * 2**15).astype(np.int16),
        lambda x: (x.astype(np.float64) * 2**31).astype(np.int32),
        lambda x: np.stack([0.5 * x, 1.5 * x], axis=1),
        lambda x: np.stack([0.5 * x, 1.5 * x], axis=0),
        lambda x: x[None],
        lambda x: x[:, None],
    ],
)
def test_every_kind_of_array_gives_the_same_samples(convert):
    samples = np.round(tone(0.5) * 2**6) / 2**6  # exact in each
    np.testing.assert_array_equal(load_audio(convert(samples)), samples)


def test_arrays_are_resampled_like_files(tmp_path):
    stereo = np.stack([tone(1.3, 44_100, 300), tone(1.3, 44_100, 700)], axis=1)
    samples = load_audio(stereo, sampling_rate=44_100)
    from_file = load_audio(write_wav(tmp_path / "a.wav", as_int16(stereo), 44_100))
    assert samples.shape == from_file.shape
    np.testing.assert_allclose(samples, from_file, atol=1.5 * STEP)
    assert len(np.unique(samples)) > len(np.unique(from_file))  # not rounded to 16 bits


@pytest.mark.parametrize(
    ("array", "sampling_rate", "message"),
    [
        (np.array([0, 0, np.nan, np.inf]), None, "sample 2 of the array is nan"),
        (np.array([[0, 0, 0], [0, -np.inf, 0]]), None, "sample 1, 1 of the array is -inf"),
        (np.array([0, 1e300]), None, "sample 1 of the array is 1e[+]300"),
        (np.zeros((2, 2, 2)), None, r"shape \(2, 2, 2\)"),
        (np.float32(0.5), None, r"shape \(\)"),
        (np.zeros(9, np.int64), None, "dtype is int64"),
        (np.zeros(9, complex), None, "dtype is complex128"),
        (np.array(["a"]), None, "dtype is <U1"),
        (np.zeros(9), 0, "sampling_rate=0 must"),
        (np.zeros(9), -8000, "sampling_rate=-8000 must"),
        (np.zeros(9), 44_100.5, "sampling_rate=44100.5 must"),
        (np.zeros(9), 2**40, "sampling_rate=1099511627776 must"),
        ([0.1, 0.2], None, "type list is not supported"),
        (None, None, "type NoneType is not supported"),
    ],
)
def test_invalid_arrays_are_rejected(array, sampling_rate, message):
    with pytest.raises(AudioError, match=message) as caught:
        load_audio(array, sampling_rate)
    assert "\n" not in str(caught.value)


def test_options_of_files_are_rejected_for_arrays_and_vice_versa(wav):
    with pytest.raises(AudioError, match="stream=0 applies to files"):
        load_audio(tone(1.0), stream=0)
    with pytest.raises(AudioError, match="sampling_rate=8000 applies to arrays"):
        load_audio(wav, 8_000)


def test_suspicious_recordings_are_loaded_with_one_warning(wav):
    with pytest.warns(UserWarning, match="the array is digital silence") as caught:
        assert not load_audio(np.zeros(1600)).any()
    assert [Path(w.filename).name for w in caught] == ["test_loading.py"]
    with pytest.warns(UserWarning, match="silence"):
        assert load_audio(np.full(16_000, 128, np.uint8)).shape == (16_000,)
    with pytest.warns(UserWarning, match=r"short.wav lasts only 20 ms") as caught:
        assert load_audio(write_wav(wav.with_name("short.wav"), as_int16(tone(0.02)))).shape == (320,)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match=r"reaches 16384, but floats must be in \[-1, 1\]"):
        load_audio(as_int16(tone(1.0)).astype(float))


def test_files_that_cannot_be_opened_are_named_with_a_hint(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"^nowhere.wav: No such file or directory; check the path$"):
        load_audio("nowhere.wav")
    with pytest.raises(IsADirectoryError, match="Is a directory; name a file in it"):
        load_audio(tmp_path)

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "a.wav")

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(PermissionError, match=r"^a.wav: Permission denied; make it readable"):
        load_audio("a.wav")


def video(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10, width=32, height=32, pix_fmt="yuv420p")
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.wav", b"", "empty.wav is empty"),
        ("text.wav", b"This is not sound.\n" * 100, "text.wav cannot be read as audio"),
        ("zeros.mp3", bytes(10_000), "zeros.mp3 cannot be read as audio"),
        ("titles.srt", b"1\n00:00:00,000 --> 00:00:01,000\nHello\n", "titles.srt contains no audio, only subtitle"),
        ("list.m3u8", b"#EXTM3U\n#EXTINF:1,\n{wav}\n#EXT-X-ENDLIST\n", "list.m3u8 cannot be read as audio"),
        ("list.ffconcat", b"ffconcat version 1.0\nfile tone.wav\n", "list.ffconcat cannot be read as audio"),
    ],
)
def test_files_without_audio_are_rejected_in_one_line(wav, name, content, message):
    path = wav.with_name(name)
    path.write_bytes(content.replace(b"{wav}", str(wav).encode()))
    with pytest.raises(AudioError, match=message) as caught:
        load_audio(path)
    assert "\n" not in str(caught.value)


def test_other_files_without_audio_are_rejected(wav):
    with pytest.raises(AudioError, match=r"silent.mp4 contains no audio, only video"):
        load_audio(video(wav.with_name("silent.mp4")))
    with pytest.raises(AudioError, match=r"none.wav contains no decodable audio"):
        load_audio(write_wav(wav.with_name("none.wav"), as_int16(tone(0.0))))
    with open(wav, encoding="latin-1") as file, pytest.raises(AudioError, match=r"tone.wav is open as text"):
        load_audio(file)
    unknown = (
        encode(wav.with_name("a.mkv"), tone(0.5)[None], codec="pcm_s16le").read_bytes().replace(b"A_PCM", b"A_NEW")
    )
    with pytest.raises(AudioError, match="the given data uses an audio codec that ffmpeg cannot decode"):
        load_audio(unknown)


def test_a_truncated_file_is_read_to_its_end_with_a_warning(mp3):
    whole = load_audio(mp3)
    cut = mp3.read_bytes()[: mp3.stat().st_size // 2]
    with pytest.warns(
        UserWarning, match=r"given data is damaged \(it ends after [34].\d s, but its header states 8.\d s\)"
    ) as caught:
        part = load_audio(cut)
    assert len(caught) == 1
    np.testing.assert_array_equal(part[:-2000], whole[: len(part) - 2000])


def test_a_file_damaged_in_the_middle_is_read_before_and_after_it(mp3, capfd):
    whole = load_audio(mp3)
    data = bytearray(mp3.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 1000] = np.random.default_rng(0).bytes(1000)
    with pytest.warns(UserWarning, match=r"is damaged \(damaged packets: \d\); the rest is used"):
        samples = load_audio(data)
    assert len(whole) - 8_000 < len(samples) < len(whole)
    np.testing.assert_array_equal(samples[:50_000], whole[:50_000])
    late = whole[-50_000:-4_000]
    assert any(np.array_equal(late, samples[at : at + len(late)]) for at in range(60_000, len(samples) - len(late)))
    assert capfd.readouterr().err == ""  # ffmpeg's log is not shown


def test_random_damage_gives_samples_or_an_audio_error(mp3, wav):
    random = np.random.default_rng(0)
    for path, codec in [(mp3, ""), (wav, ""), (wav.with_name("a.m4a"), "aac"), (wav.with_name("a.ogg"), "libopus")]:
        if codec:
            encode(path, tone(3.0)[None], codec=codec)
        for _ in range(20):
            data = np.frombuffer(path.read_bytes(), np.uint8).copy()
            data[random.integers(0, 400, 3)] = random.integers(0, 256, 3)
            data[random.integers(0, len(data), 9)] = random.integers(0, 256, 9)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with contextlib.suppress(AudioError):
                    assert load_audio(data.tobytes()).dtype == np.float32


def test_pad_or_trim_appends_silence_or_trims_the_end():
    waveform = np.arange(1, 7, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(pad_or_trim(waveform, 2), waveform[:, :2])
    np.testing.assert_array_equal(pad_or_trim(waveform, 5), [[1, 2, 3, 0, 0], [4, 5, 6, 0, 0]])
    assert pad_or_trim(waveform[0]).shape == (480_000,)
