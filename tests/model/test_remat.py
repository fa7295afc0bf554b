"""`remat=True`: the same values and gradients, whatever is differentiated, and a model that is as it was."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.small import quick_compilation, small_config, small_mel  # noqa: F401
from tests.small import small_model as _small_model
from whisper_nnx.model.layers import audio_scores
from whisper_nnx.model.whisper import Whisper

small_model = partial(_small_model, spread=0.8)
IDS = jnp.asarray(np.random.default_rng(1).integers(0, small_config().vocab_size, (2, 6)), jnp.int32)


def score(model: Whisper, mel: jax.Array, remat: bool) -> jax.Array:
    """A number that depends on all layers."""
    cross = model.decoder.cross_attention(model.encode(mel, remat=remat))
    hidden, queries, *_ = model.decoder.hidden_states(IDS, cross, [(0, 0), (1, 1)], remat=remat)
    scores = audio_scores(queries, cross, [(0, 0), (1, 1)])
    return jnp.square(model.decoder.logits(hidden)).mean() + scores.mean()


def assert_close(ours, theirs) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def by_both(remat, model, mel):
    return jax.value_and_grad(partial(score, remat=remat), argnums=(0, 1))(model, mel)


def by_mel_in_vmap_under_dropout(remat, model, mel):
    def heard(mel):
        rngs = nnx.Rngs(dropout=jax.random.key(3))
        return jnp.square(model.encode(mel, deterministic=False, rngs=rngs, remat=remat)).mean()

    return jax.vmap(jax.value_and_grad(heard))(jnp.stack([mel, 2 * mel]))


def by_model_under_dropout(remat, model, mel):
    def score(model):
        logits = model(mel, IDS, deterministic=False, rngs=nnx.Rngs(dropout=3), remat=remat)
        return jnp.square(logits).mean()

    return jax.value_and_grad(score)(model)


@pytest.mark.parametrize(
    "way", [by_both, by_mel_in_vmap_under_dropout, pytest.param(by_model_under_dropout, marks=pytest.mark.slow)]
)
def test_remat_changes_neither_values_nor_gradients(way):
    model, mel = small_model(dropout=0.3), small_mel(2)
    both = jax.jit(lambda model, mel: (way(True, model, mel), way(False, model, mel)))
    assert_close(*both(model, mel))


def test_remat_leaves_the_model_as_it_was():
    model, mel = small_model(), small_mel(2)
    before = jax.jit(Whisper.encode)(model, mel)
    jax.grad(lambda mel: model.encode(mel, remat=True).sum())(mel)
    np.testing.assert_array_equal(jax.jit(Whisper.encode)(model, mel), before)


def test_each_layer_draws_its_own_dropout_under_remat():
    model, mel = small_model(dropout=0.3), small_mel(2)
    kept, recomputed = (nnx.Rngs(dropout=0) for _ in range(2))
    expected = model.encode(mel, deterministic=False, rngs=kept)
    found = model.encode(mel, deterministic=False, rngs=recomputed, remat=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert recomputed.dropout.count[...] == kept.dropout.count[...] == 3  # of the input, and two in the layer


def test_a_failure_inside_a_layer_leaves_the_model_whole():
    model, mel = small_model(), small_mel(2)
    before = jax.jit(Whisper.encode)(model, mel)

    def fail(*_):
        raise RuntimeError("no attention")

    model.encoder.layers[0].self_attn.attention_fn = fail
    with pytest.raises(RuntimeError, match="no attention"):
        jax.grad(lambda mel: model.encode(mel, remat=True).sum())(mel)
    model.encoder.layers[0].self_attn.attention_fn = None
    np.testing.assert_array_equal(jax.jit(Whisper.encode)(model, mel), before)
