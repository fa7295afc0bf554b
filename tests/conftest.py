"""Fixtures shared by all tests."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import jax
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


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_go() -> Iterator[None]:
    """Lets go of a module's programs behind it.

    What XLA compiles for the CPU holds memory mappings; where a process has Linux's 65,530 of them
    (`vm.max_map_count`), XLA crashes, which all tests in one process came to.
    """
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Grows by a name for each program that XLA compiles during the test."""
    seen: list[str] = []

    def listen(event: str, _: float, **details: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(str(details.get("fun_name", event)))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)
