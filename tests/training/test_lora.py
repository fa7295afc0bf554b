"""LoRA: separate, merged and unmerged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.small import quick_compilation, small_mel, small_model  # noqa: F401
from tests.training.batches import Run, random_batch, small_run
from whisper_nnx import ops
from whisper_nnx.model.layers import Linear
from whisper_nnx.model.whisper import Whisper
from whisper_nnx.training.config import LoraConfig
from whisper_nnx.training.lora import LoraLinear, LoraParam, add_lora, merge, unmerge
from whisper_nnx.training.products import training_ops
from whisper_nnx.training.step import trained_model

CONFIG = LoraConfig(rank=3, alpha=6.0, targets=("q_proj", "encoder_attn.v_proj", "fc1"))
IDS = np.arange(8).reshape(2, 4)
run = jax.jit(Whisper.__call__)


@pytest.fixture(scope="module")
def plain() -> Whisper:
    return small_model(spread=0.8)


def with_lora(plain: Whisper, b: float = 0.1) -> Whisper:
    """Adds LoRA with random B instead of 0."""
    model = add_lora(plain, CONFIG, nnx.Rngs(0))
    random = np.random.default_rng(0)
    for path, factor in nnx.to_flat_state(nnx.state(model, LoraParam)):
        if path[-1] == "b":
            factor[...] = random.normal(0, b, factor.shape).astype(np.float32)
    return model


def kernels(model: Whisper) -> dict[str, np.ndarray]:
    return {".".join(map(str, path)): np.asarray(x[...]) for path, x in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def test_lora_starts_equal_to_the_model(plain):
    np.testing.assert_array_equal(
        run(add_lora(plain, CONFIG, nnx.Rngs(0)), small_mel(2), IDS), run(plain, small_mel(2), IDS)
    )


@pytest.mark.parametrize("rank", [1, 8])  # of layers of width 16: separate factors, or added to the weights
def test_outputs_and_gradients_equal_those_of_the_factors(rank):
    random = np.random.default_rng(0)
    base = Linear(16, 24, rngs=nnx.Rngs(0))
    layer = LoraLinear(base, rank, 2.0, nnx.Rngs(1))
    layer.b[...] = jnp.asarray(random.normal(size=(rank, 24)), jnp.float32)
    x, kernel, bias = (
        np.asarray(v, np.float64) for v in (random.normal(size=(2, 5, 16)), base.kernel[...], base.bias[...])
    )
    a, b, scale = np.asarray(layer.a[...], np.float64), np.asarray(layer.b[...], np.float64), 2.0 / rank
    y, gradient = nnx.value_and_grad(lambda layer: jnp.square(layer(jnp.float32(x))).sum() / 2)(layer)
    expected = x @ kernel + bias + scale * (x @ a) @ b
    rows, of_rows = x.reshape(-1, 16), expected.reshape(-1, 24)
    np.testing.assert_allclose(layer(jnp.float32(x)), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(y, (expected**2).sum() / 2, rtol=1e-5)
    np.testing.assert_allclose(gradient.a[...], scale * rows.T @ of_rows @ b.T, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(gradient.b[...], scale * (rows @ a).T @ of_rows, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rank", [1, 8])
def test_factors_are_rounded_like_matmul_operands(rank):
    exact = LoraLinear(Linear(16, 24, rngs=nnx.Rngs(0)), rank, 2.0, nnx.Rngs(1))
    exact.b[...] = jnp.asarray(np.random.default_rng(0).normal(size=(rank, 24)), jnp.float32)
    exact.base.kernel[...] = jnp.zeros((16, 24))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 16)), jnp.float32)
    with ops.using(training_ops(ops.current(), "bfloat16", rounds=True)):
        rounded = exact(x)
    difference = np.abs(rounded - exact(x)).max() / np.abs(exact(x)).max()
    assert 1e-4 < difference < 2e-2


def test_merged_lora_equals_lora(plain):
    model = with_lora(plain)
    merged = merge(model)
    assert kernels(merged).keys() == kernels(plain).keys()
    outputs = run(model, small_mel(2), IDS)
    np.testing.assert_allclose(run(merged, small_mel(2), IDS), outputs, atol=1e-4)
    assert np.abs(outputs - run(plain, small_mel(2), IDS)).max() > 0.1


def test_unmerging_restores_lora(plain):
    model = with_lora(plain)
    again, before = kernels(unmerge(merge(model), model)), kernels(model)
    assert again.keys() == before.keys()
    for name, x in again.items():
        np.testing.assert_allclose(x, before[name], rtol=1e-6, atol=1e-7)


def test_merging_does_not_change_the_model(plain):
    model = with_lora(plain)
    before = kernels(model)
    merge(model)
    for name, x in kernels(model).items():
        np.testing.assert_array_equal(x, before[name])


def test_targets_are_the_ends_of_paths_in_encoder_and_decoder(plain):
    model = add_lora(plain, CONFIG, nnx.Rngs(0))
    wrapped = {".".join(map(str, path)) for path, x in nnx.iter_modules(model) if isinstance(x, LoraLinear)}
    sides = ["encoder.layers.0", "decoder.layers.0", "decoder.layers.1"]
    everywhere = {f"{side}.{name}" for side in sides for name in ("self_attn.q_proj", "fc1")}
    cross = {f"{side}.encoder_attn.{name}" for side in sides[1:] for name in ("q_proj", "v_proj")}
    assert wrapped == everywhere | cross


def test_a_target_that_matches_no_layer_is_rejected(plain):
    with pytest.raises(ValueError, match=r"'query'; choose from fc1, fc2, k_proj"):
        add_lora(plain, LoraConfig(rank=2, targets=("q_proj", "query")), nnx.Rngs(0))
    with pytest.raises(ValueError, match="rank=0"):
        add_lora(plain, LoraConfig(), nnx.Rngs(0))


def test_only_the_factors_and_the_ctc_head_are_trained_and_have_moments(plain):
    training = Run(small_run(lora=CONFIG), plain)
    assert {path.rsplit(".", 1)[-1] for path in training.state.params if "ctc_head" not in path} == {"a", "b"}
    size = sum(x.size for x in training.state.params.values())
    moments = sum(x.size for x in jax.tree.leaves(training.state.opt_state) if x.ndim)
    assert moments == 2 * size
    frozen = {path: np.asarray(x) for path, x in training.state.frozen.items()}
    before = {path: np.asarray(x) for path, x in training.state.params.items()}
    for seed in range(3):
        training(**random_batch(seed=seed))
    assert all(np.array_equal(x, training.state.frozen[path]) for path, x in frozen.items())
    assert not any(np.array_equal(x, training.state.params[path]) for path, x in before.items())


def test_the_trained_model_is_merged(plain):
    training = Run(small_run(lora=CONFIG), plain)
    for seed in range(2):
        training(**random_batch(seed=seed))
    trainee = training.static.trainee(training.state.frozen | training.state.params)
    model = trained_model(training.static, training.state)
    assert kernels(model).keys() == kernels(plain).keys()
    np.testing.assert_allclose(run(model, small_mel(2), IDS), run(trainee.whisper, small_mel(2), IDS), atol=1e-4)
