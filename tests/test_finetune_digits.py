"""The recipe that fine-tunes on spoken digits: its data, and that its stages follow each other."""

import json
import sys
import wave
from pathlib import Path

import numpy as np
import pytest

from whisper_nnx.training.config_file import load_config

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "finetune_digits"))

import make_manifest

RECIPE = Path(make_manifest.__file__).parent


@pytest.mark.parametrize("way", ["full", "lora"])
def test_the_second_stage_begins_with_the_model_of_the_first_and_sees_whole_windows(way):
    first = load_config(RECIPE / f"{way}.toml", ["--model.init", "CHECKPOINT"])
    second = load_config(RECIPE / f"{way}_windows.toml")
    assert second.model.init == f"{first.output}/export"
    assert first.data.window_s < second.data.window_s == 30
    assert bool(first.lora.rank) == bool(second.lora.rank) == (way == "lora")
    text = (RECIPE / "README.md").read_text("utf-8")
    assert f"--model {second.output}/export" in text
    assert text.index(f"finetune_digits/{way}.toml") < text.index(f"finetune_digits/{way}_windows.toml")


def test_rows_say_which_digit_is_spoken_where(tmp_path):
    random = np.random.default_rng(0)
    lengths = {0: 3000, 7: 5000}  # samples of each digit, which tell them apart
    recordings = {"ann": [(digit, np.full(n, 0.5, np.float32)) for digit, n in lengths.items()]}
    row = make_manifest.make_row(tmp_path, "a.wav", recordings, random)
    assert row["source"] == "ann"
    assert row["text"].split() == [word["word"] for word in row["words"]]
    assert row["text"][0].isupper()
    assert row["text"].endswith(".")
    with wave.open(str(tmp_path / "a.wav")) as file:
        sound = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    digit_of = {"cero": 0, "siete": 7}
    for word in row["words"]:
        start, end = (round(word[name] * make_manifest.RATE) for name in ("start", "end"))
        assert end - start == lengths[digit_of[word["word"].strip(".").lower()]]
        assert (sound[start:end] > 0).all()
        assert sound[start - 1] == sound[end] == 0


@pytest.mark.slow
def test_no_recording_is_both_trained_on_and_validated_with(shared, tmp_path, monkeypatch):
    archive = shared / "data" / "free_spoken_digits_train.tar"
    found = make_manifest.read(archive)
    sounds = {split: {x.tobytes() for rows in of.values() for _, x in rows} for split, of in found.items()}
    assert len(sounds["validation"]) >= 290
    assert len(sounds["train"]) > 2300
    assert not sounds["train"] & sounds["validation"]
    monkeypatch.setattr(make_manifest, "ROWS", {"train": 3, "validation": 2})
    monkeypatch.setattr(sys, "argv", ["make_manifest.py", str(archive), str(tmp_path)])
    make_manifest.main()
    assert len([json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]) == 3
