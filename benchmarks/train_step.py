"""Times a training step of ours and of transformers with the same weights and batch, in one run.

    python benchmarks/train_step.py [--size tiny] [--batch 8] [--labels 448] [--window 30] [--repeats 5]

A step is forward, backward, clipping and AdamW, in float32, on random weights of a released shape. Ours starts from
samples, transformers from the log-mel spectrogram. Every system has a separate process and does a first step, whose
time (with compilation) is reported separately; then they take turns. Both must start with the same loss.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.memory import peak_memory_mb
from whisper_nnx.runtime.allocator import keep_memory

Step = Callable[[], float]
RATE, DECAY = 1e-4, 0.1


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """Writes random weights and a batch of noise."""
    import jax.numpy as jnp
    from flax import nnx

    from weight_loader import save_pretrained
    from whisper_nnx import create_whisper, log_mel_spectrogram

    positions = round(args.window * 50)
    model = create_whisper(args.size, rngs=nnx.Rngs(0), max_source_positions=positions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no tokenizer
        save_pretrained(model, folder / "model")
    random = np.random.default_rng(0)
    waveform = random.normal(0, 0.1, (args.batch, positions * 320)).astype(np.float32)
    ids = random.integers(0, model.config.vocab_size, (args.batch, args.labels)).astype(np.int32)
    mel = np.asarray(log_mel_spectrogram(jnp.asarray(waveform), model.config.num_mel_bins))
    np.savez(folder / "batch.npz", waveform=waveform, ids=ids, mel=mel)


def ours(folder: Path) -> Step:
    from flax import nnx

    from weight_loader import load_model
    from whisper_nnx.training import step
    from whisper_nnx.training.config import OptimizerConfig, TrainConfig

    optimizer = OptimizerConfig(learning_rate=RATE, warmup_steps=0, decay="constant", weight_decay=DECAY)
    config, mesh, stored = TrainConfig(optimizer=optimizer), step.make_mesh(), np.load(folder / "batch.npz")
    state, static = step.create_state(
        step.make_trainee(load_model(folder / "model"), config, nnx.Rngs(0)), config, mesh
    )
    take = step.make_step(static, config, mesh)
    batch = {
        "waveform": stored["waveform"],
        "ids": stored["ids"],
        "labels": np.roll(stored["ids"], -1, axis=1),
        "weights": np.ones(stored["ids"].shape, np.float32),
    }

    def once() -> float:
        nonlocal state
        state, metrics = take(state, step.put_batch(batch, mesh))
        return float(metrics["loss"])

    return once


def transformers(folder: Path) -> Step:
    import torch
    from transformers import WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, (0.9, 0.98), 1e-6, DECAY)
    made = np.load(folder / "batch.npz")
    ids = torch.tensor(made["ids"]).long()
    batch = {"decoder_input_ids": ids, "labels": ids.roll(-1, 1), "input_features": torch.tensor(made["mel"])}

    def once() -> float:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return once


SYSTEMS = {"whisper_nnx": ours, "transformers": transformers}


def serve(name: str, folder: Path) -> None:
    """Runs one system in this process: a step per input line, answered with seconds, loss and megabytes."""
    keep_memory()  # as in training; both benefit
    answers, sys.stdout = sys.stdout, sys.stderr
    warnings.simplefilter("ignore")
    step = SYSTEMS[name](folder)
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - start
        print(json.dumps({"s": seconds, "loss": loss, "mb": peak_memory_mb()}), file=answers, flush=True)


class Worker:
    """Client of a system's process."""

    def __init__(self, name: str, folder: Path):
        command = [sys.executable, __file__, "--serve", name, "--folder", str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.name = name

    def step(self) -> dict[str, float]:
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} stopped with exit code {self.process.wait()}")
        return json.loads(line)

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(folder: Path, args: argparse.Namespace) -> list[str]:
    """Returns the lines of the table."""
    workers = [Worker(name, folder) for name in SYSTEMS]
    first = [worker.step() for worker in workers]
    if not np.isclose(first[0]["loss"], first[1]["loss"], rtol=1e-4):
        raise SystemExit(f"not the same work: the losses are {first[0]['loss']} and {first[1]['loss']}")
    runs = [[worker.step() for worker in workers] for _ in range(args.repeats)]
    lines = ["| system | windows per second | step | first step | peak memory, MB |", "|---|---|---|---|---|"]
    medians = []
    for i, worker in enumerate(workers):
        medians.append(statistics.median(run[i]["s"] for run in runs))
        cells = [
            worker.name,
            f"{args.batch / medians[-1]:.2f}",
            f"{medians[-1] * 1000:.0f} ms",
            f"{first[i]['s']:.1f} s",
        ]
        lines.append(f"| {' | '.join([*cells, format(max(run[i]['mb'] for run in runs), '.0f')])} |")
        worker.stop()
    what = f"{args.size}, batch {args.batch}, {args.labels} labels, windows of {args.window:g} s, float32"
    cores = f"{platform.machine()}, {os.cpu_count()} cores"
    ratio = f"ours is {medians[1] / medians[0]:.2f} times as fast"
    lines.append(f"\n{what}; {cores}; median of {args.repeats} interleaved steps; {ratio}.")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--labels", type=int, default=448)
    parser.add_argument("--window", type=float, default=30.0, help="s")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.folder)
    with tempfile.TemporaryDirectory() as scratch:
        prepare(Path(scratch), args)
        print("\n".join(compare(Path(scratch), args)))
    return None


if __name__ == "__main__":
    main()
