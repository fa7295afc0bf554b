"""Training runs in this process: evaluation, signals and resuming."""

import math
import signal
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from tests.small import quick_compilation, small_model  # noqa: F401
from tests.training.recordings import cache, write_manifest  # noqa: F401
from weight_loader import load_model, save_pretrained
from whisper_nnx.model.whisper import Whisper
from whisper_nnx.training.config import (
    DataConfig,
    EvaluateConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from whisper_nnx.training.metrics import read_records
from whisper_nnx.training.run import Result, _Run, train
from whisper_nnx.training.step import make_trainee

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    return write_manifest(tmp_path_factory.mktemp("recordings"))


@pytest.fixture
def config(manifest, tmp_path) -> TrainConfig:
    return TrainConfig(
        output=str(tmp_path / "out"),
        steps=4,
        batch_size=2,
        log_every=3,
        save_every=2,
        model=ModelConfig(init="small"),
        data=DataConfig(train=(str(manifest),), window_s=1.0, max_label_length=24),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=1, decay="constant"),
        evaluate=EvaluateConfig(manifest=(str(manifest),), every=1),
    )


def run(config: TrainConfig, evaluate=None, export=save_pretrained) -> Result:
    return train(config, small_model(decoder_layers=1), export, evaluate=evaluate)


def weights(model: Whisper) -> list[np.ndarray]:
    return [np.asarray(array) for array in jax.tree.leaves(nnx.state(model))]


class Wers:
    """An evaluation that returns these WERs in order and records the evaluated weights."""

    def __init__(self, *wers: float):
        self.wers, self.seen = list(wers), []

    def __call__(self, model: Whisper) -> dict[str, float]:
        self.seen.append(weights(model))
        return {"wer": self.wers[len(self.seen) - 1], "cer": 0.5}


def lines(config: TrainConfig, name: str) -> list[tuple[int, float]]:
    records = read_records(Path(config.output) / "metrics.jsonl")
    return [(record["step"], record[name]) for record in records if name in record]


@pytest.mark.slow
def test_the_best_model_by_word_error_rate_is_kept(config):
    evaluate = Wers(0.9, 0.2, 0.5, 0.3)
    result = run(config, evaluate)
    assert result == Result(step=4, best_wer=0.2)
    assert lines(config, "wer") == [(1, 0.9), (2, 0.2), (3, 0.5), (4, 0.3)]
    best, last = (weights(load_model(Path(config.output) / name)) for name in ("best", "export"))
    assert all(map(np.array_equal, best, evaluate.seen[1]))
    assert all(map(np.array_equal, last, evaluate.seen[3]))
    assert not all(map(np.array_equal, best, last))


@pytest.mark.slow
def test_records_are_means_that_cover_each_step_once(config):
    config = replace(config, evaluate=EvaluateConfig())
    every_step = replace(config, log_every=1, output=config.output + "1")
    run(config)
    run(every_step)
    assert lines(config, "steps") == [(2, 2), (3, 1), (4, 1)]  # a checkpoint ends a mean too
    losses = dict(lines(every_step, "loss"))
    assert list(losses) == [1, 2, 3, 4]
    assert dict(lines(config, "loss")) == {2: (losses[1] + losses[2]) / 2, 3: losses[3], 4: losses[4]}


@pytest.mark.slow
def test_a_signal_during_evaluation_saves_and_the_run_resumes_with_that_evaluation(config):
    seen = []

    def interrupted(model: Whisper) -> dict[str, float]:
        seen.append(weights(model))
        if len(seen) == 3:
            signal.raise_signal(signal.SIGTERM)
        return {"wer": 1 / len(seen)}

    assert run(config, interrupted) == Result(step=3, best_wer=0.5, stopped="SIGTERM")
    assert not (Path(config.output) / "export").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    evaluate = Wers(0.6, 0.4)
    assert run(config, evaluate) == Result(step=4, best_wer=0.4)
    assert all(map(np.array_equal, seen[2], evaluate.seen[0]))
    assert lines(config, "wer") == [(1, 1.0), (2, 0.5), (3, 0.6), (4, 0.4)]
    uninterrupted = replace(config, output=config.output + "_uninterrupted", evaluate=EvaluateConfig())
    run(uninterrupted)
    ours, theirs = (weights(load_model(Path(output.output) / "export")) for output in (config, uninterrupted))
    assert all(map(np.array_equal, ours, theirs))


def raise_signals_at(step: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises up to `count` signals when metrics of that step are collected."""
    collect, left = _Run._collect, [signal.SIGINT] * count

    def collect_and_raise(self: _Run, count: int) -> None:
        collect(self, count)
        if self.step == step and left:
            signal.raise_signal(left.pop())

    monkeypatch.setattr(_Run, "_collect", collect_and_raise)


@pytest.mark.slow
def test_a_signal_between_steps_saves_after_the_step(config, monkeypatch, capsys):
    config = replace(config, evaluate=EvaluateConfig(), save_every=10, log_every=1)
    raise_signals_at(3, 1, monkeypatch)
    assert run(config) == Result(step=3, best_wer=None, stopped="SIGINT")
    assert run(config) == Result(step=4, best_wer=None)
    assert "resuming at step 3 of 4" in capsys.readouterr().err
    assert lines(config, "steps") == [(step, 1) for step in range(1, 5)]


def test_a_second_signal_ends_a_run_at_once(config, monkeypatch):
    config = replace(config, evaluate=EvaluateConfig(), save_every=10)
    raise_signals_at(3, 2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert not [path for path in (Path(config.output) / "checkpoints").iterdir() if path.name.isdigit()]


@pytest.mark.slow
def test_a_failing_evaluation_loses_no_steps(config, capsys):
    def fail(model: Whisper) -> dict[str, float]:
        raise OSError("no such recording")

    config = replace(config, save_every=10, evaluate=replace(config.evaluate, every=3))
    with pytest.raises(OSError, match="no such recording"):
        run(config, fail)
    assert run(config, Wers(0.5, 0.4)) == Result(step=4, best_wer=0.4)
    assert "resuming at step 3 of 4" in capsys.readouterr().err
    assert lines(config, "wer") == [(3, 0.5), (4, 0.4)]


@pytest.mark.slow
def test_a_finished_run_only_exports_again(config):
    run(config, Wers(0.4, 0.3, 0.2, 0.1))
    exported: list[tuple[list[np.ndarray], Path]] = []
    again = run(config, Wers(), lambda model, folder: exported.append((weights(model), folder)))
    assert again == Result(step=4, best_wer=0.1)
    [(array, folder)] = exported
    assert folder == Path(config.output) / "export"
    assert all(map(np.array_equal, array, weights(load_model(folder))))
    assert [step for step, _ in lines(config, "wer")] == [1, 2, 3, 4]


def test_an_output_in_use_is_rejected(config):
    def another(model: Whisper) -> dict[str, float]:
        with pytest.raises(
            ValueError, match="is in use by another training run; stop it or choose another output folder"
        ):
            run(config)
        return {"wer": 1.0}

    assert run(replace(config, steps=1), another) == Result(step=1, best_wer=1.0)


@pytest.mark.slow
def test_guided_heads_become_the_exported_models_alignment_heads(config):
    guided = LossConfig(guide_weight=0.1, guide_heads=((0, 1), (0, 0)))
    run(replace(config, steps=1, loss=guided, evaluate=EvaluateConfig()))
    assert load_model(Path(config.output) / "export").config.alignment_heads == ((0, 1), (0, 0))


def test_a_loss_that_is_not_finite_is_never_saved(config):
    model = small_model(decoder_layers=1)
    model.decoder.layer_norm.bias.set_value(model.decoder.layer_norm.bias[...].at[0].set(math.nan))
    with pytest.raises(
        ValueError, match=r"^loss is nan at step 1, on .*train.jsonl:\d+.*; there is no checkpoint yet;"
    ):
        train(replace(config, save_every=1, evaluate=EvaluateConfig()), model, save_pretrained)
    assert not [path for path in (Path(config.output) / "checkpoints").iterdir() if path.name.isdigit()]


@pytest.mark.slow
def test_a_later_stage_reuses_the_ctc_head(config, tmp_path):
    first = replace(config, steps=2, loss=LossConfig(ctc_weight=0.3), evaluate=EvaluateConfig())
    run(first)
    export = tmp_path / "out" / "export"
    second = replace(first, model=ModelConfig(init=str(export)))
    learnt, new = (
        make_trainee(small_model(decoder_layers=1), stage, nnx.Rngs(7)).ctc_head for stage in (second, first)
    )
    stored = load_file(export / "ctc_head.safetensors")
    np.testing.assert_array_equal(learnt.kernel[...], stored["kernel"])
    np.testing.assert_array_equal(learnt.bias[...], stored["bias"])
    assert (new.kernel[...] != stored["kernel"]).any()
    other_units = replace(second, data=replace(second.data, ctc_units="bytes"))
    assert make_trainee(small_model(decoder_layers=1), other_units, nnx.Rngs(7)).ctc_head.out_features == 257
    load_model(export)  # still loads
