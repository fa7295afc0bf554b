"""Products and attention: whatever way the processor takes, the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.small import quick_compilation  # noqa: F401
from whisper_nnx.model.cache import KeysValues, KVCache
from whisper_nnx.ops.products import (
    attention_scores,
    dot_product_attention,
    few_rows_product,
    flat_product,
    multiplies_few,
    prepared,
    within,
)

RANDOM = np.random.default_rng(0)


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(RANDOM.standard_normal(shape, dtype=np.float32), dtype)


@pytest.mark.parametrize("rows", [1, 3, 4, 5])
def test_products_of_bfloat16_are_sums_in_float32_however_few_rows(rows):
    x, kernel = normal(rows, 2, 24, dtype=jnp.bfloat16), normal(24, 16, dtype=jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    ready = prepared(kernel, 2 * rows)
    for factor in (kernel, kernel if ready is None else ready):
        product = jax.jit(flat_product)(x, factor)
        assert product.shape == (rows, 2, 16)
        np.testing.assert_allclose(product, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int8])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (1, 1, 24)])
def test_a_row_times_narrow_numbers_is_a_product_in_float32(dtype, shape):
    x, table = normal(*shape), (30 * normal(50, 24)).astype(dtype)
    assert multiplies_few(x, table)
    found = jax.jit(few_rows_product)(x, table)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, x @ table.astype(jnp.float32).T, rtol=1e-4, atol=1e-4)


def test_several_rows_and_float32_are_multiplied_otherwise():
    assert not multiplies_few(normal(2, 24), normal(50, 24, dtype=jnp.bfloat16))
    assert not multiplies_few(normal(1, 24), normal(50, 24))


def test_only_bfloat16_is_prepared():
    assert prepared(normal(4, 4), 20) is None
    assert prepared(normal(4, 4, dtype=jnp.bfloat16), 1) is None


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_attention_is_that_of_the_formula(dtype):
    q, k, v = (normal(2, 3, n, 8, dtype=dtype) for n in (5, 7, 7))
    mask = jnp.asarray(RANDOM.random((2, 1, 5, 7)) < 0.7).at[..., 0].set(True)
    found = jax.jit(dot_product_attention)(q, k, v, mask)
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
        attended, back = jax.vjp(dot_product_attention, *inputs)
        return attended, back(jnp.cos(attended))

    assert "while" in attended_and_slopes.lower(q, k, v).as_text() or jax.default_backend() != "cpu"
    twice = tuple(jnp.concatenate([x, x]) for x in (q, k, v))
    assert "while" not in attended_and_slopes.lower(*twice).as_text()
    for ours, whole in zip(
        *map(jax.tree.leaves, (attended_and_slopes(q, k, v), attended_and_slopes(*twice))), strict=True
    ):
        np.testing.assert_allclose(ours[0], whole[0], atol=1e-6)


def test_queries_may_be_finer_than_keys():
    q, k = normal(1, 2, 3, 8), normal(1, 2, 4, 8, dtype=jnp.bfloat16)
    assert attention_scores(q, k).dtype == jnp.float32
    assert dot_product_attention(q, k, k).dtype == jnp.float32


@pytest.mark.parametrize("span", [1, 63, 64, 65, 128, 129, 300, 448])
def test_attention_within_a_span_reads_all_that_the_mask_allows(span):
    q, k, v = normal(2, 2, 1, 8), normal(2, 2, 448, 8), normal(2, 2, 448, 8)
    mask = jnp.broadcast_to(jnp.arange(448) < span, (2, 1, 1, 448))
    found = jax.jit(lambda spans, *inputs: within(spans, dot_product_attention)(*inputs))(
        jnp.array([1, span]), q, k, v, mask
    )
    np.testing.assert_allclose(found, dot_product_attention(q, k, v, mask), atol=1e-6)


def test_attention_within_a_span_does_not_read_what_lies_behind():
    if jax.default_backend() != "cpu":
        pytest.skip("accelerators read all")
    q, k = normal(1, 1, 1, 8), normal(1, 1, 448, 8).at[:, :, 64:].set(jnp.nan)
    mask = (jnp.arange(448) < 10)[None, None, None]
    assert jnp.isfinite(within(jnp.array([10]), dot_product_attention)(q, k, k, mask)).all()


@pytest.mark.parametrize("rows", [1, 2])
def test_a_cache_of_one_row_or_more_is_written_at_each_rows_length(rows):
    cache = KVCache.init((KeysValues(normal(rows, 2, 5, 4), normal(rows, 2, 5, 4)),), 8)
    cache = cache.advance(list(cache.self_attention), jnp.arange(rows) + 2)
    new = KeysValues(normal(rows, 2, 3, 4), normal(rows, 2, 3, 4))
    written = jax.jit(lambda cache, new: cache.append(0, new))(cache, new)
    for row in range(rows):
        assert jnp.array_equal(written.k[row, :, row + 2 : row + 5], new.k[row])
        assert jnp.array_equal(written.v[row, :, row + 2 : row + 5], new.v[row])
        assert not written.k[row, :, : row + 2].any()
        assert not written.k[row, :, row + 5 :].any()
