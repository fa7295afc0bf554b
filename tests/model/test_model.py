"""The network: against a plain numpy reading of it, step by step, and under jax's transformations."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import whisper_nnx
from tests.oracle import params_of, plain_whisper
from tests.small import quick_compilation, small_config, small_mel  # noqa: F401
from tests.small import small_model as _small_model
from whisper_nnx import ops
from whisper_nnx.model.cache import KVCache
from whisper_nnx.model.config import ALIASES, RELEASED
from whisper_nnx.model.create import create_whisper
from whisper_nnx.model.whisper import Constant, Whisper

S, SIZE = 12, 48
small_model = partial(_small_model, spread=0.8)  # calm: rounding does not grow from layer to layer
encode = jax.jit(Whisper.encode)
decode = jax.jit(Whisper.decode)
run = jax.jit(Whisper.__call__)


@jax.jit
def step(model, ids, cache):
    hidden, cache = model.decoder.step(ids, cache)
    return model.decoder.logits(hidden), cache


@jax.jit
def prefill(model, ids, cross, lengths):
    return model.decoder.step(ids, KVCache.init(cross, SIZE), lengths)[1]


reorder, repeat = jax.jit(KVCache.reorder), jax.jit(KVCache.repeat, static_argnums=1)


@pytest.fixture(scope="module")
def model() -> Whisper:
    return small_model()


@pytest.fixture(scope="module")
def mel() -> jax.Array:
    return small_mel(3)


@pytest.fixture(scope="module")
def ids() -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).integers(0, small_config().vocab_size, (3, S)), jnp.int32)


@pytest.fixture(scope="module")
def cross(model, mel):
    return model.decoder.cross_attention(encode(model, mel))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"encoder_layers": 3, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_ffn_dim": 24},
    ],
    ids=["tied", "untied", "other_depths"],
)
def test_logits_equal_a_plain_reading_of_the_network(changes, mel, ids):
    model = small_model(seed=3, **changes)
    for _, bias in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if bias.ndim == 1:  # zeros and ones would hide a parameter that is not used
            bias[...] = jnp.asarray(np.random.default_rng(bias.size).normal(1, 0.3, bias.shape), jnp.float32)
    expected = [plain_whisper(model, *map(np.asarray, row)) for row in zip(mel, ids, strict=True)]
    np.testing.assert_allclose(run(model, mel, ids), expected, atol=2e-4, rtol=1e-5)


def test_no_key_projection_has_a_bias(model):
    biases = [name for name in params_of(model) if name.endswith("bias")]
    assert not [name for name in biases if "k_proj" in name]
    assert [name for name in biases if "q_proj" in name]
    assert [name for name in biases if "v_proj" in name]


def test_a_shift_by_two_frames_shifts_the_encoders_output_by_one_position():
    model = small_model(seed=5)
    model.encoder.embed_positions[...] = jnp.zeros_like(model.encoder.embed_positions[...])
    mel = small_mel(1).at[:, :, :20].set(0).at[:, :, -20:].set(0)
    moved = encode(model, jnp.roll(mel, 2, axis=-1))
    np.testing.assert_allclose(moved, jnp.roll(encode(model, mel), 1, axis=1), atol=1e-5)


@pytest.mark.parametrize(("frame", "positions"), [(40, [19, 20, 21]), (41, [20, 21])])
def test_the_convolutions_are_centred_on_their_frame(model, frame, positions):
    """Two frames make a position; position i is centred on frame 2i."""
    sound = jnp.zeros((1, 100, 8)).at[0, frame].set(1.0)
    heard = model.encoder.conv2(model.encoder.conv1(sound))[0]
    assert np.flatnonzero(np.abs(heard).sum(-1)).tolist() == positions


# Any length, and what does not fit.


@pytest.mark.parametrize("frames", [1, 2, 3, 38, 99, 100])
def test_any_number_of_frames_up_to_the_context_is_encoded(model, frames):
    assert jax.eval_shape(model.encode, jnp.zeros((1, 8, frames))).shape == (1, math.ceil(frames / 2), 16)


def test_a_short_input_is_not_padded(model, mel, ids):
    short = mel[:, :, :38]
    expected = plain_whisper(model, np.asarray(short[0]), np.asarray(ids[0]))
    np.testing.assert_allclose(run(model, short, ids)[0], expected, atol=2e-4)


def test_what_does_not_fit_is_refused_with_its_size(model, mel, ids):
    with pytest.raises(ValueError, match=r"102 frames.*at most 100"):
        model.encode(jnp.zeros((1, 8, 102)))
    with pytest.raises(ValueError, match=r"\(1, 9, 100\), expected \[B,8,T\]"):
        model.encode(jnp.zeros((1, 9, 100)))
    with pytest.raises(ValueError, match=r"\(8, 100\)"):
        model.encode(mel[0])
    with pytest.raises(ValueError, match=r"49 decoder_input_ids.*48 positions"):
        model.decode(jnp.zeros((1, 49), jnp.int32), encode(model, mel[:1]))


# Step by step.


def test_a_token_sees_only_those_before_it(model, mel, ids):
    audio = encode(model, mel)
    changed = decode(model, ids.at[:, 7:].add(1), audio)
    np.testing.assert_allclose(changed[:, :7], decode(model, ids, audio)[:, :7], atol=1e-5)
    assert np.abs(changed[:, 7:] - decode(model, ids, audio)[:, 7:]).max() > 0.1


@pytest.mark.parametrize("chunks", [[1] * S, [5, 1, 1, 5], [S]])
def test_teacher_forced_logits_equal_step_by_step_logits(model, mel, ids, cross, chunks):
    cache, found = KVCache.init(cross, SIZE), []
    for piece in jnp.split(ids, np.cumsum(chunks)[:-1], axis=1):
        logits, cache = step(model, piece, cache)
        found.append(logits)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), decode(model, ids, encode(model, mel)), atol=1e-4)
    assert cache.length.tolist() == [S] * 3


def test_rows_of_different_lengths_go_on_side_by_side(model, mel, ids, cross):
    expected, lengths = decode(model, ids, encode(model, mel)), np.array([5, 2, 4])
    ids = np.asarray(ids)
    padded = np.take_along_axis(ids, np.maximum(np.arange(5) - 5 + lengths[:, None], 0), axis=1)
    cache = prefill(model, padded, cross, lengths)
    for n in range(4):
        now = lengths + n
        logits, cache = step(model, np.take_along_axis(ids, now[:, None], axis=1), cache)
        np.testing.assert_allclose(logits[:, 0], expected[np.arange(3), now], atol=1e-4)


def test_rows_that_share_a_window_equal_rows_of_their_own(model, cross, ids):
    shared = KVCache.init(jax.tree.map(lambda x: x[:1], cross), SIZE).repeat(3)
    own = KVCache.init(jax.tree.map(lambda x: jnp.repeat(x[:1], 3, axis=0), cross), SIZE)
    np.testing.assert_allclose(step(model, ids, shared)[0], step(model, ids, own)[0], atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "accelerator", "cpu"])
def test_beams_equal_texts_of_their_own(model, mel, cross, ids, implementation):
    """Each beam goes on from another one, again and again, beside windows with other beams and prompts."""
    lengths, random = np.array([3, 2, 1]), np.random.default_rng(0)
    texts = np.repeat(np.asarray(ids)[:, :3], 3, axis=0)
    with ops.using(implementation):
        cache = repeat(prefill(model, ids[:, :3], cross, lengths), 3)
        rows = [list(text[3 - n :]) for text, n in zip(texts, np.repeat(lengths, 3), strict=True)]
        for _ in range(4):
            source = (np.arange(9) // 3 * 3 + random.integers(0, 3, 9)).astype(np.int32)
            new = random.integers(0, 50, 9)
            rows = [[*rows[a], int(b)] for a, b in zip(source, new, strict=True)]
            logits, cache = step(model, new[:, None], reorder(cache, source))
        padded = np.array([text + [0] * (S - len(text)) for text in rows], np.int32)
        expected = decode(model, padded, np.repeat(encode(model, mel), 3, axis=0))  # at once
        for row, text in enumerate(rows):
            np.testing.assert_allclose(logits[row, 0], expected[row, len(text) - 1], atol=1e-4)


# Transformations.


def test_jit_agrees_with_the_plain_call(model, mel, ids):
    np.testing.assert_allclose(run(model, mel, ids), model(mel, ids), atol=1e-5)


def test_vmap_agrees_with_the_batch(model, mel, ids):
    def single(mel, ids):
        return model(mel[None], ids[None])[0]

    np.testing.assert_allclose(jax.jit(jax.vmap(single))(mel, ids), run(model, mel, ids), atol=1e-5)


@pytest.fixture(scope="module")
def score_and_gradient(ids):
    def score(model, mel):
        return jax.nn.log_softmax(model(mel, ids))[..., 0].mean()

    return jax.jit(jax.value_and_grad(score, argnums=(0, 1)))


def test_the_gradient_is_the_slope(model, mel, score_and_gradient):
    along = jnp.asarray(np.random.default_rng(2).normal(size=mel.shape), jnp.float32)
    (above, _), (below, _) = (score_and_gradient(model, mel + step * along) for step in (2e-3, -2e-3))
    _, (_, gradient) = score_and_gradient(model, mel)
    assert gradient.shape == mel.shape
    np.testing.assert_allclose((gradient * along).sum(), (above - below) / 4e-3, rtol=2e-2)


def test_the_gradient_reaches_every_parameter_but_not_the_sinusoids(model, mel, score_and_gradient):
    _, (gradient, _) = score_and_gradient(model, mel)
    found = params_of(gradient)
    assert not found.pop("encoder.embed_positions").any()
    assert [name for name, value in found.items() if not value.any()] == []
    assert all(np.isfinite(value).all() for value in found.values())


def test_the_sinusoids_are_no_parameters(model):
    assert "encoder.embed_positions" not in {
        ".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


def test_a_jitted_function_compiles_once_for_models_of_one_shape(mel):
    first = jax.jit(lambda model, mel: model.encode(mel)[0, 0, 0])
    found = {float(first(small_model(seed=seed), mel)) for seed in range(3)}
    assert first._cache_size() == 1
    assert len(found) == 3


# Precision.

DTYPES = [
    (jnp.float32, jnp.bfloat16),
    (jnp.bfloat16, jnp.float32),
    (jnp.bfloat16, jnp.bfloat16),
    (jnp.float16, jnp.float16),
]


@pytest.mark.parametrize(("dtype", "param_dtype"), DTYPES)
def test_half_precision_is_kept_inside_and_logits_are_float32(model, mel, ids, dtype, param_dtype):
    half = small_model(dtype=dtype, param_dtype=param_dtype)
    stored = {variable.dtype for _, variable in nnx.to_flat_state(nnx.state(half, (nnx.Param, Constant)))}
    assert stored == {jnp.dtype(param_dtype)}
    assert jax.eval_shape(half.encode, mel).dtype == dtype
    logits, expected = run(half, mel, ids), run(model, mel, ids)
    assert logits.dtype == jnp.float32
    assert np.abs(logits - expected).max() < (0.1 if dtype == jnp.float16 else 1.0)
    assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] > 0.99


@pytest.mark.parametrize(
    ("dtype", "offset", "spread"), [(jnp.float32, 1e4, 1.0), (jnp.float16, 2e4, 64.0), (jnp.bfloat16, 256.0, 4.0)]
)
def test_layer_norm_takes_its_statistics_in_float32(dtype, offset, spread):
    half = small_model(dtype=dtype, param_dtype=dtype)
    x = jnp.asarray(offset + spread * np.arange(-8, 8), dtype)
    plain = np.asarray(x, np.float64)
    for norm in (half.encoder.layer_norm, half.encoder.layers[0].self_attn_layer_norm):
        found = norm(x[None])
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found[0], (plain - plain.mean()) / plain.std(), rtol=1e-3, atol=1e-4)


def test_attention_scores_beyond_half_precision_do_not_overflow():
    q = jnp.full((1, 1, 2, 4), 300.0, jnp.float16)
    k = jnp.stack([jnp.full(4, 300.0), jnp.full(4, -300.0)])[None, None].astype(jnp.float16)
    attended = ops.attention(q, k, jnp.eye(2, 4, dtype=jnp.float16)[None, None])
    np.testing.assert_array_equal(attended[0, 0], [[1, 0, 0, 0]] * 2)


# Attention of one's own.


def test_an_attention_function_computes_all_attention(model, mel, ids, cross):
    seen = []

    def attention_fn(q, k, v, mask):
        seen.append((q.shape, k.shape))
        return ops.named("reference").attention(q, k, v, mask)

    own = small_model(attention_fn=attention_fn)
    np.testing.assert_allclose(own(mel, ids), run(model, mel, ids), atol=1e-5)
    assert len(seen) == 1 + 2 * 2
    seen.clear()
    found, _ = step(own, ids[:, :1], KVCache.init(cross, SIZE))
    expected, _ = step(model, ids[:, :1], KVCache.init(cross, SIZE))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert len(seen) == 2 * 2


# Dropout.


def test_dropout_follows_the_random_key_and_is_off_unless_asked_for(model, mel, ids):
    @jax.jit
    def both(dropping, seed):
        return dropping(mel, ids), dropping(mel, ids, deterministic=False, rngs=nnx.Rngs(dropout=jax.random.key(seed)))

    dropping = small_model(dropout=0.3)
    (plain, one), (_, again), (_, other) = (both(dropping, seed) for seed in (0, 0, 1))
    np.testing.assert_allclose(plain, run(model, mel, ids), atol=1e-5)
    np.testing.assert_array_equal(one, again)
    for a, b in [(plain, one), (one, other)]:
        assert np.abs(a - b).max() > 0.1


def test_dropout_without_a_random_key_is_an_error(mel, ids):
    with pytest.raises(ValueError, match="rngs"):
        small_model(dropout=0.3)(mel, ids, deterministic=False)


# By name.

PARAMETERS = {  # those of openai-whisper's models; its sinusoids are no parameters either
    "tiny": 37_184_640,
    "base": 71_825_920,
    "small": 240_582_912,
    "medium": 762_321_920,
    "large": 1_541_570_560,
    "turbo": 806_958_080,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_model_made_by_name_has_as_many_parameters_as_the_released_one(name):
    make = getattr(whisper_nnx, f"create_whisper_{name}")

    def count(encoder_layers, decoder_layers):
        model = nnx.eval_shape(partial(make, encoder_layers=encoder_layers, decoder_layers=decoder_layers))
        return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))

    # All layers are alike: three shallow models tell of the deep one, which would take a while to trace.
    config = RELEASED[ALIASES.get(name, name)]
    in_encoder, in_decoder = count(2, 1) - count(1, 1), count(1, 2) - count(1, 1)
    deeper = (config.encoder_layers - 1) * in_encoder + (config.decoder_layers - 1) * in_decoder
    assert count(1, 1) + deeper == PARAMETERS[name]


def test_a_model_made_by_name_is_as_deep_as_the_released_one():
    assert nnx.eval_shape(whisper_nnx.create_whisper_base).config == RELEASED["base"]


def test_a_model_made_by_name_takes_dtypes_keys_and_changes():
    make = partial(create_whisper, "tiny", encoder_layers=1, decoder_layers=2, param_dtype=jnp.bfloat16)
    model = nnx.eval_shape(lambda: make(dtype=jnp.float16, rngs=nnx.Rngs(7)))
    assert model.config == replace(RELEASED["tiny"], encoder_layers=1, decoder_layers=2)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype(jnp.bfloat16)}
    assert model.decoder.dtype == jnp.float16


def create_quickly(seed: int = 0) -> Whisper:
    """By the real constructor; with few different shapes, each of which is compiled."""
    same = {"d_model": 8, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "vocab_size": 50, "max_target_positions": 50}
    return create_whisper(small_config(), decoder_layers=1, rngs=nnx.Rngs(seed), **same)


def test_random_weights_depend_on_the_key_alone():
    first, again, other = (params_of(create_quickly(seed)) for seed in (1, 1, 2))
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])
        if name.endswith(("kernel", "embedding")):
            assert (value != other[name]).any()


def test_sinusoids_are_sines_then_cosines_of_falling_frequency():
    table = params_of(create_quickly())["encoder.embed_positions"]
    width = table.shape[1] // 2
    position, i = np.mgrid[: len(table), :width]
    angle = position / 10_000 ** (i / (width - 1))
    np.testing.assert_allclose(table, np.concatenate([np.sin(angle), np.cos(angle)], axis=1), atol=1e-5)


def test_an_unknown_size_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'huge'.*tiny.*large-v3.*turbo"):
        create_whisper("huge")
