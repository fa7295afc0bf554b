"""A synthetic batch for the small model, and a minimal training run."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
from flax import nnx

from tests.small import TIMESTAMPS, small_config, small_model
from whisper_nnx.model.whisper import Whisper
from whisper_nnx.training.config import LossConfig, OptimizerConfig, TrainConfig
from whisper_nnx.training.step import TrainState, create_state, make_mesh, make_step, make_trainee, put_batch

LABELS, TEXT = 12, 250
POSITIONS = TIMESTAMPS - 1


def random_batch(rows: int = 8, seed: int = 0, seconds: float = 1.0, **changes: Any) -> dict[str, np.ndarray]:
    """Noise with unrelated text; every row has the same number of weighted labels."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, TEXT, (rows, LABELS)).astype(np.int32)
    weights = np.ones((rows, LABELS), np.float32)
    weights[:, :3] = 0
    spans = np.zeros((rows, LABELS, 2), np.int32)
    spans[:, 4:8, 0] = 3 * np.arange(4)
    spans[:, 4:8, 1] = spans[:, 4:8, 0] + 4
    ctc = np.full((rows, 256), -1, np.int32)
    ctc[:, :5] = random.integers(0, TEXT, (rows, 5))
    made = {
        "waveform": random.normal(0, 0.1, (rows, round(seconds * 16_000))).astype(np.float32),
        "first_position": np.zeros(rows, np.int32),
        "ids": ids,
        "labels": np.roll(ids, -1, axis=1),
        "weights": weights,
        "spans": spans,
        "ctc": ctc,
        "ctc_weight": np.ones(rows, np.float32),
        "frames": random.integers(-1, TEXT, (rows, round(seconds * 50))).astype(np.int32),
        "rows": np.full((rows, 8), -1, np.int32),
    }
    return {**made, **changes}


def small_run(**changes: Any) -> TrainConfig:
    """A run with all losses; changes may be fields of OptimizerConfig, LossConfig or TrainConfig."""
    loss = {"label_smoothing": 0.1, "ctc_weight": 0.3, "frame_weight": 0.2}
    loss |= {"guide_weight": 0.5, "guide_heads": ((0, 1), (1, 0))}
    optimizer = {"learning_rate": 1e-3, "warmup_steps": 2}
    loss |= {name: changes.pop(name) for name in list(changes) if name in LossConfig.__dataclass_fields__}
    optimizer |= {name: changes.pop(name) for name in list(changes) if name in OptimizerConfig.__dataclass_fields__}
    config = TrainConfig(steps=8, loss=LossConfig(**loss), optimizer=OptimizerConfig(**optimizer))
    return replace(config, **changes)


_STEPS: dict[str, Any] = {}


class Run:
    """A state and its step, called batch by batch."""

    def __init__(self, config: TrainConfig, model: Whisper | None = None, teacher: Whisper | None = None):
        self.mesh = make_mesh(config.model_parallel)
        trainee = make_trainee(model or small_model(spread=0.8), config, nnx.Rngs(5))
        self.state, self.static = create_state(trainee, config, self.mesh)
        # Steps of the same run share a program, which takes seconds to compile; teachers may differ.
        key = repr((config, trainee.whisper.config, trainee.whisper.decoder.dtype))
        step = make_step(self.static, config, self.mesh, teacher)
        self.step = step if teacher else _STEPS.setdefault(key, step)

    def __call__(self, **batch: np.ndarray) -> dict[str, float]:
        self.state, metrics = self.step(self.state, put_batch(batch, self.mesh))
        return {name: float(value) for name, value in metrics.items()}


def arrays_of(state: TrainState) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in jax.device_get(state.params).items()}


__all__ = ["LABELS", "POSITIONS", "Run", "arrays_of", "random_batch", "small_config", "small_run"]
