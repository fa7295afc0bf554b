"""Times loading a checkpoint with whisper_nnx, transformers and openai-whisper, in one run.

    python benchmarks/load.py [--size small] [--dtype bfloat16] [--repeats 3]

Random weights of a released shape are written in every format; the systems load them in turn, each time in a new
process, with the files in the page cache. Reported: median seconds of loading, without imports; and peak memory beyond
that after the imports, as a multiple of the weights' size (transformers memory-maps its format and reads lazily).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.memory import peak_memory_mb, reset_peak_memory

FORMATS = {"hf": "hf", "openai": "model.pt", "mlx": "mlx"}  # format -> name in the folder


def ours(folder: Path, dtype: str, name: str) -> Callable[[], object]:
    import jax

    from weight_loader import load_model

    jax.block_until_ready(jax.numpy.zeros(8, dtype))  # initializes the backend, like torch's
    return lambda: load_model(folder / name, dtype=dtype)


def transformers(folder: Path, dtype: str) -> Callable[[], object]:
    import torch
    from transformers import WhisperForConditionalGeneration

    load = WhisperForConditionalGeneration.from_pretrained
    return lambda: load(folder / "hf", dtype=getattr(torch, dtype))


def openai(folder: Path, dtype: str) -> Callable[[], object]:
    import torch
    import whisper

    return lambda: whisper.load_model(str(folder / "model.pt"), device="cpu").to(getattr(torch, dtype))


SYSTEMS: dict[str, Callable[[Path, str], Callable[[], object]]] = {
    **{f"whisper_nnx, {form}": partial(ours, name=name) for form, name in FORMATS.items()},
    "transformers, hf": transformers,
    "openai-whisper, openai": openai,
}


def prepare(folder: Path, size: str, dtype: str) -> float:
    """Writes random weights in every format and returns their size in MiB."""
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from weight_loader.checkpoint import Content
    from weight_loader.load import abstract_model
    from weight_loader.writers import write_checkpoint, writer
    from whisper_nnx.model.config import RELEASED

    random = np.random.default_rng(0)
    shapes = {path: variable.shape for path, variable in nnx.to_flat_state(nnx.state(abstract_model(RELEASED[size])))}
    arrays = {
        path: random.standard_normal(shape, np.float32).astype(jnp.dtype(dtype)) for path, shape in shapes.items()
    }
    for form, name in FORMATS.items():
        stored = dtype if dtype in writer(form).DTYPES else "float16"
        write_checkpoint(Content(RELEASED[size], None, arrays), folder / name, form, stored)
    return sum(array.nbytes for array in arrays.values()) / 2**20


def measure(system: str, folder: Path, dtype: str) -> str:
    """Returns seconds, and MiB beyond the imports, measured in this process."""
    warnings.simplefilter("ignore")
    load = SYSTEMS[system](folder, dtype)
    reset_peak_memory()
    before, start = peak_memory_mb(), time.perf_counter()
    model = load()
    seconds = time.perf_counter() - start
    assert model is not None
    return f"{seconds} {peak_memory_mb() - before}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="small")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(measure(given.measure[0], Path(given.measure[1]), given.dtype))
        return
    with tempfile.TemporaryDirectory() as folder:
        weights = prepare(Path(folder), given.size, given.dtype)
        runs: dict[str, list[tuple[float, float]]] = {system: [] for system in SYSTEMS}
        for _ in range(given.repeats):
            for system in SYSTEMS:
                command = [
                    sys.executable,
                    "-W",
                    "ignore",
                    __file__,
                    "--dtype",
                    given.dtype,
                    "--measure",
                    system,
                    folder,
                ]
                answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
                seconds, megabytes = map(float, answer.split())
                runs[system].append((seconds, megabytes))
    print(f"{given.size}'s shape in {given.dtype}: {weights:.0f} MiB of weights; median of {given.repeats} runs\n")
    print("| system, format | seconds | peak memory / weights |\n|---|---|---|")
    for system, pairs in runs.items():
        seconds, megabytes = (statistics.median(values) for values in zip(*pairs, strict=True))
        print(f"| {system} | {seconds:.2f} | {megabytes / weights:.2f} |")


if __name__ == "__main__":
    main()
