"""One device and eight simulated ones, in a process of their own, give the same losses and weights.

Layers may be divided or not.
"""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.tree_util import keystr

from tests.small import quick_compilation, quick_environment, small_model  # noqa: F401
from tests.training.batches import Run, random_batch, small_run
from whisper_nnx.training.config import AugmentConfig
from whisper_nnx.training.step import trained_model

STEPS = 2


def train(model_parallel: int = 1) -> dict[str, object]:
    """Trains with masks, dropout and rows with different numbers of labels."""
    config = small_run(
        method="muon",
        guide_heads=((0, 0), (0, 1)),
        augment=AugmentConfig(time_masks=2, time_mask_s=0.2, frequency_masks=1),
        ema_decay=0.9,
        learning_rate=0.01,
        model_parallel=model_parallel,
    )
    training = Run(config, small_model(spread=0.8, dropout=0.1, decoder_layers=1))
    metrics = []
    for seed in range(STEPS):
        batch = random_batch(rows=8, seed=seed)
        batch["weights"][0, 6:], batch["weights"][5, :] = 0, 0
        batch["ctc"][3, 2:], batch["spans"][6] = -1, 0
        metrics.append(training(**batch))
    sums = {path: float(np.abs(x).sum()) for path, x in training.state.ema.items()}
    leaves = jax.tree_util.tree_leaves_with_path(training.state)
    whisper = trained_model(training.static, training.state)
    assert whisper.decoder.layers[0].fc1.kernel[...].sharding.is_fully_replicated == (model_parallel == 1)
    return {
        "mesh": dict(training.mesh.shape),
        "divided": sorted(keystr(path) for path, x in leaves if not x.sharding.is_fully_replicated),
        "everywhere": all(len(x.sharding.device_set) == jax.device_count() for _, x in leaves),
        "metrics": metrics,
        "sums": sums,
    }


@pytest.mark.parametrize("parts", [pytest.param(1, marks=pytest.mark.slow), 2], ids=["data 8", "data 4, model 2"])
def test_eight_devices_train_like_one(parts):
    root = Path(__file__).parents[2]
    environment = quick_environment("--xla_force_host_platform_device_count=8")
    command = [sys.executable, "-m", "tests.training.test_devices", str(parts)]
    finished = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr
    several, one = json.loads(finished.stdout.splitlines()[-1]), train()
    assert several["mesh"] == {"data": 8 // parts, "model": parts}
    assert several["everywhere"]
    assert one["divided"] == []
    for part in ("params", "ema", "opt_state"):  # the moments follow their parameters
        divided = any(path.startswith(f".{part}") and "fc1.kernel" in path for path in several["divided"])
        assert divided == (parts > 1)
    for ours, theirs in zip(several["metrics"], one["metrics"], strict=True):
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, rtol=2e-4, err_msg=name)
    for path, value in one["sums"].items():
        np.testing.assert_allclose(several["sums"][path], value, rtol=1e-4, err_msg=path)


if __name__ == "__main__":
    print(json.dumps(train(model_parallel=int(sys.argv[1]))))
