"""The training step: updates, frozen parts, and options that change only cost."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.small import quick_compilation, small_config, small_model, small_tokenizer  # noqa: F401
from tests.training.batches import Run, arrays_of, random_batch, small_run
from whisper_nnx.audio.features import log_mel_spectrogram
from whisper_nnx.model.whisper import Whisper
from whisper_nnx.training import step
from whisper_nnx.training.config import AugmentConfig, LossConfig, ModelConfig, TrainConfig
from whisper_nnx.training.step import create_state, make_mesh, make_trainee, new_model, put_batch, trained_model

PLAIN = {"ctc_weight": 0.0, "frame_weight": 0.0, "guide_weight": 0.0, "label_smoothing": 0.0}


def moved(config: TrainConfig, batches: int = 2, **model) -> dict[str, np.ndarray]:
    training = Run(config, small_model(spread=0.8, **model))
    for seed in range(batches):
        training(**random_batch(seed=seed))
    return arrays_of(training.state)


def assert_equal(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], atol: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for path, x in ours.items():
        np.testing.assert_allclose(x, theirs[path], atol=atol, err_msg=path)


@pytest.mark.slow
def test_the_loss_goes_down_and_accuracy_up():
    training = Run(small_run(learning_rate=0.01, steps=100))
    seen = [training(**random_batch()) for _ in range(25)]
    assert seen[-1]["accuracy"] > seen[0]["accuracy"] + 0.2
    for name in ("loss", "cross_entropy", "ctc", "guide"):
        assert seen[-1][name] < 0.9 * seen[0][name]


def test_a_plain_step_equals_a_step_by_hand():
    """Compares with a loss on the model's own call and plain optax."""
    model, batch, config = small_model(spread=0.8), random_batch(), small_run(**PLAIN)
    training = Run(config, model)
    metrics = training(**batch)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    @jax.value_and_grad
    def loss_of(params):
        mel = log_mel_spectrogram(batch["waveform"], small_config().num_mel_bins)
        logits = nnx.merge(graph, params, rest)(mel, batch["ids"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return (losses * batch["weights"]).sum() / batch["weights"].sum()

    value, gradient = loss_of(params)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(gradient), rtol=1e-4)
    found = trained_model(training.static, training.state)
    for path, x in nnx.to_flat_state(nnx.state(found, nnx.Param)):
        direction = np.asarray(dict(nnx.to_flat_state(gradient))[path][...])
        change = np.asarray(x[...] - dict(nnx.to_flat_state(params))[path][...])
        large = np.abs(direction) > 1e-3 * metrics["gradient_norm"]
        assert (np.sign(change[large]) == -np.sign(direction[large])).all()


@pytest.mark.slow
def test_remat_does_not_change_results():
    assert_equal(moved(small_run(remat=True), dropout=0.2), moved(small_run(), dropout=0.2))


@pytest.mark.slow
def test_remat_recomputes_layers():
    def recomputed(remat: bool) -> int:
        training = Run(small_run(remat=remat))
        batch = put_batch(random_batch(), training.mesh)
        return str(jax.make_jaxpr(lambda *given: training.step(*given))(training.state, batch)).count("remat")

    assert recomputed(True) >= recomputed(False) + 3  # the layers


@pytest.mark.slow
def test_accumulated_batches_equal_one_large_batch():
    large = random_batch(rows=8)
    halves = [{name: x[half] for name, x in large.items()} for half in (slice(4), slice(4, 8))]
    config = {"warmup_steps": 0, "decay": "constant"}
    whole, parts = Run(small_run(**config)), Run(small_run(accumulate=2, **config))
    whole(**large)
    before = arrays_of(parts.state)
    parts(**halves[0])
    assert_equal(arrays_of(parts.state), before, atol=0.0)
    parts(**halves[1])
    assert_equal(arrays_of(parts.state), arrays_of(whole.state), atol=2e-5)
    assert int(parts.state.step) == 2


@pytest.mark.slow
def test_weights_depend_on_the_seed():
    config = {"augment": AugmentConfig(time_masks=2, time_mask_s=0.3)}
    same = moved(small_run(**config), dropout=0.2)
    assert_equal(same, moved(small_run(**config), dropout=0.2), atol=0.0)
    other = moved(small_run(seed=1, **config), dropout=0.2)
    assert any(np.abs(x - other[path]).max() > 1e-4 for path, x in same.items())


def test_each_step_uses_new_random_numbers():
    """With learning rate 0 and the same batch, only the random numbers change."""
    training = Run(small_run(learning_rate=0.0, augment=AugmentConfig(time_masks=2, time_mask_s=0.3)))
    assert training(**random_batch())["cross_entropy"] != training(**random_batch())["cross_entropy"]


def test_frozen_parts_stay_and_have_no_moments():
    config = small_run(freeze=("encoder", "decoder.embed_tokens"))
    training = Run(config)
    frozen = {path: np.asarray(x) for path, x in training.state.frozen.items()}
    assert {path.split(".")[0] for path in training.state.params} == {"decoder", "ctc_head"}
    assert "decoder.embed_tokens.embedding" in frozen
    assert "decoder.embed_positions.embedding" not in frozen  # whole names match, not prefixes of them
    moments = sum(x.size for x in jax.tree.leaves(training.state.opt_state) if x.ndim)
    assert moments == 2 * sum(x.size for x in training.state.params.values())
    training(**random_batch())
    for path, x in frozen.items():
        np.testing.assert_array_equal(x, training.state.frozen[path])


def test_invalid_freezing_is_rejected():
    with pytest.raises(ValueError, match="starts with 'encoders'"):
        Run(small_run(freeze=("encoders",)))
    with pytest.raises(ValueError, match="leaves no parameter"):
        Run(small_run(freeze=("encoder", "decoder", "ctc_head")))


def test_the_average_follows_the_weights_and_is_exported(compilations):
    training = Run(small_run(ema_decay=0.9, learning_rate=0.01))
    start = arrays_of(training.state)
    for seed in range(3):
        training(**random_batch(seed=seed))
    assert len([name for name in compilations if "step" in name]) == 1
    path = "decoder.layers.0.fc1.kernel"
    now, mean = training.state.params[path], training.state.ema[path]
    assert 0 < np.abs(mean - start[path]).max() < np.abs(now - start[path]).max()
    averaged, last = (trained_model(training.static, training.state, use_ema=use) for use in (True, False))
    np.testing.assert_array_equal(averaged.decoder.layers[0].fc1.kernel[...], mean)
    np.testing.assert_array_equal(last.decoder.layers[0].fc1.kernel[...], now)


def test_an_exported_model_survives_the_next_step():
    model = small_model(spread=0.8)
    training = Run(small_run(freeze=("encoder", "decoder.embed_tokens")), model)
    training(**random_batch())
    taken = trained_model(training.static, training.state)
    training(**random_batch())
    for kept in (model, taken):  # donated arrays would be deleted
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(nnx.state(kept)))


@pytest.mark.slow
def test_a_step_is_compiled_once(compilations):
    training = Run(small_run(accumulate=2, ema_decay=0.9))
    for seed in range(4):
        training(**random_batch(seed=seed))
    assert len([name for name in compilations if "step" in name]) == 1


def test_the_state_is_donated():
    training = Run(small_run())
    before = training.state
    training(**random_batch())
    assert before.params["encoder.conv1.kernel"].is_deleted()


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_masters():
    training = Run(small_run(), small_model(spread=0.8, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))
    reference = Run(small_run())
    metrics, exact = training(**random_batch()), reference(**random_batch())
    assert {x.dtype for x in training.state.params.values()} == {np.dtype("float32")}
    assert metrics["loss"] != exact["loss"]
    np.testing.assert_allclose(metrics["loss"], exact["loss"], rtol=0.02)
    np.testing.assert_allclose(metrics["gradient_norm"], exact["gradient_norm"], rtol=0.1)
    assert trained_model(training.static, training.state, dtype=jnp.bfloat16).encoder.conv1.kernel.dtype == jnp.bfloat16


# A part of a window.


def test_a_clip_gets_the_positions_of_its_place():
    model = small_model(spread=0.8)
    mel = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 40)), jnp.float32)
    at = jnp.asarray([0, 30])
    encoded = jax.jit(Whisper.encode)(model, mel, first_position=at)
    np.testing.assert_allclose(encoded[0], jax.jit(Whisper.encode)(model, mel)[0], atol=1e-5)
    table = model.encoder.embed_positions[...]
    model.encoder.embed_positions[...] = jnp.roll(table, -30, axis=0)
    np.testing.assert_allclose(encoded[1], jax.jit(Whisper.encode)(model, mel)[1], atol=1e-5)


@pytest.mark.slow
def test_the_step_places_its_clips():
    losses = []
    for first in (0, 25):
        batch = random_batch(seconds=0.5, first_position=np.full(8, first, np.int32))
        losses.append(Run(small_run())(**batch)["cross_entropy"])
    assert losses[0] != losses[1]


# Initial models.


def test_a_new_model_has_the_tokenizers_vocabulary_and_scaled_convolutions():
    shape = {name: getattr(small_config(), name) for name in ("d_model", "encoder_layers", "decoder_layers")}
    shape |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    plain, scaled = (
        new_model(ModelConfig(shape=shape, conv_init_scale=scale), small_tokenizer(), nnx.Rngs(0))
        for scale in (1.0, 3.0)
    )
    assert plain.config.vocab_size == small_tokenizer().vocab_size
    for name in ("conv1", "conv2"):
        ours, theirs = getattr(scaled.encoder, name).kernel[...], getattr(plain.encoder, name).kernel[...]
        np.testing.assert_allclose(ours, 3 * theirs)
    np.testing.assert_array_equal(scaled.encoder.layers[0].fc1.kernel[...], plain.encoder.layers[0].fc1.kernel[...])


def test_invalid_shapes_are_rejected():
    for shape, reason in [({"size": "huge"}, "size='huge'"), ({"d_mode": 4}, "d_mode"), ({"d_model": 8}, "missing")]:
        with pytest.raises(ValueError, match=reason):
            new_model(ModelConfig(shape=shape), small_tokenizer(), nnx.Rngs(0))


def test_guided_heads_become_the_alignment_heads():
    training = Run(small_run())
    assert trained_model(training.static, training.state).config.alignment_heads == ((0, 1), (1, 0))
    with pytest.raises(ValueError, match=r"\(7, 0\) does not exist"):
        make_trainee(small_model(), small_run(guide_heads=((7, 0),)), nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"guide_weight=0.5 needs"):
        make_trainee(small_model(), small_run(guide_heads=()), nnx.Rngs(0))


def test_ctc_needs_a_tokenizer():
    model = small_model()
    model.tokenizer = None
    with pytest.raises(ValueError, match="tokenizer"):
        make_trainee(model, TrainConfig(loss=LossConfig(ctc_weight=0.1)), nnx.Rngs(0))
    assert make_trainee(model, TrainConfig(), nnx.Rngs(0)).ctc_head is None


def test_rows_that_cannot_be_split_evenly_are_rejected(monkeypatch):
    monkeypatch.setattr(step.jax, "local_device_count", lambda: 3)
    with pytest.raises(ValueError, match="8 rows cannot be split evenly over 3 devices"):
        put_batch(random_batch(), make_mesh())


def test_the_state_is_a_pytree_of_arrays_by_path():
    state, static = create_state(make_trainee(small_model(), small_run(), nnx.Rngs(0)), small_run(), make_mesh())
    assert {*state.params, *state.frozen} == set(static.places)
    assert set(state.frozen) == {"encoder.embed_positions"}
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
