"""Training and evaluation of a released English-only checkpoint on real speech with the README's commands."""

import json
import re

import pytest

from tests.small import quick_compilation  # noqa: F401
from weight_loader import load_model
from whisper_nnx.cli.evaluate import main as evaluate
from whisper_nnx.cli.train import main as train

pytestmark = pytest.mark.real
TEXT = "he began a confused complaint against the wizard who had vanished behind the curtain on the left"


@pytest.mark.slow
def test_an_english_only_checkpoint_is_fine_tuned_and_evaluated(
    real_tiny_en, real_speech, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("whisper_nnx.runtime.compilation_cache.choose_compilation_cache", lambda wanted: None)
    rows = [{"audio": str(real_speech("en_libri_5s.flac")), "text": TEXT}]  # English is the default
    rows.append({"audio": str(real_speech("es_libri_17s.opus")), "text": "la sorpresa", "language": "es"})
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)))
    run = ["--model.init", str(real_tiny_en), "--data.train", str(manifest), "--evaluate.manifest", str(manifest)]
    size = ["--data.window_s", "6", "--data.max_label_length", "64", "--steps", "1", "--batch_size", "1"]
    rate = ["--optimizer.learning_rate", "1e-6", "--evaluate.options.temperature", "0"]
    assert train([*run, *size, *rate, "--lora.rank", "2", "--output", str(tmp_path / "run")]) == 0
    errors = capsys.readouterr().err
    assert f"{manifest}:2: language 'es' is not one of the model's" in errors
    assert re.search(r"step 1: word error rate 0\.00%", errors)
    assert not load_model(tmp_path / "run" / "best").tokenizer.is_multilingual
    report = ["--model", str(tmp_path / "run" / "best"), "--temperature", "0", "-o", str(tmp_path)]
    manifest.write_text(json.dumps(rows[0]))
    assert evaluate(["--manifest", str(manifest), "--language", "en", *report]) == 0
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["rows"][0]["wer"] == 0
    assert evaluate(["--manifest", str(manifest), "--detect_language", "True", *report]) == 1
    assert "--detect_language True needs a multilingual checkpoint" in capsys.readouterr().err
