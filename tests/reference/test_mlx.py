"""MLX checkpoints against the real mlx and mlx-whisper, on the processor.

mlx-whisper's converter is no part of its package. It copies openai-whisper's numbers into mlx-whisper's model, may
quantize it with mlx.nn.quantize, and saves its parameters with np.savez; so do `whisper_of` and `save` here. All is
compared bit for bit, but for the encoder's positions: the format has no place for them, and everyone computes them.
"""

import json
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
import mlx.core as mx
import mlx.nn
import mlx_whisper
import numpy as np
import pytest
import torch
from flax import nnx
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_whisper.load_models import load_model as load_mlx_model
from mlx_whisper.whisper import ModelDimensions, Whisper

from tests.small import quick_compilation  # noqa: F401
from weight_loader import load_model, save_model
from weight_loader.checkpoint import Content
from weight_loader.load import abstract_model
from weight_loader.readers import open_checkpoint
from weight_loader.readers.openai import dimensions_of
from weight_loader.save import content_of
from weight_loader.writers import write_checkpoint
from whisper_nnx import transcribe
from whisper_nnx.model.config import RELEASED
from whisper_nnx.model.whisper import sinusoids

pytestmark = pytest.mark.filterwarnings("ignore:.*no tokenizer:")
POSITIONS = ("encoder", "embed_positions")


def whisper_of(state: dict[str, torch.Tensor], sizes: dict[str, int], dtype=mx.float32) -> Whisper:
    """mlx-whisper's model with the numbers of openai-whisper's."""
    weights = {}
    for name, tensor in state.items():
        if name != "encoder.positional_embedding":
            array = mx.array(tensor.float().numpy()).astype(dtype)
            name = name.replace("mlp.0", "mlp1").replace("mlp.2", "mlp2")
            weights[name] = array.transpose(0, 2, 1) if array.ndim == 3 else array
    model = Whisper(ModelDimensions(**sizes), dtype)
    model.update(tree_unflatten(list(weights.items())))
    return model


def cast(module, dtype):
    module.update(tree_map(lambda array: array.astype(dtype), module.parameters()))
    return module


def save(model: Whisper, folder: Path, file: str = "npz", **quantization: int) -> dict[str, mx.array]:
    """A folder that mlx_whisper.load_models.load_model loads; returns the arrays in it."""
    if quantization:
        mlx.nn.quantize(model, **quantization)
    saved = dict(tree_flatten(model.parameters()))
    folder.mkdir()
    if file == "safetensors":
        mx.save_safetensors(str(folder / "weights.safetensors"), saved)
    else:  # np.savez, which the converter uses, cannot write bfloat16
        (mx.savez if file == "mlx" else np.savez)(str(folder / "weights.npz"), **saved)
    config = {**asdict(model.dims), "model_type": "whisper"}
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization": quantization} if quantization else config)
    )
    return saved


def state(model) -> dict:
    return {path: np.asarray(variable[...]) for path, variable in nnx.to_flat_state(nnx.state(model))}


def assert_same(ours, theirs, positions_atol: float = 0.0):
    ours, theirs = state(ours), state(theirs)
    assert ours.keys() == theirs.keys()
    for path, array in ours.items():
        assert array.dtype == theirs[path].dtype
        atol = positions_atol if path == POSITIONS else 0
        np.testing.assert_allclose(array, theirs[path], rtol=0, atol=atol, err_msg=str(path))


@pytest.fixture(scope="module")
def openai(digits) -> dict:
    return torch.load(digits / "openai.pt", weights_only=True)


@pytest.fixture(scope="module")
def ours(digits):
    return load_model(digits)


@pytest.fixture(scope="module")
def written(ours, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mlx") / "written"
    save_model(ours, folder, "mlx")
    return folder


@pytest.mark.parametrize(
    ("dtype", "file"),
    [
        (mx.float32, "npz"),
        pytest.param(mx.float16, "npz", marks=pytest.mark.slow),
        pytest.param(mx.float32, "mlx", marks=pytest.mark.slow),
        (mx.float16, "safetensors"),
    ],
    ids=str,
)
def test_digits_that_mlx_saved_load_to_the_state_of_the_hugging_face_folder(ours, openai, tmp_path, dtype, file):
    theirs = whisper_of(openai["model_state_dict"], openai["dims"], dtype)
    theirs.set_alignment_heads(np.array(ours.config.alignment_heads))
    save(theirs, tmp_path / "mlx", file)
    loaded = load_model(tmp_path / "mlx")
    assert loaded.config == ours.config
    assert_same(loaded, ours, positions_atol=5e-4)  # the digits' folder keeps them in half precision


@pytest.mark.slow
def test_bfloat16_is_kept(ours, openai, tmp_path):
    save(whisper_of(openai["model_state_dict"], openai["dims"], mx.bfloat16), tmp_path / "mlx", "mlx")
    loaded = load_model(tmp_path / "mlx", weights="bfloat16")
    assert loaded.config.alignment_heads is None  # what mlx-whisper keeps where it knows none
    assert_same(loaded, rounded(ours, jnp.bfloat16), positions_atol=1 / 128)


def rounded(model, dtype):
    graph, numbers = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda array: array.astype(dtype), numbers))


@pytest.mark.slow
def test_the_true_shape_of_tiny_loads_to_the_state_of_the_hugging_face_folder(tmp_path):
    config, random = RELEASED["tiny"], np.random.default_rng(0)
    variables = dict(nnx.to_flat_state(nnx.state(abstract_model(config))))
    arrays = {path: random.standard_normal(variable.shape, np.float32) for path, variable in variables.items()}
    content = Content(config, None, {**arrays, POSITIONS: np.asarray(sinusoids(*arrays[POSITIONS].shape))})
    write_checkpoint(content, tmp_path / "hf", "hf")
    openai = {name: torch.from_numpy(array) for name, array in content.tensors("openai")}
    save(whisper_of(openai, dimensions_of(config)), tmp_path / "mlx")
    assert_same(load_model(tmp_path / "mlx"), load_model(tmp_path / "hf"))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_quantized_numbers_are_bit_for_bit_those_that_mlx_computes(tmp_path, dtype, bits, group):
    model = Whisper(ModelDimensions(80, 10, 128, 2, 1, 1000, 10, 128, 2, 1), dtype)  # random from the start
    model.encoder, model.decoder = (cast(part, dtype) for part in (model.encoder, model.decoder))
    saved = save(model, tmp_path / "mlx", "mlx", group_size=group, bits=bits)
    read = dict(open_checkpoint(tmp_path / "mlx").tensors)
    modules = [name.removesuffix(".scales") for name in saved if name.endswith(".scales")]
    assert len(modules) == 6 + 10 + 1
    for module in modules:
        parts = [saved[f"{module}.{part}"] for part in ("weight", "scales", "biases")]
        theirs = mx.dequantize(*parts, group_size=group, bits=bits).astype(mx.float32)
        np.testing.assert_array_equal(read[f"{module}.weight"].astype(np.float32), np.array(theirs), err_msg=module)


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_quantized_digits_are_within_a_step_of_the_digits(ours, openai, tmp_path, bits):
    theirs = whisper_of(openai["model_state_dict"], openai["dims"])
    saved = save(theirs, tmp_path / "mlx", group_size=64, bits=bits)
    read = dict(open_checkpoint(tmp_path / "mlx").tensors)
    for name, array in content_of(ours).tensors("mlx", "float32"):
        scales = saved.get(f"{name.removesuffix('.weight')}.scales")
        step = 0 if scales is None else np.repeat(np.abs(np.array(scales)), 64, axis=1)
        assert (np.abs(read[name] - array) <= step).all(), name
    assert load_model(tmp_path / "mlx").config.alignment_heads is None


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_mlx_whisper_loads_what_we_write_bit_for_bit(ours, openai, tmp_path, dtype):
    save_model(ours, tmp_path / "mlx", "mlx", dtype)
    theirs = dict(tree_flatten(load_mlx_model(str(tmp_path / "mlx"), getattr(mx, dtype)).parameters()))
    expected = whisper_of(openai["model_state_dict"], openai["dims"], getattr(mx, dtype))
    expected.set_alignment_heads(np.array(ours.config.alignment_heads))
    for name, array in tree_flatten(expected.parameters()):
        assert theirs[name].dtype == array.dtype
        np.testing.assert_array_equal(np.array(theirs.pop(name)), np.array(array), err_msg=name)
    assert theirs == {}


def texts_and_words(found: dict) -> list:
    words = [word for segment in found["segments"] for word in segment.get("words", [])]
    return [
        found["text"],
        *((word["word"], pytest.approx(word["start"]), pytest.approx(word["end"])) for word in words),
    ]


# Recordings on which the rules for timestamps, which differ there, decide alike. A window takes it 4 s, words 4 more.
@pytest.mark.slow
@pytest.mark.parametrize(("name", "language", "words"), [("en_short_3s", "en", 0), ("fr_40s", "fr", 9)])
def test_mlx_whisper_transcribes_the_same_with_what_we_write(ours, written, recordings, name, language, words):
    options = {"language": language, "temperature": 0.0, "word_timestamps": words > 0}
    audio = recordings[name][: 10 * 16_000]
    theirs = mlx_whisper.transcribe(audio, path_or_hf_repo=str(written), fp16=False, **options)
    assert texts_and_words(transcribe(ours, audio, **options)) == texts_and_words(theirs)
    assert len(texts_and_words(theirs)) == 1 + words
    assert theirs["text"]
