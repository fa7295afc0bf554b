"""Weights of 8 bits: what they are off by, and that everything works with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.small import quick_compilation, small_mel, small_model  # noqa: F401
from weight_loader import load_model, save_pretrained
from weight_loader.folder import CheckpointError
from whisper_nnx import transcribe
from whisper_nnx.model.quantized import Int8Embedding, Int8Linear, Scale, quantize_model
from whisper_nnx.ops import quantize

RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "model"
    save_pretrained(small_model(), path)
    return path


@pytest.mark.parametrize("axis", [0, 1])
def test_a_weight_is_off_by_half_a_scale_at_most(axis):
    matrix = jnp.asarray(RANDOM.normal(0, np.geomspace(1e-6, 1e3, 20)[:, None], (20, 30)).astype(np.float32))
    rounded = quantize(matrix, axis)
    numbers, steps = rounded.values, rounded.scale
    assert numbers.dtype == jnp.int8
    assert np.abs(numbers).max(axis=axis).min() == 127
    assert (np.abs(numbers * steps - matrix) <= 0.5001 * steps).all()


def test_a_channel_of_zeros_stays_zero():
    rounded = quantize(jnp.zeros((3, 4)), 0)
    np.testing.assert_array_equal(rounded.values * rounded.scale, np.zeros((3, 4)))


@pytest.mark.parametrize("use_bias", [True, False])
def test_a_linear_layer_computes_with_the_rounded_kernel(use_bias):
    linear = nnx.Linear(24, 40, use_bias=use_bias, rngs=nnx.Rngs(0), dtype=jnp.float32)
    if use_bias:
        linear.bias[...] = jnp.arange(40.0)
    rounded = Int8Linear(linear)
    linear.kernel[...] = rounded.kernel[...] * rounded.scale[...]
    x = jnp.asarray(RANDOM.normal(size=(2, 5, 24)), jnp.float32)
    np.testing.assert_allclose(rounded(x), linear(x), atol=1e-5)


def test_rows_of_an_embedding_are_rows_of_its_table():
    embedding = Int8Embedding(small_model().decoder.embed_tokens)
    ids = jnp.array([[0, 5], [7, 5]])
    table = embedding.embedding[...] * embedding.scale[...][:, None]
    np.testing.assert_array_equal(embedding(ids), table[ids])


@pytest.mark.parametrize("weights", ["bfloat16", "float16", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_of_a_single_row_are_those_that_it_has_among_others(folder, weights, dtype):
    decoder = load_model(folder, dtype=dtype, weights=weights).decoder
    hidden = jnp.asarray(RANDOM.normal(size=(4, decoder.embed_tokens.features)), dtype)
    together, alone = decoder.logits(hidden), [decoder.logits(row[None])[0] for row in hidden]
    np.testing.assert_allclose(jnp.stack(alone), together, atol=0.02 * float(jnp.abs(together).max()))
    if dtype == "float32":
        np.testing.assert_allclose(jnp.stack(alone), together, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_a_model_computes_with_its_rounded_matrices(dtype):
    rounded, model = small_model(dtype=dtype, spread=0.8), small_model(dtype=dtype, spread=0.8)
    quantize_model(rounded)
    kernels = [m for _, m in nnx.iter_modules(rounded) if isinstance(m, Int8Linear)]
    assert len(kernels) == sum(isinstance(m, nnx.Linear) for _, m in nnx.iter_modules(model))
    for (_, ours), (_, theirs) in zip(
        ((p, m) for p, m in nnx.iter_modules(rounded) if isinstance(m, Int8Linear)),
        ((p, m) for p, m in nnx.iter_modules(model) if isinstance(m, nnx.Linear)),
        strict=True,
    ):
        theirs.kernel[...] = ours.kernel[...] * ours.scale[...]
    model.decoder.embed_tokens.embedding[...] = (
        rounded.decoder.embed_tokens.embedding[...] * rounded.decoder.embed_tokens.scale[...][:, None]
    )
    ids = jnp.array([[1, 2, 3]])
    expected, found = (np.asarray(m(small_mel(1), ids), np.float32) for m in (model, rounded))
    atol = 1e-4 if dtype == jnp.float32 else 0.05 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=atol)


def test_a_loaded_model_holds_8_bits_and_transcribes(folder):
    model = load_model(folder, weights="int8")
    stored = {v.dtype for _, v in nnx.to_flat_state(nnx.state(model)) if v.ndim == 2 and v.size > 4000}
    assert stored >= {jnp.dtype("int8")}
    assert sum(isinstance(v, Scale) for _, v in nnx.to_flat_state(nnx.state(model))) > 8
    noise = RANDOM.normal(0, 0.1, 40_000).astype(np.float32)
    options = {"language": "en", "temperature": 0.0, "sample_len": 6, "word_timestamps": True}
    options["alignment_heads"] = [(1, 0)]
    alone = transcribe(model, noise, **options)
    assert transcribe(model, [noise, noise], batch_size=2, **options)[1]["text"] == alone["text"]
    assert load_model(folder, dtype="bfloat16", weights="int8").encode(small_mel(1)).dtype == jnp.bfloat16


def test_it_can_be_jitted_and_is_a_pytree(folder):
    model = load_model(folder, weights="int8")
    mel, ids = small_mel(1), jnp.array([[1, 2]])
    np.testing.assert_allclose(jax.jit(lambda m, *a: m(*a))(model, mel, ids), model(mel, ids), atol=1e-4)


def test_what_was_rounded_is_not_written(folder, tmp_path):
    with pytest.raises(CheckpointError, match="the model's weights are int8"):
        save_pretrained(load_model(folder, weights="int8"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
