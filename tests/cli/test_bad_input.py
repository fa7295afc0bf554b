"""What people give by mistake: each gets one clear line, no traceback, and the other files are still done."""

import shutil
import wave
from pathlib import Path

import av
import numpy as np
import pytest

from tests.small import quick_compilation  # noqa: F401
from whisper_nnx import load_audio, load_model, transcribe
from whisper_nnx.cli.transcribe import main

pytestmark = pytest.mark.filterwarnings("default")  # the command shows warnings as lines


@pytest.fixture(scope="module")
def speech(shared: Path) -> Path:
    return shared / "audio" / "en_short_3s.flac"


def write_wav(path: Path, samples: np.ndarray, rate: int = 16_000) -> Path:
    """samples [N, channels], int16."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return path


def write_mp3(path: Path, speech: Path) -> Path:
    with av.open(str(speech)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream("mp3", rate=16_000)
        stream.layout = "mono"
        resampler = av.AudioResampler(stream.codec_context.format, "mono", 16_000)
        frames = [f for frame in source.decode(audio=0) for f in resampler.resample(frame)]
        for frame in [*frames, *resampler.resample(None), None]:
            target.mux(stream.encode(frame))
    return path


def run(digits: Path, folder: Path, *arguments: str | Path, capsys) -> tuple[int, list[str]]:
    """Exit code and lines on stderr of the command, greedy and quick."""
    options = ["--model", str(digits), "--output_dir", str(folder / "out"), "--beam_size", "None"]
    options += ["--compilation_cache", "False"]
    quick = ["--temperature_increment_on_fallback", "None", "--output_format", "txt", "--language", "en"]
    try:
        code = main([*options, *quick, *map(str, arguments)])
    except SystemExit as exit:
        code = int(exit.code or 0)
    lines = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in lines)
    return code, lines


BAD_FILES = {
    "missing.wav": "No such file",
    "empty.wav": "empty",
    "text.wav": "cannot be read as audio",
    "nothing.wav": "no decodable audio",
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_an_unreadable_file_costs_one_line_and_the_others_are_done(name, digits, speech, tmp_path, capsys):
    if name == "empty.wav":
        (tmp_path / name).touch()
    elif name == "text.wav":
        (tmp_path / name).write_text("this is no sound")
    elif name == "nothing.wav":
        write_wav(tmp_path / name, np.zeros((0, 1)))
    code, lines = run(digits, tmp_path, tmp_path / name, speech, capsys=capsys)
    assert code == 1
    (line,) = lines
    assert name in line
    assert BAD_FILES[name] in line
    assert (tmp_path / "out" / "en_short_3s.txt").read_text() == "Six zero nine.\n"
    assert not (tmp_path / "out" / name.replace(".wav", ".txt")).exists()


def test_odd_but_usable_sound_is_transcribed_with_a_warning_and_why_there_is_no_text(digits, speech, tmp_path, capsys):
    tone = (3000 * np.sin(np.arange(320) / 5)).astype(np.int16)[:, None]
    whole = write_mp3(tmp_path / "whole.mp3", speech).read_bytes()
    (tmp_path / "cut.mp3").write_bytes(whole[: len(whole) // 2 + 7])
    cases = {
        "20_ms": (write_wav(tmp_path / "20_ms.wav", tone), "20 ms"),
        "silent": (write_wav(tmp_path / "silent.wav", np.zeros((20_000, 1))), "silence"),
        "cut": (tmp_path / "cut.mp3", "damaged"),
    }
    for name, (path, says) in cases.items():
        code, lines = run(digits, tmp_path, path, capsys=capsys)
        assert code == 0, lines
        warned, *why_empty = lines
        assert says in warned
        text = (tmp_path / "out" / f"{name}.txt").read_text()
        assert ([": no text: " in line for line in why_empty]) == ([] if text else [True])


def test_an_unreadable_file_in_a_batch_costs_one_line_too(digits, speech, tmp_path, capsys):
    other = write_wav(tmp_path / "tone.wav", (3000 * np.sin(np.arange(16_000) / 5)).astype(np.int16)[:, None])
    missing = tmp_path / "missing.wav"
    code, lines = run(digits, tmp_path, speech, missing, other, "--batch_size", "2", capsys=capsys)
    assert (code, lines) == (1, [f"whisper-nnx: {missing}: No such file or directory; check the path"])
    assert (tmp_path / "out" / "en_short_3s.txt").read_text() == "Six zero nine.\n"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["en_short_3s.txt", "tone.txt"]


def test_speakers_are_told_apart_in_stereo_and_refused_in_mono(digits, speech, tmp_path, capsys):
    samples = (32767 * load_audio(speech)).astype(np.int16)
    stereo = write_wav(tmp_path / "stereo.wav", np.stack([samples // 10, samples], axis=1))
    code, lines = run(digits, tmp_path, stereo, speech, "--diarize", "True", capsys=capsys)
    assert code == 1
    (line,) = lines
    assert line.startswith(f"whisper-nnx: {speech}: the recording has 1 channel, but --diarize compares 2")
    assert (tmp_path / "out" / "stereo.txt").read_text() == "(speaker 1) Six zero nine.\n"


def test_seven_channels_at_8_khz_are_mixed(digits, tmp_path, capsys):
    samples = np.random.default_rng(0).integers(-3000, 3000, (8_000, 7))
    code, lines = run(digits, tmp_path, write_wav(tmp_path / "seven.wav", samples, 8_000), capsys=capsys)
    assert (code, lines) == (0, [])


def test_a_sample_that_is_no_number_is_named(digits):
    samples = np.zeros(16_000, np.float32)
    samples[1234] = np.nan
    with pytest.raises(ValueError, match="sample 1234"):
        transcribe(load_model(str(digits)), samples)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--language", "klingon"], "klingon"),
        (["--model", "gigantic"], "gigantic"),
        (["--clip_timestamps", "9,3"], "9.0 to 3.0"),
        (["--beam_size", "0"], "beam_size"),
        (["--patience", "-1", "--beam_size", "5"], "patience"),
        (["--temperature", "-1"], "temperature"),
        (["--max_words_per_line", "3"], "word_timestamps"),
        (["--device", "tpu"], "tpu"),
        (["--output_format", "docx"], "docx"),
        (["--max_len", "20"], "token_timestamps"),
        (["--vad_speech_pad_ms", "100"], "vad_filter"),
        (["--alignment_heads", "9,9,9", "--word_timestamps", "True"], "9,9,9"),
        (["--alignment_heads", "2"], "word_timestamps"),
    ],
)
def test_an_option_that_cannot_be_met_is_one_line(arguments, says, digits, speech, tmp_path, capsys):
    code, lines = run(digits, tmp_path, speech, *arguments, capsys=capsys)
    assert code != 0
    assert says in lines[-1]
    assert sum("error" in line or "whisper-nnx:" in line for line in lines) == 1, lines


def test_beams_and_samples_exclude_each_other():
    from whisper_nnx import DecodingOptions

    with pytest.raises(ValueError, match="beam_size=5 and best_of=3"):
        DecodingOptions(beam_size=5, best_of=3)


def test_an_output_folder_that_cannot_be_written_is_said_before_any_work(digits, speech, tmp_path, capsys):
    (tmp_path / "out").write_text("a file, not a folder")
    code, lines = run(digits, tmp_path, speech, capsys=capsys)
    assert code != 0
    assert len(lines) == 1, lines
    assert "out" in lines[0]


@pytest.mark.parametrize("damage", ["no config", "cut weights"])
def test_a_damaged_model_folder_is_one_line(damage, digits, speech, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(digits, folder, ignore=shutil.ignore_patterns("*.pt"), copy_function=shutil.copyfile)
    if damage == "no config":
        (folder / "config.json").unlink()
    else:
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1_000_000])
    code, lines = run(digits, tmp_path, speech, "--model", folder, capsys=capsys)
    assert code != 0
    assert len(lines) == 1, lines
    assert ("config.json" if damage == "no config" else "model.safetensors") in lines[0]
