"""Distillation: making students and training them."""

from dataclasses import replace

import numpy as np
import pytest

from tests.small import quick_compilation, small_model  # noqa: F401
from tests.training.batches import Run, random_batch, small_run
from whisper_nnx.training import step
from whisper_nnx.training.config import DistillConfig
from whisper_nnx.training.distill import kept_layers, make_student

DISTILL = DistillConfig(teacher="given", decoder_layers=2)


@pytest.mark.parametrize(
    ("layers", "keep", "kept"), [(32, 2, (0, 31)), (4, 4, (0, 1, 2, 3)), (5, 3, (0, 2, 4)), (32, 1, (0,)), (1, 1, (0,))]
)
def test_kept_layers_are_evenly_spaced_from_first_to_last(layers, keep, kept):
    assert kept_layers(layers, keep) == kept


@pytest.mark.parametrize("keep", [0, 5])
def test_more_layers_than_the_teacher_has_are_rejected(keep):
    with pytest.raises(ValueError, match=rf"decoder_layers={keep} must be from 1 to the teacher's 4"):
        kept_layers(4, keep)


def test_a_student_copies_the_encoder_embeddings_and_kept_layers():
    teacher = small_model(decoder_layers=3, alignment_heads=((0, 1), (1, 1), (2, 0)))
    student = make_student(teacher, DISTILL)
    assert student.config.decoder_layers == len(student.decoder.layers) == 2
    assert student.config.alignment_heads == ((0, 1), (1, 0))
    for ours, theirs in [(0, 0), (1, 2)]:
        kernel = student.decoder.layers[ours].fc1.kernel
        np.testing.assert_array_equal(kernel[...], teacher.decoder.layers[theirs].fc1.kernel[...])
    np.testing.assert_array_equal(
        student.decoder.embed_tokens.embedding[...], teacher.decoder.embed_tokens.embedding[...]
    )
    np.testing.assert_array_equal(student.encoder.conv1.kernel[...], teacher.encoder.conv1.kernel[...])
    assert student.tokenizer == teacher.tokenizer


@pytest.mark.slow
def test_a_student_equal_to_its_teacher_has_no_divergence():
    teacher = small_model(spread=0.8)
    metrics = Run(small_run(distill=DISTILL), make_student(teacher, DISTILL), teacher)(**random_batch())
    assert abs(metrics["kl"]) < 1e-4


@pytest.mark.slow
def test_the_student_approaches_its_unchanged_teacher():
    teacher = small_model(spread=0.8, decoder_layers=3)
    before = np.array(teacher.decoder.layers[1].fc1.kernel[...])
    distill = replace(DISTILL, kl_weight=1.0, cross_entropy_weight=0.0)
    config = small_run(distill=distill, ctc_weight=0.0, guide_weight=0.0, learning_rate=0.01, steps=100)
    training = Run(config, make_student(teacher, distill), teacher)
    divergences = [training(**random_batch())["kl"] for _ in range(30)]
    assert divergences[-1] < 0.5 * divergences[0]
    np.testing.assert_array_equal(before, teacher.decoder.layers[1].fc1.kernel[...])


def test_the_loss_is_the_weighted_sum_of_its_parts():
    teacher = small_model(spread=0.8, decoder_layers=3)
    distill = DistillConfig(teacher="given", decoder_layers=2, kl_weight=0.3, cross_entropy_weight=0.7)
    found = Run(small_run(distill=distill), make_student(teacher, distill), teacher)(**random_batch())
    weights = {"cross_entropy": 0.7, "kl": 0.3, "ctc": 0.3, "frames": 0.2, "guide": 0.5}
    expected = sum(weight * found[name] for name, weight in weights.items())
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)
    assert found["kl"] > 0.01


@pytest.mark.slow
def test_a_shared_encoder_is_computed_once_with_the_same_result(monkeypatch):
    teacher = small_model(spread=0.8, decoder_layers=3)
    config = small_run(distill=DISTILL, freeze=("encoder",))

    def metrics() -> dict[str, float]:
        training = Run(config, make_student(teacher, DISTILL), teacher)
        seen.append(step._has_encoder_of(teacher, training.state, training.static))
        return training(**random_batch())

    seen: list[bool] = []
    once = metrics()
    monkeypatch.setattr(step, "_has_encoder_of", lambda *_: False)
    twice = metrics()
    assert seen == [True, False]
    for name, value in once.items():
        np.testing.assert_allclose(value, twice[name], rtol=1e-5, err_msg=name)


def test_a_trained_or_different_encoder_is_not_shared():
    teacher, other = small_model(decoder_layers=3), small_model(seed=8, decoder_layers=3)
    for config, model in [(small_run(), teacher), (small_run(freeze=("encoder",)), other)]:
        training = Run(config, model, teacher)
        assert not step._has_encoder_of(teacher, training.state, training.static)


def test_a_teacher_with_another_vocabulary_is_rejected():
    with pytest.raises(ValueError, match="vocab_size=400, its student 338"):
        Run(small_run(), small_model(), small_model(vocab_size=400))
