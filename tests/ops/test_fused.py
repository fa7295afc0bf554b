"""Attention that holds few scores in memory: in blocks, and by the kernel for TPUs, interpreted."""

import warnings
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.small import quick_compilation, small_config, small_mel, small_model  # noqa: F401
from whisper_nnx import decode, ops
from whisper_nnx.model.whisper import Whisper
from whisper_nnx.ops import fused, reference, trial

RANDOM = np.random.default_rng(0)
interpreted = fused.with_gradient(fused.split(partial(fused.pallas, interpret=True)))


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(RANDOM.standard_normal(shape, dtype=np.float32), dtype)


@pytest.fixture
def on_this_machine(monkeypatch):
    """The kernel for TPUs takes the place of one for CPUs."""
    monkeypatch.setattr(fused, "usable", lambda: ("cpu",))
    monkeypatch.setattr(fused, "KERNELS", {"cpu": interpreted})


def value_and_slopes(function, *inputs):
    attended, back = jax.vjp(function, *inputs)
    return attended, *back(jnp.cos(attended))


MASKS = {
    "none": None,
    "causal": jnp.tril(jnp.ones((101, 101), bool)),
    "keys of each row": (jnp.arange(101) < jnp.array([101, 50])[:, None])[:, None, None],
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_attention_in_blocks_and_its_gradient_are_those_of_the_whole(mask, monkeypatch):
    q, k, v = (normal(2, 3, 101, 8) for _ in range(3))
    monkeypatch.setattr(fused, "_SCORES_BYTES", 4 * 2 * 3 * 101 * 40)
    monkeypatch.setattr(fused, "_ALIGNED", 16)
    ours = jax.jit(partial(value_and_slopes, lambda q, k, v: fused.attention(q, k, v, mask)))
    assert "while" in ours.lower(q, k, v).as_text()
    whole = value_and_slopes(lambda q, k, v: reference.attention(q, k, v, mask), q, k, v)
    for found, expected in zip(ours(q, k, v), whole, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("heads", "width", "queries", "keys"), [(4, 64, 300, 150), (1, 128, 128, 200), (4, 32, 257, 129)]
)
def test_the_kernel_for_tpus_and_its_gradient_are_the_formula(heads, width, queries, keys):
    q, k, v = (normal(2, heads, n, width, dtype=jnp.bfloat16) for n in (queries, keys, keys))
    exact = value_and_slopes(reference.attention, *(x.astype(jnp.float32) for x in (q, k, v)))
    for found, expected in zip(value_and_slopes(interpreted, q, k, v), exact, strict=True):
        np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.03)


def test_the_kernel_for_tpus_may_be_mapped_over_more_rows_and_shared_keys():
    q, k, v = (normal(*shape, 2, 128, 64, dtype=jnp.bfloat16) for shape in ((3, 1), (1,), (3, 1)))
    expected = reference.attention(q[:, 0], jnp.broadcast_to(k, v[:, 0].shape), v[:, 0])
    found = jax.vmap(interpreted, in_axes=(0, None, 0))(q, k, v)[:, 0]
    np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), atol=0.03)


def test_programs_have_the_kernel_of_the_platform_that_they_are_lowered_for():
    def lowered(platform, dtype, n=256):
        x = jax.ShapeDtypeStruct((1, 2, n, 64), dtype)
        return jax.jit(lambda x: ops.attention(x, x, x)).trace(x).lower(lowering_platforms=(platform,)).as_text()

    with ops.using("accelerator"):
        assert "tpu_custom_call" in lowered("tpu", jnp.bfloat16)
        for platform, dtype in (
            ("cpu", jnp.bfloat16),
            ("tpu", jnp.float32),
            ("tpu", jnp.float16),
            ("cuda", jnp.float32),
        ):
            assert "custom_call" not in lowered(platform, dtype)
        assert "custom_call" not in lowered("tpu", jnp.bfloat16, 8)  # steps of the token loop


def reads_no_more(q, k, v, mask, length):
    """As cuDNN's: positions behind the length count for nothing, whatever is there."""
    windows, heads, _, width = q.shape
    k, v = (x.reshape(windows, -1, heads, width).swapaxes(1, 2) for x in (k, v))
    is_read = jnp.arange(k.shape[2]) < length
    return reference.attention(q, k, v, is_read if mask is None else mask & is_read)


@pytest.mark.parametrize("beam_size", [pytest.param(None, marks=pytest.mark.slow), 3])
def test_the_token_loop_says_how_far_its_kernel_has_to_read(beam_size, monkeypatch):
    model = small_model(dtype=jnp.bfloat16)
    mel = small_mel(2)
    options = {"language": "en", "beam_size": beam_size, "prompt": "one two three", "max_new_tokens": 40}
    lengths = []

    def watched(q, k, v, mask, length):
        jax.debug.callback(lambda n: lengths.append((k.shape[1], int(n))), length)
        return reads_no_more(q, k, v, mask, length)

    with ops.using("accelerator"):
        expected = decode(model, mel, **options)
        jax.clear_caches()
        monkeypatch.setattr(fused, "usable_for_cache", lambda: ("cpu",))
        monkeypatch.setattr(fused, "CACHE_KERNELS", {"cpu": watched})
        found = decode(model, mel, **options)
        jax.effects_barrier()
    jax.clear_caches()
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    whole = max(size for size, _ in lengths)
    read = [n for size, n in lengths if size == whole]  # of the text
    assert min(read) < max(read) < whole


def test_the_trial_of_the_kernel_for_the_cache_finds_what_is_wrong():
    def reads_all(q, k, v, mask, length):
        return reads_no_more(q, k, v, None, k.shape[1])

    assert fused._error_with_cache(reads_no_more) < 0.02
    assert fused._error_with_cache(reads_all) > 0.2


@pytest.mark.parametrize("platform", [pytest.param("every", marks=pytest.mark.slow), "this"])
def test_gradients_of_the_model_pass_through_the_kernel(platform, request):
    if platform == "this":
        request.getfixturevalue("on_this_machine")
    config = small_config(d_model=128, encoder_attention_heads=2, decoder_attention_heads=2, max_source_positions=150)
    models = {dtype: Whisper(config, rngs=nnx.Rngs(0), dtype=dtype) for dtype in (jnp.bfloat16, jnp.float32)}
    mel, ids = normal(1, config.num_mel_bins, 300), jnp.arange(5)[None]

    @partial(jax.jit, static_argnames="implementation")
    def slopes(model, mel, implementation):
        with ops.using(implementation):
            return jax.grad(lambda model, mel: jnp.square(model(mel, ids)).mean(), argnums=(0, 1))(model, mel)

    runs = ("accelerator", jnp.bfloat16), ("reference", jnp.bfloat16), ("reference", jnp.float32)
    ours, theirs, exact = (jax.tree.leaves(slopes(models[dtype], mel, name)) for name, dtype in runs)
    for found, rounded, expected in zip(ours, theirs, exact, strict=True):
        assert np.linalg.norm(found - expected) <= 1.5 * np.linalg.norm(rounded - expected) + 1e-8


def test_a_kernel_that_does_not_work_is_found_by_a_trial_also_while_a_program_is_traced():
    device = jax.devices()[0]
    found = []

    def fails(q, k, v):
        raise RuntimeError("no library\nat all")

    @jax.jit
    def traced(x):
        for kernel in (interpreted, fails, lambda q, k, v: q):
            found.append(trial.problem(kernel, fused._error, device))
        return x

    traced(1.0)
    assert found[:2] == [None, "RuntimeError: no library"]
    assert found[2].startswith("its result is wrong by ")


def test_where_the_kernel_of_this_machine_fails_there_is_one_warning_and_xlas_attention(monkeypatch):
    gpu = SimpleNamespace(
        platform="gpu", client=SimpleNamespace(platform_version="cuda 13000"), device_kind="NVIDIA H200"
    )
    usable = fused.usable.__wrapped__
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    monkeypatch.setattr(trial, "problem", lambda *_: None)
    assert usable() == ("cuda",)
    monkeypatch.setattr(trial, "problem", lambda *_: "no cuDNN")
    monkeypatch.setattr(fused, "usable", fused.cache(usable))
    q = normal(1, 2, 128, 64, dtype=jnp.bfloat16)
    with pytest.warns(UserWarning, match=r"the attention kernel 'cudnn' for NVIDIA H200 is not used, .*: no cuDNN"):
        found = fused.attention(q, q, q)
    np.testing.assert_array_equal(found, reference.attention(q, q, q))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused.attention(q, q, q)
    gpu.client.platform_version = "rocm 7"
    assert usable() == ()
