"""Timestamps, stated lengths and limits of audio files."""

import re
import struct
from pathlib import Path

import av
import numpy as np
import pytest

from tests.audio.test_loading import as_int16, tone, write_wav
from whisper_nnx import load_model, transcribe
from whisper_nnx.audio.loading import SAMPLE_RATE, AudioError, load_audio, load_channels


def film(path: Path, *spans: tuple[float, float], codec: str = "pcm_s16le", channels: int = 1) -> Path:
    """Writes 8 s of video, and a tone in each span (start, duration) in s."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=10, width=32, height=32, pix_fmt="yuv420p")
        audio = container.add_stream(codec, rate=SAMPLE_RATE, layout={1: "mono", 2: "stereo"}[channels])
        pictures = [av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8)) for _ in range(80)]
        packets = [p for picture in [*pictures, None] for p in video.encode(picture)]
        for start_s, duration_s in spans:
            for at in range(0, round(duration_s * SAMPLE_RATE), 1000):
                samples = np.tile(tone(duration_s)[at : at + 1000], (channels, 1))
                frame = av.AudioFrame.from_ndarray(samples, "fltp", audio.layout.name)
                frame.sample_rate, frame.pts = SAMPLE_RATE, round(start_s * SAMPLE_RATE) + at
                packets += audio.encode(frame)
        packets += audio.encode(None)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            container.mux(packet)
    return path


def loud_edges(samples: np.ndarray) -> list[float]:
    """Starts and ends in s of the parts between silences of 0.1 s or more."""
    at = np.flatnonzero(np.abs(samples) > 0.01) / SAMPLE_RATE
    breaks = np.flatnonzero(np.diff(at) > 0.1)
    return [float(at[0]), *(float(t) for i in breaks for t in at[i : i + 2]), float(at[-1])]


@pytest.mark.parametrize("name", ["late.mkv", "late.mov", "late.nut", "late.ts"])
def test_audio_that_starts_late_in_a_video_is_preceded_by_silence(tmp_path, name):
    codec = "mp2" if name.endswith("ts") else "pcm_s16le"
    path = film(tmp_path / name, (5.0, 2.0), codec=codec)
    samples = load_audio(path)
    assert loud_edges(samples) == [pytest.approx(5.0, abs=0.05), pytest.approx(7.0, abs=0.05)]
    assert not samples[: 4 * SAMPLE_RATE].any()
    joined = load_audio(path, follow_timestamps=False)
    np.testing.assert_array_equal(samples[-len(joined) :], joined)
    assert len(samples) - len(joined) == pytest.approx(5 * SAMPLE_RATE, abs=0.05 * SAMPLE_RATE)


def test_gaps_between_timestamps_are_silence(tmp_path):
    path = film(tmp_path / "gaps.mkv", (0.0, 1.0), (3.0, 1.0), (4.05, 1.0), (7.0, 0.5))
    samples = load_audio(path)
    # 50 ms may come from codecs and rounding; the next gap makes up for them.
    expected = [0.0, 1.0, 3.0, 5.0, 7.0, 7.5]
    np.testing.assert_allclose(loud_edges(samples), expected, atol=0.002)
    np.testing.assert_array_equal(
        samples[samples != 0], (joined := load_audio(path, follow_timestamps=False))[joined != 0]
    )
    assert len(joined) == 3.5 * SAMPLE_RATE


def test_channels_have_the_same_gaps(tmp_path):
    samples, channels = load_channels(film(tmp_path / "stereo.mkv", (2.0, 1.0), (5.0, 1.0), channels=2))
    np.testing.assert_array_equal(channels, [samples, samples])
    np.testing.assert_allclose(loud_edges(samples), [2, 3, 5, 6], atol=0.002)


def test_a_lone_audio_stream_starts_at_0_whatever_its_first_timestamp(tmp_path):
    with av.open(str(tmp_path / "alone.mkv"), "w") as container:
        audio = container.add_stream("pcm_s16le", rate=SAMPLE_RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone(1.0)[None], "flt", "mono")
        frame.sample_rate, frame.pts = SAMPLE_RATE, 5 * SAMPLE_RATE
        for packet in [*audio.encode(frame), *audio.encode(None)]:
            container.mux(packet)
    assert len(load_audio(tmp_path / "alone.mkv")) == SAMPLE_RATE


def test_overlapping_audio_is_kept(tmp_path):
    path = film(tmp_path / "overlap.nut", *((0.03 * i, 0.0625) for i in range(32)), (6.0, 1.0))
    np.testing.assert_allclose(loud_edges(load_audio(path)), [0, 2, 6, 7], atol=0.002)


def test_a_jump_of_hours_is_not_filled_and_warns(tmp_path):
    path = film(tmp_path / "jump.nut", (0.0, 1.0), (7200.0, 1.0), (7203.0, 1.0))
    with pytest.warns(UserWarning, match=r"jump.nut jump by 7199.0 s after 1.0 s: too long to fill") as caught:
        samples = load_audio(path)
    assert len(caught) == 1
    np.testing.assert_allclose(loud_edges(samples), [0, 2, 4, 5], atol=0.002)
    assert len(load_audio(path, follow_timestamps=False)) == 3 * SAMPLE_RATE  # without a warning


def header_of(data: bytes, riff: int, size: int) -> bytes:
    at = data.index(b"data")
    return data[:4] + struct.pack("<I", riff) + data[8 : at + 4] + struct.pack("<I", size) + data[at + 8 :]


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0xFFFFFFDB, 0x7FFFFFFF, 0x80000000, 0x7FFFF000])
def test_a_wav_with_an_unspecified_length_is_complete(tmp_path, size):
    whole = write_wav(tmp_path / "a.wav", as_int16(tone(1.2))).read_bytes()
    expected = load_audio(whole)
    for riff in (size, 0, 0xFFFFFFFF):
        np.testing.assert_array_equal(load_audio(header_of(whole, riff, size)), expected)


def test_a_wav_that_ends_before_its_length_is_damaged(tmp_path):
    whole = write_wav(tmp_path / "a.wav", as_int16(tone(1.3))).read_bytes()
    with pytest.warns(UserWarning, match="is damaged"):
        assert len(load_audio(whole[: len(whole) // 2])) < SAMPLE_RATE


@pytest.mark.parametrize("rate", [1, 999, 1_000_001, 2**31 - 1])
def test_implausible_rates_are_rejected_before_resampling(tmp_path, rate):
    data = bytearray(write_wav(tmp_path / "a.wav", as_int16(tone(0.1))).read_bytes())
    data[24:28] = struct.pack("<I", rate)
    with pytest.raises(AudioError, match=rf"the given data: sampling_rate={rate} must be a whole number of Hz"):
        load_audio(bytes(data))


def test_files_and_arrays_longer_than_max_hours_are_rejected(tmp_path):
    path = write_wav(tmp_path / "a.wav", as_int16(tone(3.6)))
    for source in (path, tone(3.6)):
        assert len(load_audio(source, max_hours=0.001)) == 3.6 * SAMPLE_RATE
        with pytest.raises(AudioError, match=r"is longer than max_hours=0.0009; increase max_hours"):
            load_audio(source, max_hours=0.0009)
    silence = film(tmp_path / "late.mkv", (5.0, 0.5))
    with pytest.raises(AudioError, match="max_hours"):
        load_audio(silence, max_hours=4 / 3600)
    for hours in (0, -1, float("nan"), True):
        with pytest.raises(ValueError, match=r"max_hours=.* must be a number above 0"):
            load_audio(path, max_hours=hours)


def float_wav(path: Path, samples: np.ndarray) -> Path:
    data = samples.astype("<f4").tobytes()
    form = struct.pack("<HHIIHH", 3, 1, SAMPLE_RATE, 4 * SAMPLE_RATE, 4, 32)
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    path.write_bytes(b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks)
    return path


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e37, -1e11])
def test_invalid_floats_are_rejected_in_files_and_arrays(tmp_path, value):
    samples = tone(0.5)
    samples[7000] = value
    fix = "scale it to [-1, 1]" if np.isfinite(value) else "replace non-finite values"
    for source, name in ((samples, "the array"), (path := float_wav(tmp_path / "a.wav", samples), path)):
        with pytest.raises(AudioError, match=re.escape(f"sample 7000 of {name} is {np.float32(value)}; {fix}")):
            load_audio(source)


@pytest.mark.parametrize("peak", [0.9, 3.0])
def test_floats_beyond_full_scale_are_kept_in_files_and_arrays(tmp_path, peak):
    samples = 2 * peak * tone(0.5)
    from_file = load_audio(float_wav(tmp_path / "a.wav", samples))
    np.testing.assert_allclose(from_file, load_audio(samples), rtol=0, atol=2.0**-16)
    assert np.abs(from_file).max() == pytest.approx(peak, abs=0.01)


def test_unscaled_integers_in_floats_warn_in_files_and_arrays(tmp_path):
    samples = 30_000 * tone(0.5)
    for source in (samples, float_wav(tmp_path / "a.wav", samples)):
        with pytest.warns(UserWarning, match=r"reaches 15000, but floats must be in \[-1, 1\]; scale it") as caught:
            load_audio(source)
        assert [Path(w.filename).name for w in caught] == ["test_files.py"]


@pytest.mark.slow
@pytest.mark.real
def test_words_of_real_speech_shift_with_a_late_start(real_tiny_en, real_speech, tmp_path):
    speech = load_audio(real_speech("en_libri_5s.flac"))
    with av.open(str(tmp_path / "late.mkv"), "w") as container:
        video = container.add_stream("mpeg4", rate=10, width=32, height=32, pix_fmt="yuv420p")
        audio = container.add_stream("flac", rate=SAMPLE_RATE, layout="mono")
        container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
        container.mux(video.encode(None))
        frame = av.AudioFrame.from_ndarray(as_int16(speech)[None], "s16", "mono")
        frame.sample_rate, frame.pts = SAMPLE_RATE, 5 * SAMPLE_RATE
        container.mux([*audio.encode(frame), *audio.encode(None)])
    model = load_model(str(real_tiny_en))
    texts, ends = [], []
    for source, follow in ((speech, True), (tmp_path / "late.mkv", True), (tmp_path / "late.mkv", False)):
        result = transcribe(model, source, word_timestamps=True, temperature=0.0, follow_timestamps=follow)
        words = [word for segment in result["segments"] for word in segment["words"]]
        texts.append([word["word"].strip(" ,.") for word in words])
        ends.append(np.array([word["end"] for word in words]))
    assert texts[0] == texts[1] == texts[2]
    np.testing.assert_allclose(ends[1] - ends[0], 5.0, atol=0.4)
    np.testing.assert_allclose(ends[2], ends[0], atol=1e-6)
