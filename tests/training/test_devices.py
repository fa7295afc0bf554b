"""One device and eight simulated ones, in a separate process, give the same losses and weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from tests.small import quick_compilation, small_model  # noqa: F401
from tests.training.batches import Run, random_batch, small_run
from whisper_nnx.training.config import AugmentConfig

STEPS = 2


def train() -> dict[str, object]:
    """Trains with masks, dropout and rows with different numbers of labels."""
    config = small_run(
        method="muon",
        guide_heads=((0, 0), (0, 1)),
        augment=AugmentConfig(time_masks=2, time_mask_s=0.2, frequency_masks=1),
        ema_decay=0.9,
        learning_rate=0.01,
    )
    training = Run(config, small_model(spread=0.8, dropout=0.1, decoder_layers=1))
    metrics = []
    for seed in range(STEPS):
        batch = random_batch(rows=8, seed=seed)
        batch["weights"][0, 6:], batch["weights"][5, :] = 0, 0
        batch["ctc"][3, 2:], batch["spans"][6] = -1, 0
        metrics.append(training(**batch))
    sums = {path: float(np.abs(x).sum()) for path, x in training.state.ema.items()}
    arrays = jax.tree.leaves(training.state)
    return {
        "devices": len(training.mesh.devices),
        "everywhere": all(x.sharding.is_fully_replicated and len(x.sharding.device_set) == 8 for x in arrays),
        "metrics": metrics,
        "sums": sums,
    }


def test_eight_devices_train_like_one():
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(root),
    }
    command = [sys.executable, "-m", "tests.training.test_devices"]
    finished = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr
    eight, one = json.loads(finished.stdout.splitlines()[-1]), train()
    assert (eight["devices"], one["devices"]) == (8, 1)
    assert eight["everywhere"]
    for ours, theirs in zip(eight["metrics"], one["metrics"], strict=True):
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, rtol=2e-4, err_msg=name)
    for path, value in one["sums"].items():
        np.testing.assert_allclose(eight["sums"][path], value, rtol=1e-4, err_msg=path)


if __name__ == "__main__":
    print(json.dumps(train()))
