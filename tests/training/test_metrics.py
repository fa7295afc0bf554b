"""Records of a run, one per step even after kills."""

import math

import pytest
from PIL import Image

from whisper_nnx.training.metrics import Mean, Metrics, draw_curves, read_records


def picture_size(folder):
    with Image.open(folder / "curves.png", formats=["PNG"]) as picture:
        return picture.size


def steps_of(folder):
    return [record["step"] for record in read_records(folder / "metrics.jsonl")]


def test_records_are_in_the_file_at_once(tmp_path):
    with Metrics(tmp_path) as metrics:
        metrics.write(2, {"loss": 0.5})
        assert read_records(tmp_path / "metrics.jsonl") == [{"step": 2, "loss": 0.5}]


def test_resuming_removes_records_beyond_those_to_keep(tmp_path):
    with Metrics(tmp_path) as metrics:
        for step in range(1, 6):
            metrics.write(step, {"loss": 1 / step})
    with Metrics(tmp_path, 3) as metrics:
        assert steps_of(tmp_path) == [1, 2, 3]
        metrics.write(4, {"loss": 0.0})
    assert steps_of(tmp_path) == [1, 2, 3, 4]


def test_a_new_run_discards_the_records_of_a_killed_one_without_checkpoint(tmp_path):
    with Metrics(tmp_path) as metrics:
        metrics.write(1, {"loss": 1.0})
    with Metrics(tmp_path) as metrics:
        assert steps_of(tmp_path) == []
        assert metrics.records == []


def test_a_line_truncated_by_a_kill_is_skipped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    with Metrics(tmp_path, 2) as metrics:
        metrics.write(2, {"loss": 1.0})
    assert steps_of(tmp_path) == [1, 2]


def test_tensorboard_reads_each_step_once_with_the_last_value(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Metrics(tmp_path) as metrics:
        for step in (1, 2, 3):
            metrics.write(step, {"loss": float(step)})
    with Metrics(tmp_path, 2) as metrics:
        metrics.write(3, {"loss": 9.0})
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 9.0)]


def test_a_mean_covers_values_since_the_last_one():
    mean = Mean()
    for values in ({"loss": 1.0}, {"loss": 3.0}):
        mean.add(values)
    assert mean.take() == {"loss": 2.0}
    assert mean.count == 0
    mean.add({"loss": 5.0})
    assert mean.take() == {"loss": 5.0}


def test_curves_are_plotted_from_records(tmp_path):
    with Metrics(tmp_path) as metrics:
        metrics.plot()  # no records
        width, height = picture_size(tmp_path)
        for step in range(1, 50):
            metrics.write(step, {"loss": 3 / step, "ctc": 0.0, "learning_rate": 1e-3, "accuracy": 1 - 1 / step})
            metrics.write(step, {"wer": 1 / step})
        metrics.plot()
    assert picture_size(tmp_path) == (width, 4 * height)  # loss, word error rate, accuracy, learning rate


def test_values_without_a_logarithm_are_plotted_without_warnings():
    draw_curves([{"step": 1, "loss": 1.0, "kl": 0.0}, {"step": 2, "loss": math.inf, "kl": 0.5}])
