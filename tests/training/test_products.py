"""Matmuls of rounded operands, their gradients, and a training step with them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.small import quick_compilation, small_mel, small_model  # noqa: F401
from tests.training.batches import Run, arrays_of, random_batch, small_run
from whisper_nnx import ops
from whisper_nnx.training.config import ModelConfig
from whisper_nnx.training.products import attend, product
from whisper_nnx.training.step import trained_model


def rounded(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.bfloat16).astype(jnp.float32), np.float64)


@pytest.mark.parametrize(("n_in", "n_out"), [(32, 64), (64, 32), (48, 48)])
def test_operands_are_rounded_and_sums_are_not(n_in, n_out):
    keys = jax.random.split(jax.random.key(0), 3)
    x, w, g = (
        jax.random.normal(key, shape) for key, shape in zip(keys, [(80, n_in), (n_in, n_out), (80, n_out)], strict=True)
    )
    y, gradient = jax.jit(lambda x, w, g: (lambda y, back: (y, back(g)))(*jax.vjp(product, x, w)))(x, w, g)
    assert {a.dtype for a in (y, *gradient)} == {jnp.dtype(jnp.float32)}
    x, w, g = map(rounded, (x, w, g))
    for ours, exact in zip((y, *gradient), (x @ w, g @ w.T, x.T @ g), strict=True):
        np.testing.assert_allclose(ours, exact, atol=1e-4)


@pytest.mark.parametrize(("dtype", "off"), [("bfloat16", 0.02), ("float32", 1e-5)])
def test_attention_of_rounded_operands_and_its_gradient_approximate_attention(dtype, off):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, g = (
        jax.random.normal(key, shape) for key, shape in zip(keys, [(40, 16), *[(56, 16)] * 2, (40, 16)], strict=True)
    )

    def exact(q, k, v):
        return ops.attention(*(x[None, None] for x in (q * 4, k, v)))[0, 0]

    ours, theirs = (
        jax.jit(lambda f=f: (lambda y, back: (y, *back(g)))(*jax.vjp(f, q, k, v)))()
        for f in (partial(attend, dtype=dtype), exact)
    )
    for mine, true in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, true, atol=off * float(jnp.abs(true).max()))
        assert jnp.corrcoef(mine.ravel(), true.ravel())[0, 1] > 0.9999


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_with_rounding_is_nearly_equal_and_the_exported_model_does_not_round(dtype):
    model, batch = small_model(spread=0.8, dtype=jnp.dtype(dtype)), random_batch()
    exact, ours = (Run(small_run(model=ModelConfig(product_dtype=name)), model) for name in ("", "bfloat16"))
    metrics, theirs = ours(**batch), exact(**batch)
    for name in ("loss", "cross_entropy", "ctc", "gradient_norm"):
        assert metrics[name] == pytest.approx(theirs[name], rel=0.02), name
    weights = arrays_of(exact.state)
    assert any((x != weights[path]).any() for path, x in arrays_of(ours.state).items())
    trained = trained_model(ours.static, ours.state)
    traced = [str(jax.make_jaxpr(lambda model, mel: model.encode(mel))(m, small_mel(1))) for m in (trained, model)]
    assert traced[0] == traced[1]
