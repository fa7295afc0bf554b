"""The real references, on the trained checkpoint, and the recordings."""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest

from whisper_nnx import load_audio, load_model

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the machine
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model(digits: Path):
    return load_model(str(digits))


@pytest.fixture(scope="session")
def reference(digits: Path):
    """openai-whisper's model with the same weights and alignment heads."""
    import torch
    import whisper

    model = whisper.load_model(str(digits / "openai.pt"), device="cpu")
    heads = torch.zeros(model.dims.n_text_layer, model.dims.n_text_head, dtype=torch.bool)
    for layer, head in load_model(str(digits)).config.alignment_heads:
        heads[layer, head] = True
    model.register_buffer("alignment_heads", heads.to_sparse(), persistent=False)
    return model


@pytest.fixture(scope="session")
def recordings(shared: Path) -> dict[str, np.ndarray]:
    """Every recording, 16 kHz, by its name."""
    paths = [path for path in sorted((shared / "audio").iterdir()) if path.suffix != ".json"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one of them is silent, and says so
        return {path.stem: load_audio(path) for path in paths}
