"""Flax's msgpack files, written by flax's own serializer."""

import json
import re
import tracemalloc
from pathlib import Path

import flax.serialization
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from flax import nnx
from flax.serialization import msgpack_serialize, to_bytes
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

from tests.small import quick_compilation, small_model  # noqa: F401
from weight_loader import CheckpointError, load_model, save_pretrained
from weight_loader.checkpoint import Content
from weight_loader.load import abstract_model
from weight_loader.readers import open_checkpoint
from weight_loader.writers import write_checkpoint
from whisper_nnx.model.config import RELEASED
from whisper_nnx.model.whisper import Whisper

POSITIONS = ("encoder", "embed_positions")
pytestmark = pytest.mark.filterwarnings("ignore:.*no tokenizer:")
SHAPE = {"encoder_layers": 2, "decoder_layers": 2, "alignment_heads": ((1, 0),)}
DTYPES = [jnp.float32, jnp.float16, jnp.bfloat16]


def arrays(model: Whisper) -> dict:
    return {path: variable[...] for path, variable in nnx.to_flat_state(nnx.state(model))}


def flax_tree(model: Whisper | dict) -> dict:
    """Parameters as in FlaxWhisperForConditionalGeneration."""
    tree = {
        ("model", *map(str, path), *(("embedding",) if path == POSITIONS else ())): array
        for path, array in (model if isinstance(model, dict) else arrays(model)).items()
    }
    if (output := ("model", "decoder", "proj_out", "kernel")) in tree:
        tree["lm_head", "kernel"] = tree.pop(output)
    return unflatten_dict(tree)


def checkpoint(model: Whisper, folder: Path, data: bytes | None = None) -> Path:
    """A Hugging Face folder with such a file in place of its weights."""
    save_pretrained(model, folder)
    (folder / "model.safetensors").unlink()
    if data is not None:
        (folder / "flax_model.msgpack").write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def model() -> Whisper:
    return small_model(**SHAPE)


@pytest.fixture
def folder(model, tmp_path) -> Path:
    return checkpoint(model, tmp_path / "model", to_bytes(flax_tree(model)))


def assert_same(ours, theirs):
    ours, theirs = (nnx.to_flat_state(nnx.state(model)) for model in (ours, theirs))
    for (path, array), (other_path, other) in zip(ours, theirs, strict=True):
        assert (path, array.dtype) == (other_path, other.dtype)
        np.testing.assert_array_equal(np.asarray(array[...]), np.asarray(other[...]), err_msg=str(path))


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        list(open_checkpoint(path).tensors)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refused(folder: Path, data: bytes) -> str:
    (folder / "flax_model.msgpack").write_bytes(data)
    return refusal(folder)


def packed(array: np.ndarray, *changes: tuple[int, object]) -> msgpack.ExtType:
    """An array as flax packs it, with some of its three parts replaced."""
    parts = [array.shape, array.dtype.name, array.tobytes()]
    for at, value in changes:
        parts[at] = value
    return msgpack.ExtType(1, msgpack.packb(parts))


def test_names_and_layouts_equal_transformers_flax_model(folder):
    # Some names written by FlaxWhisperForConditionalGeneration(...).save_pretrained() of transformers 4.46.
    shapes = {name: array.shape for name, array in open_checkpoint(folder).tensors}
    assert shapes["model/encoder/conv1/kernel"] == (3, 8, 16)
    assert shapes["model/encoder/embed_positions/embedding"] == (50, 16)
    assert shapes["model/encoder/layers/1/fc1/kernel"] == (16, 32)
    assert shapes["model/decoder/layers/0/encoder_attn_layer_norm/scale"] == (16,)
    assert "model/decoder/layers/0/self_attn/k_proj/bias" not in shapes


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.dtype.name)
@pytest.mark.parametrize("tied", [True, False])
def test_files_written_by_flax_load_exactly(tmp_path, dtype, tied):
    model = small_model(param_dtype=dtype, tie_word_embeddings=tied, **SHAPE)
    folder = checkpoint(model, tmp_path / "model", to_bytes(flax_tree(model)))
    for path in (folder, folder / "flax_model.msgpack"):
        loaded = load_model(path, weights=dtype)
        assert_same(loaded, model)
        assert loaded.config == model.config
        assert loaded.tokenizer == model.tokenizer


def test_tiny_and_digits_load_to_the_state_of_the_hugging_face_folder(digits, tmp_path):
    config, random = RELEASED["tiny"], np.random.default_rng(0)
    shapes = {path: variable.shape for path, variable in nnx.to_flat_state(nnx.state(abstract_model(config)))}
    write_checkpoint(
        Content(config, None, {path: random.standard_normal(shape, np.float32) for path, shape in shapes.items()}),
        tmp_path / "tiny",
        "hf",
    )
    for source, dtype in ((tmp_path / "tiny", np.float32), (digits, np.float16)):
        folder = tmp_path / f"{source.name}-flax"
        folder.mkdir()
        for name in ("config.json", "generation_config.json"):
            (folder / name).write_bytes((source / name).read_bytes())
        tree = {}
        for name, array in load_file(source / "model.safetensors").items():
            *module, end = name.split(".")
            if end == "weight":
                end = "scale" if "norm" in name else "embedding" if "embed" in name else "kernel"
            tree[(*module, end)] = array.transpose(range(array.ndim)[::-1]) if end == "kernel" else array
        assert {array.dtype for array in tree.values()} == {np.dtype(dtype)}
        (folder / "flax_model.msgpack").write_bytes(to_bytes(unflatten_dict(tree)))
        ours, theirs = load_model(folder), load_model(source)
        assert_same(ours, theirs)
        assert ours.config == theirs.config


def test_shards_and_a_model_without_its_output_layer_load(model, tmp_path):
    folder, tree = checkpoint(model, tmp_path / "model"), flatten_dict(flax_tree(model)["model"])
    weight_map = {}
    for shard, names in enumerate(np.array_split(np.array(list(tree), dtype=object), 3), 1):
        file = f"flax_model-0000{shard}-of-00003.msgpack"
        (folder / file).write_bytes(to_bytes(unflatten_dict({tuple(name): tree[tuple(name)] for name in names})))
        weight_map |= {"/".join(name): file for name in names}
    (folder / "flax_model.msgpack.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(load_model(folder), model)
    (folder / file).rename(folder.parent / file)
    assert f"lacks {file}, which flax_model.msgpack.index.json names" in refusal(folder)
    weight_map[next(iter(weight_map))] = f"../{file}"
    (folder / "flax_model.msgpack.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "not a msgpack file in its folder; it may be malicious" in refusal(folder)


def test_chunked_arrays_are_joined(monkeypatch, model, tmp_path):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 200)  # bytes; normally 2**30
    data = msgpack_serialize(flax_tree(model))
    assert data.count(b"__msgpack_chunked_array__") > 10
    assert_same(load_model(checkpoint(model, tmp_path / "model", data)), model)


@pytest.mark.parametrize("split", [False, True])
def test_layers_stacked_for_a_scan_are_split(monkeypatch, model, tmp_path, split):
    tree = flax_tree(model)
    for side in ("encoder", "decoder"):
        layers = [flatten_dict(tree["model"][side]["layers"][str(layer)]) for layer in range(2)]
        stacked = {path: np.stack([np.asarray(layer[path]) for layer in layers]) for path in layers[0]}
        tree["model"][side]["layers"] = {f"Flax{side.title()}ScanLayers": unflatten_dict(stacked)}
    if split:
        monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 3000)
    folder = checkpoint(model, tmp_path / "model", msgpack_serialize(tree))
    assert_same(load_model(folder), model)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "decoder_layers": 3}))
    with pytest.raises(CheckpointError, match="unexpected: model/decoder/layers/FlaxDecoderScanLayers/"):
        load_model(folder)


def test_one_array_at_a_time_is_in_memory(model, tmp_path):
    large = {f"layer{i}": np.full((2**20,), i, np.float32) for i in range(8)}
    folder = checkpoint(model, tmp_path / "model", msgpack_serialize(large))
    del large
    tracemalloc.start()
    for i, (name, array) in enumerate(open_checkpoint(folder).tensors):
        assert (name, array[-1]) == (f"layer{i}", i)
    assert tracemalloc.get_traced_memory()[1] < 3 * 2**22  # the current and the previous array, and overhead
    tracemalloc.stop()


ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (packed(ARRAY, (1, "object")), "has an array of 'object', expected one of float64, float32, float16, bfloat16"),
        (packed(ARRAY, (1, "int32")), "has an array of 'int32'"),
        (packed(ARRAY, (0, (2**40, 2**30))), r"array of shape \(1099511627776, 1073741824\) and float32 in 24 bytes"),
        (packed(ARRAY, (0, (0, 2**60)), (2, b"")), r"has an array of shape \(0, 1152921504606846976\)"),
        (packed(ARRAY, (0, (1,) * 100)), "has an array of 100 axes"),
        (packed(ARRAY, (0, (-2, -3))), "has a value of msgpack type 0xfe"),
        (packed(ARRAY, (2, bytes(20))), r"shape \(2, 3\) and float32 in 20 bytes"),
        (msgpack.ExtType(1, b""), "has 0 bytes|has a map|expected a list"),
        (msgpack.ExtType(2, msgpack.packb((1.0, 2.0))), r"has an extension of type 2 .*expected arrays \(1\)"),
        (msgpack.ExtType(3, packed(ARRAY).data), "has an extension of type 3"),
        (msgpack.Timestamp(1), "has an extension of type 255"),
        (1.5, "msgpack type 0xcb"),
        (None, "msgpack type 0xc0"),
        (7, "has the number 7 as model/x, expected an array"),
        ("text", "has a text in 2 maps"),
        ([1, 2], "has a list in 2 maps"),
        ({"__msgpack_chunked_array__": True, "shape": {"0": 7}, "chunks": {"0": packed(ARRAY)}}, "inconsistent chunks"),
        ({"__msgpack_chunked_array__": True, "shape": {"1": 6}, "chunks": {"0": packed(ARRAY)}}, "inconsistent chunks"),
        ({"__msgpack_chunked_array__": True, "chunks": 3}, "model/x in inconsistent chunks"),
    ],
)
def test_invalid_arrays_are_rejected(folder, leaf, message):
    assert re.search(message, refused(folder, msgpack.packb({"model": {"x": leaf}})))


def test_implausible_lengths_depths_and_numbers_are_rejected_at_once(folder):
    tracemalloc.start()
    assert "has a name of 4294967295 bytes" in refused(folder, b"\x82\xa1x\x80\xdb\xff\xff\xff\xffx")
    assert "expected 1 with a value of msgpack" in refused(folder, b"\x81\xa5model\xdf\xff\xff\xff\xff")
    array = b"\xc9\xff\xff\xff\xff\x01\x93\x91\xce\x3f\xff\xff\xff\xa7float32\xc6\xff\xff\xff\xfc"
    assert "in 4294967292 bytes at" in refused(folder, b"\x81\xa5model" + array)
    assert "has a map in 32 maps" in refused(folder, b"\x81\xa1x" * 10**6)
    numbered = b"".join(b"\xa6%06d\x80" % number for number in range(200_000))
    assert "has more than 100000 entries" in refused(folder, b"\xdf\x00\x03\x0d\x40" + numbered)
    assert r"has the name 'a\nb'" in refused(folder, b"\x81\xa3a\nb\x80")
    assert "has 'x' twice" in refused(folder, b"\x82\xa1x\x80\xa1x\x80")
    assert "has 3 bytes after its dict" in refused(folder, b"\x81\xa1x\x80abc")
    assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    tracemalloc.stop()


def test_truncated_files_are_rejected_wherever_they_end(folder):
    whole = (folder / "flax_model.msgpack").read_bytes()
    for size in (0, 1, 8, 100, len(whole) // 2, len(whole) - 1):
        assert "flax_model.msgpack" in refused(folder, whole[:size])
