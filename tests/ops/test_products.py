"""Products and attention: the same numbers in every implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.small import quick_compilation  # noqa: F401
from whisper_nnx import ops
from whisper_nnx.ops.cpu.operations import flat_matmul

RANDOM = np.random.default_rng(0)


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(RANDOM.standard_normal(shape, dtype=np.float32), dtype)


@pytest.fixture(params=["reference", "cpu", "accelerator"])
def implementation(request):
    with ops.using(request.param):
        yield request.param


def rounding(dtype, exact=1e-5):
    return exact if dtype == jnp.float32 else 0.02


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("rows", [1, 40])
def test_a_linear_layer_is_the_formula(implementation, rows, dtype):
    x, kernel, bias = normal(rows, 2, 24, dtype=dtype), normal(24, 64, dtype=dtype), normal(64, dtype=dtype)
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64) + np.asarray(bias, np.float64)
    found = jax.jit(ops.linear)(x, kernel, bias)
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, atol=10 * rounding(dtype), rtol=1e-5)
    whole, scale = (30 * normal(24, 64)).astype(jnp.int8), jnp.abs(normal(64))
    found = jax.jit(ops.linear)(x, whole, bias, scale)
    exact = np.asarray(x, np.float64) @ np.asarray(whole, np.float64) * np.asarray(scale) + np.asarray(bias, np.float64)
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, atol=rounding(dtype) * np.abs(exact).max())


@pytest.mark.parametrize("rows", [1, 3, 4, 5])
def test_products_of_bfloat16_on_a_cpu_are_sums_in_float32_however_few_rows(rows):
    x, kernel = normal(rows, 2, 24, dtype=jnp.bfloat16), normal(24, 16, dtype=jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    product = jax.jit(flat_matmul)(x, kernel)
    assert product.shape == (rows, 2, 16)
    np.testing.assert_allclose(product, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "stored", "dtype"),
    [
        ((24,), jnp.bfloat16, jnp.bfloat16),
        ((1, 1, 24), jnp.int8, jnp.float32),
        ((3, 24), jnp.float32, jnp.float16),
        ((5, 32), jnp.bfloat16, jnp.float32),
        ((5, 32), jnp.int8, jnp.bfloat16),
        ((40, 32), jnp.bfloat16, jnp.bfloat16),
        ((40, 32), jnp.int8, jnp.float16),
        ((40, 32), jnp.float32, jnp.float32),
    ],
)
def test_logits_are_the_product_with_each_row_of_the_table(implementation, shape, stored, dtype):
    x, table = normal(*shape, dtype=dtype), (30 * normal(50, shape[-1])).astype(stored)
    scale = jnp.abs(normal(50)) / 30 if stored == jnp.int8 else None
    numbers = np.asarray(table, np.float64) * (1 if scale is None else np.asarray(scale)[:, None])
    exact = np.asarray(x, np.float64) @ numbers.T
    found = jax.jit(ops.unembed)(x, table, scale)
    in_loop = jax.jit(lambda x: ops.unembedding(table, scale, x.dtype, x.size // x.shape[-1])(x))(x)
    for logits in (found, in_loop):
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, exact, rtol=1e-4, atol=rounding(dtype) * np.abs(exact).max())


@pytest.mark.parametrize("stored", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_embeddings_are_rows_of_the_table(implementation, stored):
    table, ids = (30 * normal(50, 32)).astype(stored), jnp.array([[3, 0], [49, 3]])
    scale = jnp.abs(normal(50)) if stored == jnp.int8 else None
    rows = table.astype(jnp.float32) * (1 if scale is None else scale[:, None])
    np.testing.assert_array_equal(jax.jit(ops.embed)(ids, table, scale).astype(jnp.float32), rows[ids])


def test_a_single_row_of_narrow_numbers_keeps_the_precision_that_it_has():
    """In float32, although the table is not; the kernel's or, for a width that it does not take, XLA's."""
    for width in (24, 32):
        x, table = normal(width), normal(50, width, dtype=jnp.float16)
        with ops.using("cpu"):
            found = jax.jit(ops.unembed)(x, table)
        np.testing.assert_allclose(found, x @ table.astype(jnp.float32).T, rtol=1e-4, atol=1e-4)


def test_the_first_of_equal_maxima_is_the_best(implementation):
    logits = jnp.asarray(RANDOM.integers(0, 4, (50, 30)), jnp.float32).at[0].set(-jnp.inf)
    np.testing.assert_array_equal(ops.argmax(logits), jnp.argmax(logits, axis=-1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_attention_is_that_of_the_formula(implementation, dtype):
    q, k, v = (normal(2, 3, n, 8, dtype=dtype) for n in (5, 7, 7))
    mask = jnp.asarray(RANDOM.random((2, 1, 5, 7)) < 0.7).at[..., 0].set(True)
    found = jax.jit(ops.attention)(q, k, v, mask)
    assert found.dtype == dtype
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.where(mask, q @ k.swapaxes(2, 3) / np.sqrt(8), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    exact = weights / weights.sum(-1, keepdims=True) @ v
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, atol=1e-6 if dtype == jnp.float32 else 0.03)


@pytest.mark.parametrize("positions", [1100, 1101])
def test_a_windows_attention_cut_to_pieces_and_its_gradient_are_those_of_the_whole(positions):
    q, k, v = (normal(1, 2, n, 8) for n in (positions, 1000, 1000))

    @jax.jit
    def attended_and_slopes(*inputs):
        with ops.using("cpu"):
            attended, back = jax.vjp(ops.attention, *inputs)
        return attended, back(jnp.cos(attended))

    assert "while" in attended_and_slopes.lower(q, k, v).as_text()
    twice = tuple(jnp.concatenate([x, x]) for x in (q, k, v))
    assert "while" not in attended_and_slopes.lower(*twice).as_text()
    for ours, whole in zip(
        *map(jax.tree.leaves, (attended_and_slopes(q, k, v), attended_and_slopes(*twice))), strict=True
    ):
        np.testing.assert_allclose(ours[0], whole[0], atol=1e-6)


def test_queries_may_be_finer_than_keys(implementation):
    q, k = normal(1, 2, 3, 8), normal(1, 2, 4, 8, dtype=jnp.bfloat16)
    assert ops.attention_scores(q, k).dtype == jnp.float32
    assert ops.attention(q, k, k).dtype == jnp.float32


@pytest.mark.parametrize("end", [1, 63, 64, 65, 128, 129, 300, 448])
@pytest.mark.parametrize("group", [1, 3])
def test_attention_to_a_cache_reads_what_its_rows_name(end, group):
    """By the mask's definition, one place at a time."""
    q, k, v = normal(2, 2, group, 64), normal(2, 2, 448 * group, 64), normal(2, 2, 448 * group, 64)
    source = np.random.default_rng(end).integers(-1, group, (2 * group, 448)).astype(np.int32)
    source[:, end - 1], source[:, end:] = np.arange(2 * group) % group, -1  # its own, and what is not written
    found = jax.jit(ops.cached_attention)(q, k, v, jnp.asarray(source), jnp.int32(end))
    found, q, k, v = (np.asarray(x) for x in (found, q, k, v))
    for row in range(2 * group):
        window, place, read = row // group, row % group, np.flatnonzero(source[row, :end] >= 0)
        keys, values = (x[window, :, read * group + source[row, read]] for x in (k, v))  # [T,H,K]
        weights = np.exp(np.einsum("hk,thk->ht", q[window, :, place], keys) / 8)
        expected = np.einsum("ht,thk->hk", weights / weights.sum(axis=1, keepdims=True), values)
        np.testing.assert_allclose(found[window, :, place], expected, atol=1e-5)


@pytest.mark.parametrize("width", [8, 64])  # by XLA, by the kernel
def test_attention_to_a_cache_does_not_read_the_rest_on_a_cpu(width):
    q, k = normal(1, 1, 1, width), normal(1, 1, 448, width).at[:, :, 64:].set(jnp.nan)
    source = jnp.where(jnp.arange(448) < 10, 0, -1)[None]
    with ops.using("cpu"):
        assert jnp.isfinite(ops.cached_attention(q, k, k, source, jnp.int32(10))).all()
