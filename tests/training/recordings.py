"""Recordings of noise, each with a word, for runs of a few steps; and a compilation cache for them."""

import json
import wave
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

WORDS = ("one", "two", "the", "and")
_CACHE_OPTIONS = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


def write_manifest(folder: Path, rows: int = 12) -> Path:
    """Writes a manifest of recordings of 0.2 to 0.45 s."""
    random = np.random.default_rng(0)
    lines = []
    for i in range(rows):
        with wave.open(str(folder / f"{i}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16_000)
            file.writeframes(random.normal(0, 3000, random.integers(3200, 7200)).astype("<i2").tobytes())
        lines.append(json.dumps({"audio": f"{i}.wav", "text": WORDS[i % 4], "language": "en"}) + "\n")
    (folder / "train.jsonl").write_text("".join(lines))
    return folder / "train.jsonl"


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Iterator[Path]:
    """Compilation cache shared by a module's runs; restores JAX's cache settings afterwards."""
    from jax.experimental.compilation_cache import compilation_cache

    from whisper_nnx.runtime.compilation_cache import enable_compilation_cache

    before = {name: jax.config.values[name] for name in _CACHE_OPTIONS}
    folder = tmp_path_factory.mktemp("cache")
    compilation_cache.reset_cache()
    jax.config.update("jax_enable_compilation_cache", True)
    enable_compilation_cache(folder)
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
