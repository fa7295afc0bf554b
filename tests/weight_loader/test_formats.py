"""Round trips through every written format, reported losses, and the two commands."""

import json
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.small import small_model
from weight_loader import CheckpointError, load_model, save_model
from weight_loader.__main__ import main
from weight_loader.checkpoint import Checkpoint, Content
from weight_loader.load import read_arrays
from weight_loader.readers import READERS, _with_alignment_heads, open_checkpoint, reader
from weight_loader.save import content_of
from weight_loader.writers import write_checkpoint
from whisper_nnx.model.config import RELEASED, RELEASED_ALIGNMENT_HEADS
from whisper_nnx.model.whisper import Whisper

SHAPE = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "alignment_heads": ((1, 0), (1, 1))}
OURS = ("hf", "openai")  # the others have tests of their own


def arrays(model: Whisper) -> dict:
    return {path: np.asarray(variable[...]) for path, variable in nnx.to_flat_state(nnx.state(model))}


def assert_same(ours: Whisper, theirs: Whisper):
    ours, theirs = arrays(ours), arrays(theirs)
    assert ours.keys() == theirs.keys()
    for path, array in ours.items():
        assert array.dtype == theirs[path].dtype
        np.testing.assert_array_equal(array, theirs[path], err_msg=str(path))


@pytest.fixture(scope="module")
def model() -> Whisper:
    """A model whose weights are exact in float16."""
    half = small_model(param_dtype=jnp.float16, **SHAPE)
    whole = small_model(**SHAPE)
    for (_, ours), (_, theirs) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (whole, half)), strict=True):
        ours.set_value(theirs[...].astype(jnp.float32))
    return whole


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "model"
    save_model(model, path)
    return path


@pytest.mark.parametrize("format", OURS)
@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_written_models_load_exactly(model, folder, tmp_path, format, dtype):
    save_model(model, tmp_path / "saved", format, dtype)
    loaded = load_model(tmp_path / "saved", tokenizer=folder)
    assert_same(loaded, model)
    assert loaded.config == model.config
    assert loaded.tokenizer == model.tokenizer


def test_bfloat16_survives_a_pt_file(tmp_path, folder):
    half = small_model(param_dtype=jnp.bfloat16, **SHAPE)
    save_model(half, tmp_path / "model.pt", "openai")
    assert_same(load_model(tmp_path / "model.pt", dtype="bfloat16", tokenizer=folder), half)


def test_the_digits_pt_file_equals_the_digits_folder(digits):
    ours, theirs = load_model(digits / "openai.pt"), load_model(digits)
    assert_same(ours, theirs)
    assert ours.config == theirs.config
    assert ours.tokenizer == theirs.tokenizer  # found next to the file, like the alignment heads


def test_exactly_one_reader_detects_each_file(model, folder, tmp_path):
    save_model(model, tmp_path / "named.bin", "openai")  # an unusual name
    for path, expected in ((folder, "huggingface"), (tmp_path / "named.bin", "openai")):
        assert [name for name in READERS if reader(name).detect(path)] == [expected], path


def test_a_tokenizer_can_be_given_and_a_missing_one_warns(model, folder, tmp_path):
    save_model(model, tmp_path / "model.pt", "openai")
    with pytest.warns(UserWarning, match=r"model.pt: no tokenizer: .* is missing; .* tokenizer=FOLDER.*'tiny'"):
        assert load_model(tmp_path / "model.pt").tokenizer is None
    for name in ("vocab.json", "merges.txt", "added_tokens.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert load_model(tmp_path / "model.pt").tokenizer == model.tokenizer
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty'\) lacks tokenizer.json, or vocab.json and merges.txt"):
        load_model(tmp_path / "model.pt", tokenizer=tmp_path / "empty")


def test_alignment_heads_come_from_the_released_size_of_the_name_or_shape():
    one, two, digits = RELEASED["large-v1"], RELEASED["large-v2"], small_model().config
    heads = {}
    for config, path in ((one, "large-v1.pt"), (two, "large-v2.pt"), (two, "mine.pt"), (digits, "large-v1.pt")):
        checkpoint = Checkpoint("openai", path, config, None, iter(()))
        heads[config, path] = _with_alignment_heads(checkpoint, Path("nowhere") / path).alignment_heads
    assert heads[one, "large-v1.pt"] == RELEASED_ALIGNMENT_HEADS["large-v1"]
    assert heads[two, "mine.pt"] == heads[two, "large-v2.pt"] == RELEASED_ALIGNMENT_HEADS["large-v2"]
    assert heads[digits, "large-v1.pt"] is None


def test_arrays_that_a_format_cannot_store_are_rejected(tmp_path):
    with pytest.raises(CheckpointError, match=r"openai supports only 4 \* d_model, not encoder_ffn_dim=32"):
        save_model(small_model(), tmp_path / "model.pt", "openai")
    untied = small_model(tie_word_embeddings=False, **SHAPE)
    with pytest.raises(CheckpointError, match=r"openai cannot store decoder.proj_out.kernel; write the model as hf"):
        save_model(untied, tmp_path / "model.pt", "openai")
    assert list(tmp_path.iterdir()) == []


def test_condition_on_prev_tokens_is_stored_by_hugging_face_and_reported_by_others(model, tmp_path):
    content = content_of(model)
    content = replace(content, config=replace(content.config, condition_on_prev_tokens=False))
    lost = {name: write_checkpoint(content, tmp_path / name, name) for name in ("hf", "openai", "mlx")}
    told = "condition_on_prev_tokens: transcribe with condition_on_previous_text=False"
    assert [name for name, texts in lost.items() if told not in texts] == ["hf"]
    assert load_model(tmp_path / "hf").config == content.config


def test_values_that_overflow_half_precision_are_rejected(model, tmp_path):
    content = content_of(model)
    path = ("decoder", "layer_norm", "bias")
    large = Content(content.config, None, {**content.arrays, path: jnp.full_like(content.arrays[path], 1e6)})
    with pytest.raises(CheckpointError, match=r"decoder.layer_norm.bias has values beyond the range of float16"):
        list(large.tensors("openai", "float16"))
    assert dict(large.tensors("openai", "bfloat16"))["decoder.ln.bias"].max() > 9e5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["{folder}", "{target}", "--to", "openai", "--dtype", "int8"],
            "openai cannot store dtype int8; choose one of float32",
        ),
        (["{folder}", "{folder}", "--to", "hf"], "already exists; remove it or choose another name"),
        (["{folder}/nothing", "{target}", "--to", "hf"], "nothing does not exist"),
        (["{folder}/merges.txt", "{target}", "--to", "hf"], "merges.txt is not a readable checkpoint"),
        (["{folder}", "{folder}/config.json/x", "--to", "openai"], "config.json"),
    ],
)
def test_failed_conversions_give_one_line_and_no_files(folder, tmp_path, capsys, arguments, message):
    filled = [text.format(folder=folder, target=tmp_path / "new") for text in arguments]
    assert main(["convert", *filled]) == 1
    told = capsys.readouterr()
    assert told.err.startswith("error: ")
    assert message in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""
    assert list(tmp_path.iterdir()) == []


def test_converting_back_restores_the_model(model, folder, tmp_path, capsys):
    assert main(["convert", str(folder), str(tmp_path / "a.pt"), "--to", "openai", "--dtype", "float16"]) == 0
    told = capsys.readouterr()
    assert "a.pt: openai, float16" in told.out
    assert "not stored: the alignment heads" in told.err
    assert "set_alignment_heads(b'" in told.err
    assert "not stored: the tokenizer" in told.err
    back = ["convert", str(tmp_path / "a.pt"), str(tmp_path / "b"), "--to", "hf", "--tokenizer", str(folder)]
    assert main([*back, "--dtype", "float32"]) == 0
    assert_same(load_model(tmp_path / "b"), model)
    assert load_model(tmp_path / "b").config == model.config
    for name in ("config.json", "generation_config.json", "preprocessor_config.json", "vocab.json", "merges.txt"):
        assert (tmp_path / "b" / name).read_bytes() == (folder / name).read_bytes()


def test_stored_arrays_are_freed_while_reading(folder):
    checkpoint, alive = open_checkpoint(folder), []

    def watched():
        for name, array in checkpoint.tensors:
            deadline = time.monotonic() + 30  # XLA frees an array some time after its conversion
            while sum(reference() is not None for reference in alive) > 1 and time.monotonic() < deadline:
                time.sleep(0.001)
            assert sum(reference() is not None for reference in alive) <= 1
            copy = array.copy()
            alive.append(weakref.ref(copy))
            yield name, copy
            del copy

    assert len(read_arrays(replace(checkpoint, tensors=watched()), jnp.bfloat16)) == len(alive) > 30


def test_inspect_lists_the_contents_and_what_is_missing(folder, tmp_path, capsys):
    assert main(["inspect", str(folder)]) == 0
    told = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert told["format"] == "Hugging Face"
    assert told["stored"].startswith("float32: ")
    assert told["missing"] == "nothing"
    assert told["languages"] == "en de es fr"
    assert main(["convert", str(folder), str(tmp_path / "a.pt"), "--to", "openai"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "a.pt")]) == 0
    told = capsys.readouterr().out
    assert "openai-whisper" in told
    assert "2 alignment heads" in told
    assert "none; give tokenizer=FOLDER" in told


def test_inspect_of_an_incomplete_checkpoint_names_missing_arrays(folder, tmp_path, capsys):
    from safetensors.numpy import load_file, save_file

    kept = {name: array for name, array in load_file(folder / "model.safetensors").items() if ".fc1." not in name}
    save_file({**kept, "more": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert main(["inspect", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert "model.encoder.layers.0.fc1.weight" in told
    assert "and 1 more" in told
    assert "unexpected  more" in told


def test_implausible_configurations_are_rejected_before_allocation(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("decoder_layers", "vocab_size", "max_source_positions"):
        (tmp_path / "config.json").write_text(json.dumps({**config, name: 10**12}))
        with pytest.raises(
            CheckpointError, match=f"{name}=1000000000000 exceeds the supported maximum of .*; it may be malicious"
        ):
            open_checkpoint(tmp_path)


def test_the_command_runs_without_a_warning():
    run = [sys.executable, "-W", "error", "-m", "weight_loader", "convert", "--help"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0
    assert done.stderr == ""
    assert "--tokenizer" in done.stdout
