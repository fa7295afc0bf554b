"""The optimizer, compared with AdamW in numpy, and its schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.small import quick_compilation  # noqa: F401
from whisper_nnx.training.config import OptimizerConfig
from whisper_nnx.training.optimizer import (
    averaged,
    is_decayed,
    is_matrix,
    learning_rate,
    make_optimizer,
    orthogonalized,
)


def rates(steps: int, **config) -> list[float]:
    rate = learning_rate(OptimizerConfig(learning_rate=1.0, **config), steps)
    return [round(float(rate(step)), 4) for step in range(steps + 1)]


def test_the_rate_warms_up_and_decays_to_0_at_the_last_step():
    assert rates(8, warmup_steps=4, decay="linear") == [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25, 0]
    assert rates(8, warmup_steps=4, decay="cosine")[4:] == [1, 0.8536, 0.5, 0.1464, 0]
    assert rates(3, warmup_steps=0, decay="constant") == [1, 1, 1, 1]


def test_a_warm_up_longer_than_the_run_is_truncated():
    assert rates(2, warmup_steps=4) == [0.25, 0.5, 0.75]


def test_invalid_options_are_rejected_with_their_value():
    with pytest.raises(ValueError, match=r"decay='step' is unknown; choose one of linear"):
        learning_rate(OptimizerConfig(decay="step"), 10)
    with pytest.raises(ValueError, match="warmup_steps=-1"):
        learning_rate(OptimizerConfig(warmup_steps=-1), 10)
    with pytest.raises(ValueError, match="accumulate=0"):
        make_optimizer(OptimizerConfig(accumulate=0), 10)


def params(seed: int) -> dict[str, jax.Array]:
    random = np.random.default_rng(seed)
    shapes = {"fc1.kernel": (3, 4), "fc1.bias": (4,), "layer_norm.scale": (4,), "embed_positions.embedding": (5, 4)}
    return {path: jnp.asarray(random.normal(size=shape), jnp.float32) for path, shape in shapes.items()}


def run(config: OptimizerConfig, gradients, steps: int = 100):
    optimizer = make_optimizer(config, steps)
    moved, state = params(0), None
    for gradient in gradients:
        state = optimizer.init(moved) if state is None else state
        updates, state = optimizer.update(gradient, state, moved)
        moved = jax.tree.map(jnp.add, moved, updates)
    return moved


CONSTANT = OptimizerConfig(learning_rate=0.1, warmup_steps=0, decay="constant", clip_norm=0.0)


def test_two_updates_equal_adamw_with_decay_of_matrices_only():
    gradients = [params(1), params(2)]
    moved, (b1, b2) = run(CONSTANT, gradients), CONSTANT.betas
    for path, start in params(0).items():
        x, m, v = np.asarray(start, np.float64), 0.0, 0.0
        for n, gradient in enumerate(gradients, 1):
            g = np.asarray(gradient[path], np.float64)
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            update = m / (1 - b1**n) / (np.sqrt(v / (1 - b2**n)) + CONSTANT.epsilon)
            x = x - 0.1 * (update + (CONSTANT.weight_decay * x if path == "fc1.kernel" else 0))
        np.testing.assert_allclose(moved[path], x, rtol=1e-5, atol=1e-6)


def test_norms_biases_and_positions_do_not_decay():
    assert is_decayed("decoder.layers.0.fc1.kernel")
    assert is_decayed("decoder.embed_tokens.embedding")
    assert is_decayed("decoder.layers.0.self_attn.q_proj.a")
    undecayed = ("encoder.conv1.bias", "decoder.layer_norm.scale", "decoder.embed_positions.embedding")
    assert not any(map(is_decayed, undecayed))


def test_gradients_above_the_norm_are_clipped_to_it():
    config = OptimizerConfig(clip_norm=1.0, warmup_steps=0, epsilon=1.0)  # with a large epsilon the size matters
    small = jax.tree.map(lambda x: x / jnp.sqrt(sum((y**2).sum() for y in params(1).values())), params(1))
    large = jax.tree.map(lambda x: 50 * x, small)
    for path, x in run(config, [large]).items():
        np.testing.assert_allclose(x, run(config, [small])[path], rtol=1e-5)


def test_accumulated_gradients_are_averaged():
    gradients = [params(seed) for seed in range(1, 5)]
    means = [jax.tree.map(lambda x, y: (x + y) / 2, *gradients[i : i + 2]) for i in (0, 2)]
    accumulated = run(OptimizerConfig(warmup_steps=0, decay="constant", accumulate=2), gradients)
    for path, x in run(OptimizerConfig(warmup_steps=0, decay="constant"), means).items():
        np.testing.assert_allclose(accumulated[path], x, rtol=1e-5)


def test_the_rate_of_an_accumulated_update_is_that_of_its_first_batch():
    """With a constant gradient, Adam's update equals the rate."""
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=4, weight_decay=0.0, clip_norm=0.0, accumulate=2)
    rate = learning_rate(config, 100)
    moved = run(config, [jax.tree.map(jnp.ones_like, params(0))] * 4)
    for path, start in params(0).items():
        np.testing.assert_allclose(start - moved[path], rate(0) + rate(2), rtol=1e-4)


def test_the_average_decays_faster_at_first():
    old, new = {"x": jnp.zeros(2)}, {"x": jnp.ones(2)}
    np.testing.assert_allclose(averaged(old, new, 0.99, jnp.asarray(0))["x"], 0.9)
    np.testing.assert_allclose(averaged(old, new, 0.99, jnp.asarray(5000))["x"], 0.01, rtol=1e-4)


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_muon_updates_matrices_like_optax(shape):
    """Compares the first update of both."""
    path = "encoder.layers.0.fc1.kernel"
    gradient = {path: jax.random.normal(jax.random.key(0), shape)}
    of_optax = optax.contrib.scale_by_muon(
        weight_dimension_numbers=lambda tree: {name: optax.contrib.MuonDimensionNumbers(0, 1) for name in tree}
    )
    theirs = of_optax.update(gradient, of_optax.init(gradient), gradient)[0][path]
    np.testing.assert_allclose(orthogonalized(gradient[path]), theirs, atol=1e-3)

    config = OptimizerConfig(method="muon", learning_rate=0.1, warmup_steps=0, weight_decay=0.5, clip_norm=0.0)
    ours = make_optimizer(config, 100)
    update = ours.update(gradient, ours.init(gradient), {path: jnp.ones(shape)})[0][path]
    np.testing.assert_allclose(update, -0.1 * (0.2 * max(shape) ** 0.5 * theirs + 0.5), atol=1e-3)
    assert 0.01 < float(jnp.std(update)) < 0.03  # about 0.2 * rate, whatever the shape


def test_muon_leaves_all_but_layer_matrices_and_lora_factors_to_adamw():
    changes = {"method": "muon", "warmup_steps": 0, "decay": "constant"}
    gradients = [params(1), params(2)]
    for path, x in run(OptimizerConfig(**changes), gradients).items():
        np.testing.assert_array_equal(x, run(OptimizerConfig(**changes | {"method": "adamw"}), gradients)[path])
    assert is_matrix("decoder.layers.0.encoder_attn.q_proj.kernel")
    assert is_matrix("encoder.layers.0.fc1.a")
    assert is_matrix("encoder.layers.0.fc1.b")
    others = ("encoder.conv1.kernel", "ctc_head.kernel", "decoder.proj_out.kernel", "decoder.embed_tokens.embedding")
    assert not any(map(is_matrix, (*others, "encoder.layers.0.fc1.bias")))
