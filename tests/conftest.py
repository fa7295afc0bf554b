"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest


def missing(reason: str) -> None:
    """Skips the test; fails it where WHISPER_NNX_NO_SKIP is set, as in .ci/run."""
    if os.environ.get("WHISPER_NNX_NO_SKIP"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the trained checkpoint and the recordings; WHISPER_NNX_SHARED names it."""
    root = Path(__file__).parents[1]
    folder = Path(os.environ.get("WHISPER_NNX_SHARED", root.parent / "shared")).resolve()
    if not (folder / "checkpoints").is_dir():
        missing(f"{folder} holds no checkpoints; set WHISPER_NNX_SHARED")
    return folder


@pytest.fixture(scope="session")
def digits(shared: Path) -> Path:
    """A small trained Whisper as a Hugging Face folder (and, in openai.pt, as openai-whisper's)."""
    return shared / "checkpoints" / "digits"
