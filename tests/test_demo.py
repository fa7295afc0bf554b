"""The model in the package, on the recordings in examples/audio: what a user sees first."""

import subprocess
import sys
from pathlib import Path

import jiwer
import numpy as np
import pytest

from tests.small import quick_environment
from weight_loader import load_model
from whisper_nnx import detect_language, log_mel_spectrogram, pad_or_trim, transcribe
from whisper_nnx.audio.loading import SAMPLE_RATE, load_audio
from whisper_nnx.evaluation.normalizers import normalize

ROOT = Path(__file__).parents[1]
AUDIO = ROOT / "examples" / "audio"
LANGUAGES = ("en", "de", "es", "fr")
MODEL = load_model("demo")


def errors(text: str, language: str, times: int = 1) -> float:
    """Word error rate against what is said, so many times over, in a recording of examples/audio."""
    said = times * (AUDIO / f"{language}.txt").read_text("utf-8")
    return jiwer.wer(normalize(said, language, "basic"), normalize(text, language, "basic"))


def test_it_is_small_and_has_a_vocabulary_of_its_own():
    folder = Path(sys.modules["whisper_nnx"].__file__).parent / "assets" / "demo"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 10_000_000
    assert MODEL.tokenizer.special.eot == 1000  # as many text tokens
    assert MODEL.tokenizer.languages[:4] == ("en", "zh", "de", "es")
    assert MODEL.config.alignment_heads
    card = (folder / "README.md").read_text("utf-8")
    assert "CC BY-SA 4.0" in card
    assert "no general recognizer" in card


@pytest.mark.parametrize("language", LANGUAGES)
def test_it_hears_what_is_said_and_in_which_language(language):
    found = transcribe(MODEL, AUDIO / f"{language}.flac", word_timestamps=True)
    assert found["language"] == language
    assert errors(found["text"], language) <= 0.1
    words = [word for segment in found["segments"] for word in segment["words"]]
    times = [time for word in words for time in (word["start"], word["end"])]
    assert times == sorted(times)
    assert times[-1] <= len(load_audio(AUDIO / f"{language}.flac")) / SAMPLE_RATE


def test_languages_are_told_apart_by_detect_language():
    for language in LANGUAGES:
        mel = log_mel_spectrogram(pad_or_trim(load_audio(AUDIO / f"{language}.flac")), 80)
        _, probabilities = detect_language(MODEL, mel)
        assert max(probabilities, key=probabilities.get) == language


def test_a_long_recording_is_transcribed_window_by_window():
    once = load_audio(AUDIO / "en.flac")
    found = transcribe(MODEL, np.concatenate([once, np.zeros(25 * SAMPLE_RATE, np.float32), once]), language="en")
    assert errors(found["text"], "en", times=2) <= 0.1
    assert any(segment["start"] > len(once) / SAMPLE_RATE + 20 for segment in found["segments"])


@pytest.mark.filterwarnings("ignore:.*digital silence")
@pytest.mark.parametrize("level", [0.0, 0.001])
def test_silence_gives_no_text(level):
    noise = level * np.random.default_rng(0).standard_normal(40 * SAMPLE_RATE, dtype=np.float32)
    assert transcribe(MODEL, noise)["text"].strip() == ""


def test_the_first_command_of_the_readme_prints_lines_with_times(tmp_path):
    command = [sys.executable, "-m", "whisper_nnx.transcribe", str(AUDIO / "en.flac"), "--model", "demo"]
    environment = quick_environment() | {"HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    lines = [line for line in finished.stdout.splitlines() if "-->" in line]
    assert lines
    assert errors(" ".join(line.split("]", 1)[1] for line in lines), "en") <= 0.1
    assert {file.suffix for file in tmp_path.iterdir()} == {".txt", ".vtt", ".srt", ".tsv", ".json"}


def test_a_folder_of_that_name_goes_before_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    with pytest.raises(ValueError, match="demo"):
        load_model("demo")
