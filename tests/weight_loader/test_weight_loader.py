"""Loading and saving checkpoints, and error messages."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import weight_loader.writers.huggingface
from tests.small import quick_compilation  # noqa: F401
from weight_loader import (
    CheckpointError,
    download_whisper_weights,
    get_whisper_config,
    load,
    load_model,
    load_weights_into_nnx_model,
    print_model_info,
    save_pretrained,
)
from weight_loader.load import _convert, abstract_model
from weight_loader.names import COLUMNS, parameters
from weight_loader.writers.huggingface import _generation_ids
from whisper_nnx.model.config import RELEASED, WhisperConfig
from whisper_nnx.model.whisper import Whisper, sinusoids, warn_of_precision
from whisper_nnx.text.special_tokens import SpecialTokens

pytestmark = pytest.mark.filterwarnings("ignore:.*no tokenizer:")
SMALL = WhisperConfig(8, 2, 2, 3, 2, 60, max_source_positions=10, alignment_heads=((1, 0), (2, 1)))
ROOT = Path(__file__).parents[2]


def small_model(dtype=jnp.float32, **changes) -> Whisper:
    return Whisper(replace(SMALL, **changes), rngs=nnx.Rngs(1), dtype=dtype, param_dtype=dtype)


def arrays(model: Whisper) -> dict:
    return {path: np.asarray(variable[...]) for path, variable in nnx.to_flat_state(nnx.state(model))}


def assert_same(ours: Whisper, theirs: Whisper):
    ours, theirs = arrays(ours), arrays(theirs)
    assert ours.keys() == theirs.keys()
    for path, array in ours.items():
        assert array.dtype == theirs[path].dtype, path
        np.testing.assert_array_equal(array, theirs[path], err_msg=str(path))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "small"
    save_pretrained(small_model(), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A checkpoint of a few kilobytes."""
    return Path(shutil.copytree(saved, tmp_path / "small"))


def rewrite(folder: Path, change) -> None:
    """`change` edits the dict of tensors in the folder's weights, or returns another."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors) or tensors, folder / "model.safetensors")


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("tied", [True, False])
def test_the_table_names_every_array_of_the_model_once(tied):
    config = replace(SMALL, tie_word_embeddings=tied)
    table = parameters(config)
    model = nnx.state(abstract_model(config))
    assert sorted(str(path) for path, _ in nnx.to_flat_state(model)) == sorted(str(row.path) for row in table)
    for format in COLUMNS:
        names = [row.stored[format].name for row in table if format in row.stored]
        assert len(set(names)) == len(names) >= len(table) - 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_loads_exactly(tmp_path, dtype, tied):
    model = small_model(jnp.dtype(dtype), tie_word_embeddings=tied)
    save_pretrained(model, tmp_path / "new" / "folder")
    loaded = load_model(tmp_path / "new" / "folder", dtype=dtype)
    assert_same(loaded, model)
    assert loaded.config == model.config == get_whisper_config(tmp_path / "new" / "folder")


def test_every_half_precision_number_is_converted_like_numpy():
    for stored in (np.float16, ml_dtypes.bfloat16):
        every = np.arange(2**16, dtype=np.uint16).view(stored)
        every = every[np.isfinite(every.astype(np.float32))]
        table = every[: len(every) // 256 * 256].reshape(-1, 256)  # including subnormal numbers
        for wanted in (np.float32, np.float16, ml_dtypes.bfloat16):
            with np.errstate(over="ignore"):
                expected = np.ascontiguousarray(table.T).astype(np.float32).astype(wanted)
            ours = np.asarray(_convert(table, (1, 0), wanted))
            assert ours.dtype == wanted
            np.testing.assert_array_equal(ours.view(np.uint8), expected.view(np.uint8))


def test_dtype_applies_to_computation_and_to_parameters_by_default(folder):
    half = load_model(folder, dtype="bfloat16")
    assert {str(array.dtype) for array in arrays(half).values()} == {"bfloat16"}
    assert half.encoder.conv1.dtype == half.decoder.dtype == jnp.bfloat16
    mixed = load_model(folder, dtype=jnp.bfloat16, weights="float32")
    assert {str(array.dtype) for array in arrays(mixed).values()} == {"float32"}
    assert mixed.encode(jnp.ones((1, 80, 20))).dtype == mixed.decoder.dtype == jnp.bfloat16


@pytest.mark.parametrize(("platform", "dtype"), [("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")])
def test_without_a_dtype_the_platform_chooses_it(folder, monkeypatch, platform, dtype):
    assert load._default_device() == jax.devices()[0]
    monkeypatch.setattr(load, "_default_device", lambda: SimpleNamespace(platform=platform))
    model = load_model(folder)
    assert {str(array.dtype) for array in arrays(model).values()} == {dtype}
    assert f"computes in {dtype}" in repr(model)
    warn_of_precision(model, dtype != "float32")
    with pytest.warns(UserWarning, match=f"the model computes in {dtype}"):
        warn_of_precision(model, dtype == "float32")
    assert str(load_model(folder, dtype="float16").decoder.dtype) == "float16"


@pytest.mark.parametrize("weights", ["fp16", "int4", jnp.float64])
def test_other_weights_are_rejected(folder, weights):
    with pytest.raises(ValueError, match=r"weights=.* is not supported; choose float32, bfloat16, float16, int8"):
        load_model(folder, weights=weights)


@pytest.mark.parametrize("dtype", ["fp16", "int8", "float64", 7])
def test_another_dtype_is_rejected(folder, dtype):
    with pytest.raises(ValueError, match=f"dtype={dtype!r} is not supported; choose float32, bfloat16, float16"):
        load_model(folder, dtype=dtype)


def test_a_mesh_that_cannot_be_is_refused_by_its_name(folder):
    with pytest.raises(ValueError, match="mesh=0 must be a number of devices"):
        load_model(folder, mesh=0)


def test_shards_equal_the_single_file_and_saving_again_removes_them(folder, tmp_path):
    model = load_model(folder)
    save_pretrained(model, tmp_path / "shards", max_shard_size=4000)
    files = {file.name for file in (tmp_path / "shards").glob("model*")}
    assert "model.safetensors.index.json" in files
    assert "model.safetensors" not in files
    assert len(files) > 3
    assert_same(load_model(tmp_path / "shards"), model)
    save_pretrained(model, tmp_path / "shards")
    assert [file.name for file in (tmp_path / "shards").glob("model*")] == ["model.safetensors"]


def test_the_single_file_takes_precedence_over_an_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "missing.safetensors"}}')
    assert load_model(folder).config == SMALL


def test_names_may_lack_their_prefix(folder):
    model = load_model(folder)
    rewrite(folder, lambda tensors: {name.removeprefix("model."): array for name, array in tensors.items()})
    assert_same(load_model(folder), model)


def test_sinusoids_are_read_or_computed(folder):
    rewrite(folder, lambda tensors: tensors["model.encoder.embed_positions.weight"].fill(0.5))
    assert (load_model(folder).encoder.embed_positions[...] == 0.5).all()
    rewrite(folder, lambda tensors: tensors.pop("model.encoder.embed_positions.weight") is None)
    np.testing.assert_array_equal(load_model(folder).encoder.embed_positions[...], sinusoids(10, 8))


def test_a_tied_output_layer_is_ignored(folder):
    model = load_model(folder)
    rewrite(folder, lambda tensors: tensors.update({"proj_out.weight": tensors["model.decoder.embed_tokens.weight"]}))
    assert_same(load_model(folder), model)


def test_a_checkpoint_without_generation_config_loads(folder):
    (folder / "generation_config.json").unlink()
    assert load_model(folder).config == replace(SMALL, alignment_heads=None)


def test_alignment_heads_of_a_larger_teacher_are_ignored_with_a_warning(folder):
    edit_json(folder / "generation_config.json", alignment_heads=[[31, 0]])
    with pytest.warns(UserWarning, match=r"ignored .decoder head \(31, 0\) does not exist"):
        assert get_whisper_config(folder).alignment_heads is None


@pytest.mark.filterwarnings("default:.*no tokenizer:")
def test_without_a_tokenizer_the_model_loads_with_a_warning(folder):
    with pytest.warns(UserWarning, match=r"no tokenizer: .* missing.*\(the model loads, but transcribing"):
        assert load_model(folder).tokenizer is None


def test_missing_unexpected_and_misshapen_tensors_are_listed_in_one_error(folder):
    def change(tensors):
        del tensors["model.encoder.layers.0.fc1.bias"], tensors["model.decoder.layer_norm.weight"]
        tensors |= {"extra": np.zeros(2, np.float32), "model.encoder.conv1.bias": np.zeros(3, np.float32)}
        return tensors

    rewrite(folder, change)
    with pytest.raises(CheckpointError) as raised:
        load_model(folder)
    message = str(raised.value)
    assert message.startswith(
        f"{folder}: the weights do not fit the configuration (d_model=8, 2 and 3 layers, vocab_size=60)"
    )
    assert "missing: model.encoder.layers.0.fc1.bias, model.decoder.layer_norm.weight;" in message
    assert "unexpected: extra;" in message
    assert "misshapen: model.encoder.conv1.bias is (3,), expected (8,);" in message
    assert "\n" not in message


def test_an_embedding_with_another_vocabulary_size_is_rejected_with_both_numbers(folder):
    rewrite(
        folder, lambda tensors: tensors.update({"model.decoder.embed_tokens.weight": np.zeros((64, 8), np.float32)})
    )
    with pytest.raises(CheckpointError, match=r"vocab_size=60.*embed_tokens.weight is \(64, 8\), expected \(60, 8\)"):
        load_model(folder)


def test_quantized_tensors_are_rejected(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.decoder.layers.0.fc1.weight": np.zeros((32, 8), np.int8)}))
    with pytest.raises(
        CheckpointError, match=r"layers.0.fc1.weight is stored as I8, expected one of F64, F32, F16, BF16"
    ):
        load_model(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "is empty"),
        (lambda data: data[:-100], r"is truncated: \d+ bytes of \d+"),
        (lambda data: data[:50], r"is truncated: 50 bytes of at least \d+"),
        (lambda data: data[:5], "is truncated: 5 bytes of at least"),
        (lambda data: data + b"more", "is damaged"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer.*git lfs pull"),
        (lambda data: b"<html>not found</html>", "is not a safetensors file"),
        (lambda data: data[:8] + b"x" * len(data[8:]), "is not a safetensors file"),
    ],
)
def test_a_damaged_file_is_named_with_the_reason(folder, damage, message):
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=f"^{file} {message}"):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "has no config.json; give the folder of a complete Hugging Face checkpoint"),
        ("config.json", "{", "is not valid JSON .*; download it again"),
        ("config.json", "\udcff", "is not valid JSON .*; download it again"),
        ("config.json", "[1]", "contains a list, expected an object"),
        ("config.json", '{"model_type": "bert"}', "config.json: model_type='bert' is not 'whisper'"),
        ("config.json", '{"d_model": 8}', "config.json: config.json lacks encoder_layers"),
        ("tokenizer.json", "{", "tokenizer.json"),
        ("generation_config.json", "nonsense", "generation_config.json is not valid JSON"),
        ("model.safetensors", None, r"contains no readable checkpoint \(config.json, generation_config.json"),
    ],
)
def test_a_missing_or_unreadable_file_is_named(folder, name, content, message):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=f"^{folder}.*{message}"):
        load_model(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "model-00001-of-00002.safetensors"}, "lacks model-00001-of-00002.safetensors, which .* names"),
        ({"a": "../small/config.json"}, "names '../small/config.json', not a safetensors file in its folder"),
        ({"a": "/etc/passwd"}, "names '/etc/passwd', not a safetensors file in its folder"),
        ({"a": "sub/model-00001-of-00002.safetensors"}, "not a safetensors file in its folder"),
        ({"a": ".."}, "names '..', not a safetensors file in its folder"),
        ({"a": [1]}, "has no weight_map"),
        ({}, "has no weight_map"),
        (None, "has no weight_map"),
    ],
)
def test_an_invalid_index_is_rejected(folder, weight_map, message):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_an_existing_folder_takes_precedence_over_a_name(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    folder.rename("tiny")
    assert load_model("tiny").config == SMALL


@pytest.mark.parametrize("name", ["./nothing", "/nowhere/model", "~/nothing", "model.pt", "a/b/c", Path("nothing")])
def test_a_path_that_does_not_exist_is_a_missing_file(name):
    with pytest.raises(FileNotFoundError, match="does not exist; give an existing folder or a name such as 'tiny'"):
        load_model(name)


@pytest.mark.parametrize("name", ["huge", "", "large v3"])
def test_an_unknown_name_is_rejected_with_known_ones(name):
    with pytest.raises(CheckpointError, match=f"unknown model '{name}'; .* one of tiny, tiny.en, .*turbo"):
        load_model(name)


def test_a_file_next_to_its_configuration_loads_like_its_folder(folder):
    assert_same(load_model(folder / "model.safetensors"), load_model(folder))


def test_downloaded_weights_are_as_stored_and_load_into_a_model_in_its_dtype(tmp_path):
    stored = small_model(jnp.float16)
    save_pretrained(stored, tmp_path / "half")
    params, config = download_whisper_weights(tmp_path / "half")
    assert {str(array.dtype) for array in jax.tree.leaves(params)} == {"float16"}
    other, _ = download_whisper_weights(tmp_path / "half", dtype="bfloat16")
    assert {str(array.dtype) for array in jax.tree.leaves(other)} == {"bfloat16"}
    model = Whisper(config)
    load_weights_into_nnx_model(model, params)
    for path, array in arrays(model).items():
        assert array.dtype == jnp.float32
        np.testing.assert_array_equal(array, arrays(stored)[path], err_msg=str(path))


def test_a_state_and_layers_numbered_by_strings_load_into_a_model(folder):
    model, other = small_model(), load_model(folder)
    zeros = jax.tree.map(jnp.zeros_like, nnx.state(model))
    load_weights_into_nnx_model(model, zeros)
    assert not any(array.any() for array in arrays(model).values())
    params = nnx.to_pure_dict(nnx.state(other))
    for side in params.values():
        side["layers"] = {str(i): layer for i, layer in side["layers"].items()}
    load_weights_into_nnx_model(model, params)
    assert_same(model, other)


def test_params_of_another_shape_leave_the_model_unchanged(folder):
    model, other = (
        load_model(folder),
        abstract_model(replace(SMALL, decoder_layers=2, vocab_size=50, alignment_heads=())),
    )
    with pytest.raises(CheckpointError, match=r"missing: decoder.layers.2.*misshapen: decoder.embed_tokens.embedding"):
        load_weights_into_nnx_model(model, nnx.state(other))
    assert_same(model, load_model(folder))


def test_a_failed_save_leaves_the_folder_unchanged(folder, monkeypatch):
    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    monkeypatch.setattr(weight_loader.writers.huggingface, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(small_model(jnp.float16), folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_saved_weights_have_the_permissions_of_other_files(folder):
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1


def test_the_digits_checkpoint_keeps_its_tokenizer_and_its_ids(digits, tmp_path):
    model = load_model(digits)
    save_pretrained(model, tmp_path / "again")
    ours, theirs = (json.loads((f / "generation_config.json").read_text()) for f in (tmp_path / "again", digits))
    assert {name: ours[name] for name in theirs} == theirs
    for name, content in model.tokenizer.files.items():
        assert (tmp_path / "again" / name).read_bytes() == content == (digits / name).read_bytes()
    assert_same(load_model(tmp_path / "again"), model)


def test_an_english_only_model_is_saved_without_languages_and_tasks():
    special = SpecialTokens(50256, 50257, 50358, 50357, 50359, 50360, 50361, 50362, 50363, 51863, (("en", 50258),))
    tokenizer = SimpleNamespace(special=special, is_multilingual=False, non_speech_tokens=(1, 2), blank_tokens=(220,))
    ids = _generation_ids(tokenizer)
    assert ids["is_multilingual"] is False
    assert not {"lang_to_id", "task_to_id"} & ids.keys()
    assert ids["suppress_tokens"] == [1, 2, 50257, 50357, 50358, 50359, 50360, 50361]
    assert ids["begin_suppress_tokens"] == [220, 50256]


def test_model_info_has_the_published_number_of_parameters(capsys):
    print_model_info(RELEASED["tiny"])
    told = capsys.readouterr().out
    assert "37,184,640" in told
    assert "float32 149 MB" in told


def test_an_abstract_model_has_no_memory():
    shapes = nnx.state(abstract_model(RELEASED["large-v3"], jnp.bfloat16, jnp.bfloat16))
    assert {type(leaf) for leaf in jax.tree.leaves(shapes)} == {jax.ShapeDtypeStruct}


def test_importing_the_package_imports_no_jax():
    code = "import sys, weight_loader; assert not {'jax', 'flax', 'huggingface_hub', 'tiktoken'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
