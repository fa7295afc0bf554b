"""Gradients of the whole model against transformers' in float32, on random weights.

Tolerance: 1e-3 of each gradient's norm; sums in another order differ by a hundredth of it, a gradient that lacks a path
through the network by far more.
"""

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from tests.reference.test_weight_loader import SMALL, random_transformers_model
from tests.small import quick_compilation  # noqa: F401
from weight_loader import load_model
from weight_loader.names import SINUSOIDS, parameters
from whisper_nnx.audio.features import log_mel_spectrogram
from whisper_nnx.training import step
from whisper_nnx.training.config import OptimizerConfig, TrainConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*no tokenizer:")
ROWS, LABELS = 3, 11


def batch() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    # Without 0: transformers' padding, whose embedding is not trained as an input there.
    ids = random.integers(1, SMALL["vocab_size"], (ROWS, LABELS)).astype(np.int32)
    weights = np.ones((ROWS, LABELS), np.float32)
    weights[0, :4], weights[1, 7:] = 0, 0
    samples = SMALL["max_source_positions"] * 320
    return {
        "waveform": random.normal(0, 0.1, (ROWS, samples)).astype(np.float32),
        "ids": ids,
        "labels": np.roll(ids, -1, axis=1),
        "weights": weights,
    }


def gradients_of_transformers(
    model, made: dict[str, np.ndarray], mel: np.ndarray
) -> tuple[float, dict[str, np.ndarray]]:
    labels = torch.tensor(np.where(made["weights"] > 0, made["labels"], -100)).long()
    out = model.eval()(torch.tensor(mel), decoder_input_ids=torch.tensor(made["ids"]).long(), labels=labels)
    out.loss.backward()
    return out.loss.item(), {name: x.grad.numpy() for name, x in model.named_parameters() if x.requires_grad}


@pytest.mark.parametrize(
    ("tied", "remat"),
    [
        (True, False),
        *(pytest.param(*both, marks=pytest.mark.slow) for both in ((True, True), (False, False), (False, True))),
    ],
)
def test_every_gradient_equals_that_of_transformers(tmp_path, tied, remat):
    theirs = random_transformers_model(**SMALL, tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path)
    ours, config = load_model(tmp_path), TrainConfig(optimizer=OptimizerConfig(remat=remat))
    made, mesh = batch(), step.make_mesh()
    state, static = step.create_state(step.make_trainee(ours, config, nnx.Rngs(0)), config, mesh)

    @jax.jit
    @jax.value_and_grad
    def loss_of(params):
        trainee = static.trainee(state.frozen | params)
        return step._losses(trainee, None, made, jax.random.key(0), config, mesh, False)[0]

    loss, gradients = loss_of(state.params)
    mel = np.asarray(log_mel_spectrogram(made["waveform"], ours.config.num_mel_bins))
    expected_loss, expected = gradients_of_transformers(theirs, made, mel)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    named = (row for row in parameters(ours.config) if row != SINUSOIDS)  # they are not trained
    rows = {".".join(map(str, row.path)): row.stored["hf"] for row in named}
    assert gradients.keys() == rows.keys()
    assert {stored.name for stored in rows.values()} == expected.keys()
    for path, gradient in gradients.items():
        reference = expected[rows[path].name].transpose(rows[path].axes)
        norm = np.linalg.norm(reference)
        assert norm > 0, path
        assert np.linalg.norm(gradient - reference) < 1e-3 * norm, path
