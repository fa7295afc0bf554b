"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the trained checkpoint and the recordings; WHISPER_NNX_SHARED names it."""
    root = Path(__file__).parents[1]
    folder = Path(os.environ.get("WHISPER_NNX_SHARED", root.parent / "shared")).resolve()
    if not (folder / "checkpoints").is_dir():
        pytest.skip(f"{folder} holds no checkpoints; set WHISPER_NNX_SHARED")
    return folder


@pytest.fixture(scope="session")
def digits(shared) -> Path:
    """A small trained Whisper as a Hugging Face folder (and, in openai.pt, as openai-whisper's)."""
    return shared / "checkpoints" / "digits"
