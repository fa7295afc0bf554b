"""`load_audio` against openai-whisper's, which runs the ffmpeg program, on many kinds of files made by ffmpeg."""

import os
import subprocess
import warnings
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
import whisper

from whisper_nnx.audio.loading import AudioError, load_audio

SEVEN = "pan=6.1|c0=c0|c1=c1|c2=0.5*c0|c3=0.3*c1|c4=-0.2*c0|c5=0.1*c1|c6=c0"
SIX = "pan=5.1|c0=c0|c1=c1|c2=0.5*c0+0.5*c1|c3=c0|c4=0.3*c0|c5=-0.7*c1"
PICTURE = ["-f", "lavfi", "-i", "testsrc=size=64x48:rate=10:duration=7"]
FILES = {
    "s16.wav": [],
    "u8.wav": ["-c:a", "pcm_u8"],
    "float.wav": ["-c:a", "pcm_f32le"],
    "double.wav": ["-c:a", "pcm_f64le", "-ar", "22050"],
    "a_law_8k.wav": ["-c:a", "pcm_alaw", "-ar", "8000", "-ac", "1"],
    "adpcm.wav": ["-c:a", "adpcm_ms"],
    "24_bit_96k.wav": ["-c:a", "pcm_s24le", "-ar", "96000"],
    "six_channels_48k.wav": ["-af", SIX, "-ar", "48000"],
    "seven_channels_8k.wav": ["-af", SEVEN, "-ar", "8000"],
    "16_bit.flac": [],
    "24_bit_96k.flac": ["-ar", "96000", "-sample_fmt", "s32"],
    "constant.mp3": ["-b:a", "64k"],
    "variable.mp3": ["-q:a", "5"],
    "headless_32k.mp3": ["-write_xing", "0", "-ar", "32000", "-ac", "1"],
    "vorbis.ogg": ["-c:a", "libvorbis"],
    "opus.ogg": ["-c:a", "libopus"],
    "opus.webm": ["-c:a", "libopus"],
    "vorbis.webm": ["-c:a", "libvorbis"],
    "aac.m4a": ["-c:a", "aac"],
    "aac_8k.m4a": ["-c:a", "aac", "-ar", "8000", "-ac", "1"],
    "six_channels.m4a": ["-af", SIX, "-ar", "48000", "-c:a", "aac"],
    "alac.m4a": ["-c:a", "alac"],
    "aac.aac": ["-c:a", "aac"],
    "film.mp4": [*PICTURE, "-c:v", "mpeg4", "-c:a", "aac"],
    "film.mkv": [*PICTURE, "-c:v", "mpeg4", "-c:a", "libopus"],
}


@pytest.fixture(scope="module")
def ffmpeg(tmp_path_factory: pytest.TempPathFactory):
    """The program, under the name by which openai-whisper looks for it."""
    folder = tmp_path_factory.mktemp("bin")
    program = folder / "ffmpeg"
    program.symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        yield program


@pytest.fixture
def make(ffmpeg: Path, shared: Path, tmp_path: Path):
    """Makes a file of 5 s of 44.1 kHz stereo that end in the middle of a word."""

    def make(name: str, *options: str, seconds: str = "5.03") -> Path:
        source = ["-t", seconds, "-i", str(shared / "audio" / "en_44k_stereo_25s.wav")]
        command = [ffmpeg, "-nostdin", "-v", "error", *source, *options, tmp_path / name]
        subprocess.run(command, check=True)
        return tmp_path / name

    return make


def assert_equals_the_references(path: Path) -> None:
    ours, expected = load_audio(path), whisper.load_audio(str(path))
    if path.suffix in (".m4a", ".mp4") and 0 < len(expected) - len(ours) < 2048:
        # Before version 9 ffmpeg keeps the padding after the end of an mp4, and with it the resampler's last samples.
        expected = expected[: len(ours) - 40]
        ours = ours[: len(expected)]
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2.0**-15, err_msg=path.name)


@pytest.mark.parametrize("name", FILES)
def test_samples_equal_the_references_within_one_step_of_16_bits(make, name):
    assert_equals_the_references(make(name, *FILES[name]))


def test_the_shared_recordings_equal_the_references(ffmpeg, shared):
    for path in sorted((shared / "audio").iterdir()):
        if path.suffix in (".flac", ".wav") and "silence" not in path.name:
            assert_equals_the_references(path)


def test_sound_that_starts_late_or_is_cut_without_decoding_equals_the_references(make, ffmpeg):
    film = make("film.mp4", *PICTURE, "-c:v", "mpeg4", "-c:a", "aac")
    for name in ("cut.mp4", "cut.m4a", "cut.mkv"):
        cut = film.with_name(name)
        picture = ["-vn"] if name == "cut.m4a" else []
        command = [ffmpeg, "-nostdin", "-v", "error", "-ss", "1.7", "-i", film, *picture, "-c", "copy", cut]
        subprocess.run(command, check=True)
        assert_equals_the_references(cut)
    assert_equals_the_references(make("late.mkv", "-af", "asetpts=PTS+2/TB", "-c:a", "libopus"))


def test_a_stream_that_changes_rate_and_channels_midway_equals_the_references(make):
    stereo = make("stereo.aac", "-c:a", "aac")
    mono = make("mono.aac", "-c:a", "aac", "-ar", "22050", "-ac", "1")
    joined = stereo.with_name("joined.aac")
    joined.write_bytes(stereo.read_bytes() + mono.read_bytes() + stereo.read_bytes())
    assert_equals_the_references(joined)


def test_the_default_stream_is_the_references(make):
    short = make("short.flac", "-ac", "1", seconds="1")
    both = ["-i", str(short), "-map", "1", "-map", "0", "-c:a", "flac"]
    for name, marks in {"most_channels.mkv": ["0", "0"], "first_mark.mkv": ["default", "0"]}.items():
        path = make(name, *both, "-disposition:a:0", marks[0], "-disposition:a:1", marks[1])
        assert_equals_the_references(path)
        assert [len(load_audio(path, stream=i)) for i in (0, 1)] == [16_000, 80_480]


@pytest.mark.parametrize("name", ["variable.mp3", "16_bit.flac", "vorbis.ogg", "opus.webm", "aac.aac"])
def test_what_is_left_of_a_truncated_file_equals_the_references(make, name):
    path = make(name, *FILES[name])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 + 11])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_equals_the_references(path)


def test_what_is_left_of_a_damaged_mp3_equals_the_references(make):
    path = make("damaged.mp3", "-b:a", "64k")
    data = bytearray(path.read_bytes())
    data[20_000:21_000] = np.random.default_rng(0).bytes(1000)
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="damaged packets: "):
        assert_equals_the_references(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gradient", [False, True])
def test_torchs_tensors_are_read_with_a_gradient_or_without(dtype, gradient):
    samples = np.sin(np.arange(8000, dtype=np.float32)).round(1)
    tensor = torch.tensor(samples).to(dtype).requires_grad_(gradient)
    expected = tensor.detach().float().numpy()
    np.testing.assert_array_equal(load_audio(tensor), expected)
    np.testing.assert_array_equal(load_audio((16_000, tensor)), expected)
    np.testing.assert_array_equal(load_audio({"array": tensor, "sampling_rate": 16_000}), expected)


def test_tensors_without_samples_are_refused_in_one_line():
    for tensor, message in [
        (torch.zeros(9, dtype=torch.complex64), "its dtype is complex64"),
        (torch.zeros(9).to_sparse(), "cannot be converted to a numpy array"),
    ]:
        with pytest.raises(AudioError, match=message) as caught:
            load_audio(tensor)
        assert "\n" not in str(caught.value)


LATE = ["-itsoffset", "5"]
PAUSE = ["-af", "asetpts='PTS+if(gt(T,2),1.5/TB,0)'"]
TIMED = {
    "late.mkv": ("libopus", LATE, []),
    "late.webm": ("libvorbis", LATE, []),
    "late.mp4": ("aac", LATE, []),
    "late.ts": ("aac", LATE, []),
    "late_mp3.mkv": ("libmp3lame", LATE, []),
    "late_flac.mkv": ("flac", LATE, []),
    "pause.mkv": ("libopus", [], PAUSE),
    "pause.mp4": ("aac", [], PAUSE),
    "pause.ts": ("mp2", [], PAUSE),
}


@pytest.mark.parametrize("name", TIMED)
def test_samples_lie_where_ffmpeg_puts_them_by_their_time_stamps(ffmpeg, shared, tmp_path, name):
    codec, before, filters = TIMED[name]
    speech = ["-t", "5.03", "-i", str(shared / "audio" / "en_44k_stereo_25s.wav")]
    coded = ["-c:v", "libvpx" if name.endswith("webm") else "mpeg4", "-c:a", codec]
    run = [ffmpeg, "-nostdin", "-v", "error"]
    subprocess.run(
        [*run, *PICTURE, *before, *speech, "-map", "0:v", "-map", "1:a", *filters, *coded, tmp_path / name], check=True
    )
    # With the picture: without it, ffmpeg takes the time line to start with the sound in some formats.
    output = ["-map", "0:a", "-af", "aresample=async=1:first_pts=0", "-ac", "1", "-ar", "16000", "-f", "s16le", "-"]
    picture = ["-map", "0:v", "-f", "null", os.devnull]
    done = subprocess.run([*run, "-i", tmp_path / name, *output, *picture], check=True, capture_output=True)
    expected = np.frombuffer(done.stdout, "<i2") / 2.0**15
    ours = load_audio(tmp_path / name)
    assert 0 <= len(expected) - len(ours) < (2048 if name.endswith("mp4") else 1)  # the padding of an mp4 is dropped
    kept = len(ours) - 40 if len(ours) < len(expected) else len(ours)
    np.testing.assert_allclose(ours[:kept], expected[:kept], rtol=0, atol=2.0**-15)
    joined = load_audio(tmp_path / name, follow_timestamps=False)
    assert len(ours) - len(joined) == pytest.approx(80_000 if before else 24_000, abs=2400)


@pytest.mark.parametrize("form", ["wav", "flac", "ogg", "mp3", "caf", "au", "matroska"])
def test_what_ffmpeg_writes_to_a_pipe_is_whole(ffmpeg, shared, form):
    source = ["-t", "5.03", "-i", str(shared / "audio" / "en_44k_stereo_25s.wav")]
    command = [ffmpeg, "-nostdin", "-v", "error", *source, "-f", form, "-"]
    piped = subprocess.run(command, check=True, capture_output=True).stdout
    assert len(load_audio(piped)) == pytest.approx(5.03 * 16_000, abs=2000)  # without a warning
