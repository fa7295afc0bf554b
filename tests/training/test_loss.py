"""Losses compared with plain numpy and with optax's CTC."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.small import quick_compilation  # noqa: F401
from whisper_nnx.training import loss

B, S, V, T = 3, 5, 7, 9
random = np.random.default_rng(0)
LOGITS = jnp.asarray(random.normal(0, 2, (B, S, V)), jnp.float32)
LABELS = jnp.asarray(random.integers(0, V, (B, S)), jnp.int32)
WEIGHTS = jnp.asarray(random.integers(0, 2, (B, S)), jnp.float32).at[0, 0].set(1)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_equals_that_of_smoothed_labels(smoothing):
    target = (1 - smoothing) * np.eye(V)[LABELS] + smoothing / V
    expected = -(target * log_softmax(LOGITS)).sum(-1)
    entropy, _ = loss.cross_entropy(LOGITS, LABELS, WEIGHTS, smoothing)
    np.testing.assert_allclose(entropy.value, (expected * WEIGHTS).sum() / WEIGHTS.sum(), rtol=1e-5)


def test_labels_without_weight_have_no_gradient():
    gradient = jax.jit(jax.grad(lambda x: loss.cross_entropy(x, LABELS, WEIGHTS, 0.1)[0].value))(LOGITS)
    moved = np.abs(gradient).sum(-1) > 0
    np.testing.assert_array_equal(moved, WEIGHTS > 0)


def test_accuracy_counts_weighted_labels_that_are_most_likely():
    right = (np.argmax(LOGITS, -1) == LABELS) * WEIGHTS
    _, accuracy = loss.cross_entropy(LOGITS, LABELS, WEIGHTS)
    np.testing.assert_allclose(accuracy.value, right.sum() / WEIGHTS.sum())


def test_the_loss_without_weights_is_0():
    entropy, accuracy = loss.cross_entropy(LOGITS, LABELS, 0 * WEIGHTS)
    assert entropy.value == accuracy.value == 0


def test_divergence_is_summed_over_the_vocabulary_at_the_temperature():
    teacher = LOGITS[::-1]
    ours, theirs = log_softmax(LOGITS / 2), log_softmax(teacher / 2)
    expected = 4 * (np.exp(theirs) * (theirs - ours)).sum(-1)
    value = loss.divergence(LOGITS, teacher, WEIGHTS, 2.0).value
    np.testing.assert_allclose(value, (expected * WEIGHTS).sum() / WEIGHTS.sum(), rtol=1e-5)
    np.testing.assert_allclose(loss.divergence(LOGITS, LOGITS, WEIGHTS, 2.0).value, 0, atol=1e-6)


def test_guide_is_minimal_for_even_attention_over_thirds_of_spans():
    scores = jnp.asarray(random.normal(0, 2, (B, 2, S, T)), jnp.float32)
    spans = np.zeros((B, S, 2), np.int32)
    spans[0, 1], spans[1, 0], spans[2, 4] = (2, 8), (3, 5), (8, 9)
    probability = np.exp(log_softmax(scores))
    expected = 0.0
    for head in (0, 1):
        expected -= np.log(3 * probability[0, head, 1, 2:8].reshape(3, 2).sum(axis=1)).mean()
        expected -= np.log(2 * probability[1, head, 0, 3:5]).mean()
        expected -= np.log(probability[2, head, 4, 8])
    np.testing.assert_allclose(loss.guide(scores, jnp.asarray(spans)).value, expected / 6, rtol=1e-5)


def test_unknown_spans_are_not_guided():
    scores = jnp.asarray(random.normal(0, 2, (B, 2, S, T)), jnp.float32)
    value, gradient = jax.jit(jax.value_and_grad(lambda x: loss.guide(x, jnp.zeros((B, S, 2), jnp.int32)).value))(
        scores
    )
    assert value == 0
    assert not gradient.any()


# CTC; blank is the last class.

ctc = jax.jit(loss.ctc, static_argnums=3)
CTC_LOGITS = jnp.asarray(random.normal(0, 2, (4, T, V)), jnp.float32)
CTC_LABELS = jnp.asarray([[0, 1, 2, -1], [3, 3, -1, -1], [5, 4, 5, 4], [-1, -1, -1, -1]])
EMPTY = jnp.ones(4)


def optax_ctc(logits, labels):
    paddings = (labels < 0).astype(jnp.float32)
    return optax.ctc_loss(logits, jnp.zeros(logits.shape[:2]), jnp.maximum(labels, 0), paddings, blank_id=V - 1)


def test_ctc_and_its_gradient_equal_optax():
    ours = jax.jit(jax.value_and_grad(lambda x: loss.ctc(x, CTC_LABELS, EMPTY, V - 1).total))(CTC_LOGITS)
    theirs = jax.jit(jax.value_and_grad(lambda x: optax_ctc(x, CTC_LABELS).sum()))(CTC_LOGITS)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    np.testing.assert_allclose(ours[1], theirs[1], atol=1e-5)


def test_ctc_is_the_sum_over_all_alignments():
    logits, label = CTC_LOGITS[:1, :4], [3, 3]
    log_probs = log_softmax(logits[0])
    total = 0.0
    for path in itertools.product(range(V), repeat=4):
        merged = [at for at, before in zip(path, (None, *path), strict=False) if at != before]
        if [at for at in merged if at != V - 1] == label:
            total += np.exp(sum(log_probs[t, at] for t, at in enumerate(path)))
    value = ctc(logits, jnp.asarray([[*label, -1]]), EMPTY[:1], V - 1)
    np.testing.assert_allclose(value.total, -np.log(total), rtol=1e-5)
    assert value.weight == 2


def test_ctc_of_a_confidently_wrong_output_is_finite_and_has_a_gradient():
    logits = jnp.zeros((1, T, V)).at[:, :, V - 1].set(200.0)
    value, gradient = jax.jit(jax.value_and_grad(lambda x: loss.ctc(x, CTC_LABELS[2:3], EMPTY[:1], V - 1).value))(
        logits
    )
    np.testing.assert_allclose(value, 200.0 - math.log(math.comb(T, 4)) / 4, rtol=1e-5)  # that many alignments
    assert np.isfinite(gradient).all()
    assert (gradient[0, :, V - 1] > 0).any()


@pytest.mark.parametrize(
    ("labels", "empty", "counted"),
    [
        ([3, 3, 3, 3, 3, -1], 0, True),  # five labels and four blanks between them just fit into nine positions
        ([3, 3, 3, 3, 3, 3], 0, False),
        ([0, V - 1, -1, -1, -1, -1], 0, False),  # blank is not a label
        ([0, V + 5, -1, -1, -1, -1], 0, False),  # a token added by a fine-tune has no class
        ([-1] * 6, 0, False),
        ([-1] * 6, 1, True),  # no speech
    ],
)
def test_ctc_counts_the_rows_that_fit(labels, empty, counted):
    rows = jnp.asarray([labels]), jnp.asarray([empty])
    value, gradient = jax.jit(jax.value_and_grad(lambda x: loss.ctc(x, *rows, V - 1).total))(CTC_LOGITS[:1])
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert (value > 0) == counted == gradient.any()


def test_frames_are_the_cross_entropy_of_known_positions():
    labels = np.array([[0, -1, 3, 6, -1]] * B)
    expected = -log_softmax(LOGITS)[:, [0, 2, 3], [0, 3, 6]].mean()
    assert float(loss.frames(LOGITS, jnp.asarray(labels)).value) == pytest.approx(expected, rel=1e-5)
    assert float(loss.frames(LOGITS, jnp.full((B, S), -1)).value) == 0
