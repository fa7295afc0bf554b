"""`python -m whisper_nnx.train`: messages, outputs, and runs that are killed and resumed."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from tests.small import quick_compilation, quick_environment, small_config, small_model  # noqa: F401
from tests.training.recordings import cache, write_manifest  # noqa: F401
from weight_loader import load_model, save_pretrained
from whisper_nnx.cli.train import main, make_evaluate
from whisper_nnx.training.config_file import load_config
from whisper_nnx.training.metrics import read_records
from whisper_nnx.training.run import read_rows

# Runs the command and kills it before it renames the checkpoint of a step.
CHILD = """
import os, signal, sys

step, rename = sys.argv[1], os.rename

def die_or_rename(source, target):
    if str(target).endswith(f"checkpoints/{step}"):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)

os.rename = die_or_rename
from whisper_nnx.cli.train import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small model and twelve recordings of noise, each with a word."""
    folder = tmp_path_factory.mktemp("train")
    write_manifest(folder)
    save_pretrained(small_model(decoder_layers=1), folder / "model")
    return folder


@pytest.fixture
def words(folder, cache, tmp_path) -> list[str]:  # noqa: F811
    """Arguments of a run of eight steps in an output of its own."""
    (tmp_path / "run.toml").write_text(f"""
        output = "{tmp_path / "out"}"
        steps = 8
        batch_size = 2
        log_every = 1
        save_every = 3
        [model]
        init = "{folder / "model"}"
        [data]
        train = ["{folder / "train.jsonl"}"]
        window_s = 1.0
        max_label_length = 24
        [augment]
        speed = 0.1
        noise_rate = 0.5
        time_masks = 1
        time_mask_s = 0.1
        [optimizer]
        warmup_steps = 2
        learning_rate = 1e-3
        decay = "constant"
        ema_decay = 0.9
    """)
    return ["--config", str(tmp_path / "run.toml"), "--compilation_cache", str(cache)]


@pytest.fixture
def run(words, capsys, monkeypatch):
    """Runs the command in this process; returns its exit status and the lines on stderr.

    The compilation cache is disabled, since it would stay on for later tests.
    """
    monkeypatch.setattr("whisper_nnx.runtime.compilation_cache.choose_compilation_cache", lambda wanted: None)

    def run(*more: str) -> tuple[int, list[str]]:
        try:
            code = main([*words, *more])
        except SystemExit as exit:
            code = int(exit.code or 0)
        return code, capsys.readouterr().err.splitlines()

    return run


def in_a_process(killed_at: int | None, words: list[str], *more: str) -> int:
    environment = quick_environment()
    command = [sys.executable, "-c", CHILD, str(killed_at), *words, *more]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode


def weights(output: Path) -> bytes:
    return (output / "export" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_killed_and_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(words, tmp_path):
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    assert in_a_process(None, words, "--output", str(uninterrupted)) == 0
    again = (words, "--output", str(killed))
    assert in_a_process(6, *again) == -signal.SIGKILL
    assert [path.name for path in (killed / "checkpoints").iterdir() if path.name.isdigit()] == ["3"]
    assert in_a_process(None, *again) == 0
    assert weights(killed) == weights(uninterrupted)
    ours, theirs = (read_records(output / "metrics.jsonl") for output in (killed, uninterrupted))
    assert [record["step"] for record in ours] == list(range(1, 9))
    for our, their in zip(ours, theirs, strict=True):
        assert {**our, "windows_per_s": 0} == {**their, "windows_per_s": 0}


def test_a_run_with_damaged_checkpoints_ends_with_the_weights_of_an_uninterrupted_one(run, tmp_path):
    assert run()[0] == 0
    output = tmp_path / "out"
    uninterrupted, records = weights(output), read_records(output / "metrics.jsonl")
    shutil.rmtree(output / "export")
    (output / "checkpoints" / "8" / "state" / "manifest.ocdbt").write_bytes(b"")
    (output / "checkpoints" / "6" / "notes" / "metadata").unlink()
    code, lines = run()
    assert code == 0, lines
    warned = [line for line in lines if "is damaged" in line]
    assert [line.partition(" is damaged")[0] for line in warned] == [
        f"whisper-nnx: {output}/checkpoints/{step}" for step in (8, 6)
    ]
    assert f"{output}: resuming at step 3 of 8" in lines
    assert weights(output) == uninterrupted
    for ours, theirs in zip(read_records(output / "metrics.jsonl"), records, strict=True):
        assert {**ours, "windows_per_s": 0} == {**theirs, "windows_per_s": 0}


def test_a_run_writes_a_loadable_model_curves_and_configuration(run, tmp_path):
    code, lines = run("--steps", "2")
    assert code == 0
    assert lines[-1] == f"whisper-nnx: {tmp_path}/out/export holds the model after 2 steps"
    names = {path.name for path in (tmp_path / "out").iterdir()} - {".lock"}
    assert names == {"checkpoints", "config.json", "curves.png", "export", "metrics.jsonl", "tensorboard"}
    assert load_model(tmp_path / "out" / "export").tokenizer == small_model().tokenizer


@pytest.mark.slow
def test_a_new_model_has_the_configured_shape_and_tokenizer(run, folder, tmp_path):
    sizes = {**vars(small_config()), "decoder_layers": 1, "dropout": 0.1}
    names = ("d_model", "encoder_layers", "encoder_attention_heads", "decoder_layers", "decoder_attention_heads")
    names += ("vocab_size", "num_mel_bins", "max_source_positions", "max_target_positions", "dropout")
    shape = [word for name in names for word in (f"--model.shape.{name}", str(sizes[name]))]
    code, lines = run("--steps", "1", "--model.init=", "--model.tokenizer", str(folder / "model"), *shape)
    assert code == 0, lines
    made = load_model(tmp_path / "out" / "export")
    assert {name: getattr(made.config, name) for name in names} == {name: sizes[name] for name in names}
    assert made.tokenizer == small_model().tokenizer


def test_a_distilled_student_has_the_teachers_encoder_and_fewer_layers(run, tmp_path):
    save_pretrained(small_model(), tmp_path / "teacher")
    teacher = ["--distill.teacher", str(tmp_path / "teacher"), "--distill.decoder_layers", "1"]
    code, lines = run("--steps", "1", "--model.init=", *teacher, "--optimizer.freeze", "encoder")
    assert code == 0, lines
    student, teacher = load_model(tmp_path / "out" / "export"), small_model()
    assert student.config.decoder_layers == 1
    for ours, theirs in zip(*(jax.tree.leaves(nnx.state(m.encoder)) for m in (student, teacher)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    [record] = read_records(tmp_path / "out" / "metrics.jsonl")
    assert record["kl"] > 0


@pytest.mark.slow
def test_a_finished_run_continues_with_more_steps_and_rejects_fewer(run, tmp_path):
    run("--steps", "2")
    code, lines = run("--steps", "3")
    assert code == 0
    assert f"{tmp_path}/out: resuming at step 2 of 3" in lines
    code, lines = run("--steps", "2")
    assert code == 1
    assert lines[-1] == f"whisper-nnx: error: steps=2, but {tmp_path}/out is already at step 3; give more steps"
    code, lines = run("--steps", "3", "--batch_size", "3")
    assert code == 1
    assert "contains a run with another configuration (batch_size: 2 -> 3); undo the changes" in lines[-1]
    code, lines = run("--restart")
    assert code == 2
    assert "--restart needs an empty output" in lines[-1]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_with_step_rows_and_checkpoint(run, folder, tmp_path):
    code, lines = run("--optimizer.learning_rate", "1e30", "--save_every", "1")
    assert code == 1
    assert "Traceback" not in "".join(lines)
    *_, last = lines
    step = int(last.partition(" at step ")[2].partition(",")[0])
    assert f"{folder / 'train.jsonl'}:" in last
    assert "lower optimizer.learning_rate=1e+30" in last
    assert f"the last checkpoint is of step {step - 1}" in last
    kept = [int(path.name) for path in (tmp_path / "out" / "checkpoints").iterdir() if path.name.isdigit()]
    assert max(kept) == step - 1
    assert [record["step"] for record in read_records(tmp_path / "out" / "metrics.jsonl")] == list(range(1, step))
    assert not (tmp_path / "out" / "export").exists()


def test_bad_rows_are_reported_by_line_and_do_not_stop_a_run(run, folder, tmp_path):
    manifest = tmp_path / "some.jsonl"
    good = json.dumps({"audio": str(folder / "0.wav"), "text": "one", "language": "en"})
    missing = json.dumps({"audio": "nowhere.wav", "text": "one", "language": "en"})
    manifest.write_text(f"{good}\n{missing}\n{good}\nnonsense\n")
    code, lines = run("--steps", "1", "--data.train", str(manifest))
    assert code == 0
    assert any(line.startswith(f"{manifest}:2: ") and "nowhere.wav" in line for line in lines)
    assert any(line.startswith(f"{manifest}:4: ") for line in lines)
    assert f"{manifest}: 2 rows of 0.00 h; 2 rows cannot be used" in lines


@pytest.mark.parametrize("evaluated", ["train", "other"])
def test_bad_rows_of_a_manifest_are_reported_once(folder, tmp_path, capsys, evaluated):
    row = json.dumps({"audio": str(folder / "0.wav"), "text": "one", "language": "en"})
    files = {name: tmp_path / f"{name}.jsonl" for name in ("train", "other")}
    for file in files.values():
        file.write_text(f"{row}\nnonsense\n")
    manifests = ("--data.train", str(files["train"]), "--evaluate.manifest", *[str(files[evaluated])] * 2)
    config, model = load_config(None, ["--model.init", "x", *manifests]), small_model()
    assert make_evaluate(config, model) is not None
    read_rows(config, model.tokenizer)
    lines = capsys.readouterr().err.splitlines()
    assert sum(f"{files[evaluated]}:2: " in line for line in lines) == 1
    assert sum(f"{files['train']}:2: " in line for line in lines) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--optimizer.learning_rat 1", "optimizer.learning_rat is unknown; did you mean optimizer.learning_rate?"),
        ("--config nowhere.toml", "nowhere.toml: No such file or directory"),
        ("--data.train nowhere.jsonl", "nowhere.jsonl"),
        ("--model.init nowhere/at/all", "nowhere/at/all does not exist"),
        ("--data.window_s 2", "data.window_s=2.0 is longer than the model's window of 1 s"),
        ("--data.max_label_length 49", "data.max_label_length=49 is more than the model's 48 positions"),
        ("--loss.guide_weight 1 --loss.guide_heads 7:0", "decoder head (7, 0) does not exist"),
        ("--evaluate.manifest nowhere.jsonl", "nowhere.jsonl"),
        ("--evaluate.manifest {} --evaluate.options.beam_siz 3", "evaluate.options: "),
        (
            "--evaluate.manifest {} --evaluate.options.normalizer french",
            "evaluate.options: normalizer='french' is unknown",
        ),
        ("--threads -1", "argument --threads"),
    ],
)
def test_mistakes_give_one_line_and_no_run(run, folder, tmp_path, more, message):
    code, lines = run(*more.format(folder / "train.jsonl").split())
    assert code != 0
    assert message in lines[-1]
    assert lines[-1].startswith("whisper-nnx: error: ")
    assert not any("Traceback" in line for line in lines)
    assert not (tmp_path / "out" / "export").exists()


def test_help_imports_neither_jax_nor_numpy_and_lists_every_name():
    code = """
import sys
from whisper_nnx.cli.train import main
try:
    main(["--help"])
finally:
    print({"jax", "numpy", "orbax", "grain"} & sys.modules.keys())
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=100)
    assert done.stdout.startswith("usage: python -m whisper_nnx.train")
    assert "--optimizer.learning_rate" in done.stdout
    assert done.stdout.endswith("set()\n")


@pytest.mark.slow
def test_a_run_that_evaluates_writes_error_rates_and_keeps_the_best(run, folder, tmp_path):
    held_out = folder / "held_out.jsonl"
    held_out.write_text("".join((folder / "train.jsonl").read_text().splitlines(True)[:3]))
    code, lines = run(
        "--evaluate.manifest", str(held_out), "--evaluate.every", "4", "--evaluate.options.sample_len", "3"
    )
    assert code == 0, lines
    rates = [record["wer"] for record in read_records(tmp_path / "out" / "metrics.jsonl") if "wer" in record]
    assert len(rates) == 2
    assert load_model(tmp_path / "out" / "best").config == load_model(folder / "model").config


@pytest.mark.slow
def test_unreadable_recordings_of_an_evaluation_are_reported_by_line(run, folder, tmp_path, monkeypatch):
    module = importlib.import_module("whisper_nnx.evaluation.run")
    real = module._result

    def without_the_second(row, task, guessed, heard, normalizer):
        heard = ValueError("gone") if row.line == 2 else heard
        return real(row, task, guessed, heard, normalizer)

    monkeypatch.setattr(module, "_result", without_the_second)
    manifest = folder / "train.jsonl"
    code, lines = run(
        *("--evaluate.manifest", str(manifest), "--evaluate.every", "8", "--evaluate.max_rows", "2"),
        *("--evaluate.options.sample_len", "3"),
    )
    assert code == 0, lines
    assert [line for line in lines if line.endswith(f"{manifest}:2: gone")]
