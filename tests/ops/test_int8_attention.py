"""The kernel for GPUs that reads the audio's keys and values in 8 bits once, interpreted."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.small import quick_compilation, small_mel, small_model  # noqa: F401
from whisper_nnx import decode, ops
from whisper_nnx.ops import fused, int8_attention, reference

RANDOM = np.random.default_rng(0)
interpreted = partial(int8_attention.triton, interpret=True)


@pytest.mark.parametrize(
    ("queries", "heads", "width", "size", "positions"),
    [(1, 3, 64, 150, 150), (5, 2, 64, 257, 130), (17, 1, 32, 128, 128), (70, 2, 64, 100, 1)],
)
def test_the_kernel_is_the_formula(queries, heads, width, size, positions):
    q = jnp.asarray(RANDOM.standard_normal((2, heads, queries, width)) / 30, jnp.bfloat16)
    k, v = (jnp.asarray(RANDOM.integers(-127, 128, (2, size, heads * width)), jnp.int8) for _ in "kv")
    found = interpreted(q, k, v, positions)
    assert found.dtype == q.dtype
    k, v = (x.reshape(2, size, heads, width).swapaxes(1, 2)[:, :, :positions].astype(jnp.float32) for x in (k, v))
    np.testing.assert_allclose(found.astype(jnp.float32), reference.attention(q.astype(jnp.float32), k, v), atol=0.5)


def test_its_trial_finds_what_is_wrong():
    def reads_more(q, k, v, positions):
        return interpreted(q, k, v, positions + 10)

    assert int8_attention.error(interpreted) < 0.02
    assert int8_attention.error(reads_more) > 0.2


@pytest.mark.parametrize("beam_size", [pytest.param(None, marks=pytest.mark.slow), 3])
def test_the_token_loop_reads_the_audio_by_the_kernel_and_writes_the_same(beam_size, monkeypatch):
    model = small_model(kv_cache_dtype="int8", d_model=64)  # in float32, lest roundings decide
    mel = small_mel(2)
    options = {"language": "en", "beam_size": beam_size, "max_new_tokens": 20}
    calls = []

    def watched(q, k, v, positions):
        calls.append((q.shape, k.dtype, positions))
        return interpreted(q, k, v, positions)

    with ops.using("accelerator"):
        expected = decode(model, mel, **options)
        jax.clear_caches()
        monkeypatch.setattr(int8_attention, "takes", lambda q: True)
        monkeypatch.setattr(int8_attention, "usable", lambda: ("cpu",))
        monkeypatch.setattr(int8_attention, "KERNELS", {"cpu": watched})
        found = decode(model, mel, **options)
    jax.clear_caches()
    assert {shape[2] for shape, _, _ in calls} == {32, beam_size or 1}
    assert {(dtype, positions) for _, dtype, positions in calls} == {
        (jnp.dtype("int8"), model.config.max_source_positions)
    }
    assert [one.tokens for one in found] == [one.tokens for one in expected]


def test_integers_that_are_masked_or_in_float32_are_read_by_xla():
    q, k = jnp.ones((1, 2, 1, 64)), jnp.ones((1, 40, 128), jnp.int8)

    def default(q, k, v, mask, length):
        return q - 1

    assert not int8_attention.takes(q)
    for queries, mask, length in ((q, None, 40), (q.astype(jnp.bfloat16), jnp.ones(40, bool), 40)):
        assert not fused.cached_attention(queries, k, k, mask, length, default).any()
