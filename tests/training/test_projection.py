"""Blockwise cross-entropy equals that of all labels at once, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.small import quick_compilation  # noqa: F401
from whisper_nnx.training import loss, projection
from whisper_nnx.training.projection import projected_cross_entropy

B, S, D, V = 3, 7, 8, 50


def case():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, table = jax.random.normal(keys[0], (B, S, D)), jax.random.normal(keys[1], (D, V))
    labels = jax.random.randint(keys[2], (B, S), 0, V)
    return hidden, table, labels, jax.random.bernoulli(keys[3], 0.7, (B, S)).astype(jnp.float32)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [1, 5, 21, 512])  # per block; 21 labels are split evenly, unevenly and not at all
def test_values_and_gradients_do_not_depend_on_blocks(monkeypatch, rows, smoothing):
    monkeypatch.setattr(projection, "_ROWS", rows)
    hidden, table, labels, weights = case()

    def whole(hidden, table):
        logits = jnp.matmul(hidden, table, precision="highest")
        entropy, accuracy = loss.cross_entropy(logits, labels, weights, smoothing)
        return 3 * entropy.value, accuracy.value  # 3 checks that later factors reach the gradient

    def pieces(hidden, table):
        entropy, accuracy = projected_cross_entropy(hidden, table, labels, weights, smoothing, "float32")
        return 3 * entropy.value, accuracy.value

    expected, found = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(hidden, table) for f in (whole, pieces)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)


def test_operands_may_be_rounded():
    hidden, table, labels, weights = case()
    found, exact = (
        jax.jit(lambda h, dtype=dtype: projected_cross_entropy(h, table, labels, weights, 0.0, dtype)[0].value)(hidden)
        for dtype in ("bfloat16", "float32")
    )
    assert found == pytest.approx(float(exact), rel=0.01)
    assert found != exact
