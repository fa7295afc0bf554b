"""The training loop: starts or resumes a run, evaluates, saves checkpoints and exports models."""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from whisper_nnx.audio.features import POSITIONS_PER_SECOND
from whisper_nnx.data.manifest import Row, limits_of, problem_lines, read_manifest
from whisper_nnx.model.whisper import Whisper
from whisper_nnx.output.progress import Bar
from whisper_nnx.output.writers import UNFINISHED, write_whole
from whisper_nnx.runtime.devices import fetch
from whisper_nnx.text.tokenizer import Tokenizer
from whisper_nnx.training.checkpoints import WER, Checkpoints
from whisper_nnx.training.config import TrainConfig, check, to_dict
from whisper_nnx.training.ctc_head import save_ctc_head
from whisper_nnx.training.metrics import Mean, Metrics
from whisper_nnx.training.pipeline import Pipeline, make_pipeline
from whisper_nnx.training.step import create_state, make_mesh, make_step, make_trainee, put_batch, trained_model
from whisper_nnx.transcription.windows import tokenizer_of

CHECKPOINTS, BEST, EXPORT, CONFIG = "checkpoints", "best", "export", "config.json"
MAX_ROW_S = 30.0

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Export = Callable[[Whisper, Path], None]
Evaluate = Callable[[Whisper], Mapping[str, float]]


class TrainingFailed(ValueError):
    """A run cannot continue; the message, one line, gives the reason and the last checkpoint."""


@dataclass(frozen=True)
class Result:
    """Result of a run. step: batches done. stopped: the signal that ended it before its last step, or ""."""

    step: int
    best_wer: float | None
    stopped: str = ""


def train(
    config: TrainConfig,
    model: Whisper,
    export: Export,
    teacher: Whisper | None = None,
    evaluate: Evaluate | None = None,
) -> Result:
    """Trains `model` up to `config.steps`, resuming a run in `config.output` if there is one.

    A first SIGINT or SIGTERM ends the run after the current step, with a checkpoint; a second one at once.

    Args:
      config: the run.
      model: the model to start from.
      export: writes a model into a folder.
      teacher: for distillation.
      evaluate: returns the metrics to record for a model; the lowest "wer" selects the best one.

    Raises:
      ValueError: the configuration is invalid.
      TrainingFailed: the loss is no longer finite.
    """
    check(config)
    _check_model(config, model)
    output = Path(config.output)
    rows = read_rows(config, tokenizer_of(model))
    with _exclusive(output), Checkpoints(output / CHECKPOINTS, config.keep, to_dict(config)) as checkpoints:
        notes = checkpoints.notes()
        if notes and notes["step"] > config.steps:
            raise ValueError(f"steps={config.steps}, but {output} is already at step {notes['step']}; give more steps")
        for partial in (*output.glob(".*.partial"), *output.glob(f"{UNFINISHED}*")):  # of a run that was killed
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        with Metrics(output, notes["records"] if notes else 0) as metrics, _Signals() as signals:
            write_whole(output / CONFIG, json.dumps(to_dict(config), indent=2))
            run = _Run(
                config,
                model,
                rows,
                teacher=teacher,
                evaluate=evaluate,
                export=export,
                checkpoints=checkpoints,
                metrics=metrics,
                signals=signals,
            )
            if notes:
                run.resume(notes)
            with closing(run.batches):
                return run.run()


@contextmanager
def _exclusive(output: Path) -> Iterator[None]:
    """Locks `output`; ValueError if another process of this machine trains into it."""
    output.mkdir(parents=True, exist_ok=True)
    if fcntl is None or jax.process_index():
        yield
        return
    with (output / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{output} is in use by another training run; stop it or choose another output folder"
            ) from None
        yield


def read_rows(config: TrainConfig, tokenizer: Tokenizer) -> list[Row]:
    """Reads the usable rows of all training manifests and reports the others on stderr.

    Raises ValueError if there are none.
    """
    rows: list[Row] = []
    for path in config.data.train:
        manifest = read_manifest(path, max_duration_s=MAX_ROW_S, **limits_of(tokenizer, config.data.language))
        rows += manifest.rows
        for line in problem_lines(path, manifest.problems):
            _log(line)
        hours = sum(row.duration for row in manifest.rows) / 3600
        _log(f"{path}: {len(manifest.rows)} rows of {hours:.2f} h; {len(manifest.problems)} rows cannot be used")
    if not rows:
        raise ValueError(f"{', '.join(config.data.train)}: no row can be used; correct data.train")
    return rows


def _check_model(config: TrainConfig, model: Whisper) -> None:
    """Checks that the model's window and positions suffice for the configuration."""
    shape, window_s = model.config, model.config.max_source_positions / POSITIONS_PER_SECOND
    if config.data.window_s > window_s:
        raise ValueError(f"data.window_s={config.data.window_s} is longer than the model's window of {window_s:g} s")
    if config.data.max_label_length > shape.max_target_positions:
        raise ValueError(
            f"data.max_label_length={config.data.max_label_length} is more than the model's "
            f"{shape.max_target_positions} positions"
        )


class _Run:
    """A run's components and state."""

    def __init__(
        self,
        config: TrainConfig,
        model: Whisper,
        rows: list[Row],
        *,
        teacher: Whisper | None,
        evaluate: Evaluate | None,
        export: Export,
        checkpoints: Checkpoints,
        metrics: Metrics,
        signals: _Signals,
    ):
        self.config, self.output = config, Path(config.output)
        self.evaluate, self.export = evaluate, export
        self.checkpoints, self.metrics, self.signals = checkpoints, metrics, signals
        self.mesh = make_mesh(config.model_parallel)
        self.pipeline: Pipeline = make_pipeline(
            config.data,
            config.augment,
            rows,
            tokenizer_of(model),
            batch_size=config.batch_size,
            seed=config.seed,
            max_target_positions=model.config.max_target_positions,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        self.batches = iter(self.pipeline)
        trainee = make_trainee(model, config, nnx.Rngs(config.seed))
        self.state, self.static = create_state(trainee, config, self.mesh)
        self.run_step = make_step(self.static, config, self.mesh, teacher)
        self.step, self.best_wer = 0, math.inf
        self.evaluated = self.saved = 0  # steps of the last evaluation and checkpoint
        self.pending: deque[tuple[int, Any, np.ndarray]] = deque()
        self.mean, self.since = Mean(), time.monotonic()

    def resume(self, notes: Mapping[str, Any]) -> None:
        """Restores the newest checkpoint, with which these notes were saved."""
        self.state = self.checkpoints.state(self.state)
        self.batches.set_state(notes["batches"])
        self.step = self.saved = notes["step"]
        self.evaluated = notes["evaluated"]
        self.best_wer = math.inf if notes["best_wer"] is None else notes["best_wer"]

    def run(self) -> Result:
        start, steps = self.step, self.config.steps
        if start:
            _log(f"{self.output}: resuming at step {start} of {steps}")
        with Bar(steps, _steps, _speed, start=start, shown=jax.process_index() == 0) as self.bar:
            self._evaluate_and_save()  # an evaluation that was interrupted
            while self.step < steps and not self.signals.received:
                # The first batches start the worker processes.
                if (batch := self._next_batch(self.step < start + self.config.data.workers)) is None:
                    break
                self.state, values = self.run_step(self.state, put_batch(batch, self.mesh))
                self.step += 1
                self.pending.append((self.step, values, batch["rows"]))
                # Waits for a step's metrics only after the next batch has been read.
                self._collect(len(self.pending) - 1)
                self._evaluate_and_save()
            if self.signals.received:
                self._save()
        self.checkpoints.wait()
        self.metrics.plot()
        if not self.signals.received:
            self._write_model(EXPORT)
        wer = None if math.isinf(self.best_wer) else self.best_wer
        return Result(self.step, wer, self.signals.received)

    def _next_batch(self, starts_children: bool) -> dict[str, np.ndarray] | None:
        """Returns the next batch, or None if a signal also ended the worker processes."""
        try:
            with self.signals.hidden_from_children() if starts_children else nullcontext():
                return next(self.batches)
        except Exception:
            if self.signals.received:
                return None
            raise

    def _evaluate_and_save(self) -> None:
        """Evaluates and saves if due."""
        config, step = self.config, self.step
        if not step:
            return
        every = config.evaluate.every
        due = self.evaluate is not None and (step == config.steps or (every > 0 and step % every == 0))
        wer = self._evaluate() if due and self.evaluated < step else None
        if wer is not None or (self.saved < step and (step == config.steps or step % config.save_every == 0)):
            self._save(wer)

    def _collect(self, count: int) -> None:
        """Waits for the metrics of the first `count` pending steps and records them."""
        for _ in range(count):
            step, device_values, rows = self.pending.popleft()
            values = {name: float(value) for name, value in jax.device_get(device_values).items()}
            for name in ("loss", "gradient_norm"):
                if not math.isfinite(values[name]):
                    raise TrainingFailed(self._not_finite(name, values[name], step, rows))
            self.mean.add(values)
            self.bar.update(step, self.config.steps, f"loss {values['loss']:.3f}")
            if step % self.config.log_every == 0:
                self._record(step)

    def _record(self, step: int) -> None:
        now, count = time.monotonic(), self.mean.count
        speed = count * self.config.batch_size / max(now - self.since, 1e-9)
        self.metrics.write(step, {"steps": count, **self.mean.take(), "windows_per_s": round(speed, 3)})
        self.since = now

    def _not_finite(self, name: str, value: float, step: int, rows: np.ndarray) -> str:
        numbers = sorted({int(number) for number in rows.ravel() if number >= 0})
        listed = [f"{self.pipeline.rows[i].manifest}:{self.pipeline.rows[i].line}" for i in numbers]
        saved = self.checkpoints.steps
        last = f"the last checkpoint is of step {saved[-1]}" if saved else "there is no checkpoint yet"
        return (
            f"{name.replace('_', ' ')} is {value} at step {step}, on {', '.join(listed) or 'no row'}; {last}; check "
            f"these rows, or lower optimizer.learning_rate={self.config.optimizer.learning_rate:g}"
        )

    def _evaluate(self) -> float | None:
        """Evaluates the current weights; returns their WER, or None if a signal ended the evaluation."""
        assert self.evaluate is not None
        self._collect(len(self.pending))
        model = self._model()
        try:
            with self.signals.interrupting():
                found = dict(self.evaluate(model))
        except KeyboardInterrupt:
            if not self.signals.received:
                raise
            return None
        except Exception:
            self._save()  # keeps the steps since the last checkpoint
            raise
        self.evaluated = self.step
        if self.mean.count:
            self._record(self.step)
        self.metrics.write(self.step, found)
        _log(f"step {self.step}: word error rate {found[WER]:.2%}")
        if found[WER] <= self.best_wer:
            self.best_wer = found[WER]
            self._write_model(BEST, model)
        return found[WER]

    def _save(self, wer: float | None = None) -> None:
        self._collect(len(self.pending))
        if self.saved == self.step:  # resumed here with an interrupted evaluation
            return
        if self.mean.count:  # a run resumed here must not need part of a mean
            self._record(self.step)
        notes = {
            "step": self.step,
            "batches": self.batches.get_state(),
            "evaluated": self.evaluated,
            "records": len(self.metrics.records),
            "best_wer": None if math.isinf(self.best_wer) else self.best_wer,
        }
        self.checkpoints.save(self.step, self.state, notes, wer)
        self.saved = self.step
        self.metrics.plot()
        self.since = time.monotonic()

    def _model(self) -> Whisper:
        """Returns the trained model, with averaged weights if configured; on one device unless layers are divided."""
        model = trained_model(self.static, self.state, use_ema=True)
        if self.config.model_parallel > 1 and jax.process_count() == 1:
            return model
        return jax.device_put(fetch(model), jax.local_devices()[0])

    def _write_model(self, folder: str, model: Whisper | None = None) -> None:
        if jax.process_index() == 0:
            self.export(model or self._model(), self.output / folder)
            save_ctc_head(self.state.ema or self.state.params, self.output / folder)


class _Signals:
    """Context manager that records the first SIGINT or SIGTERM; a second one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.received = ""
        self._interrupting = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():  # only there Python allows handlers
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within this context, the first signal raises KeyboardInterrupt at once."""
        self._interrupting = True
        try:
            yield
        finally:
            self._interrupting = False

    @contextmanager
    def hidden_from_children(self) -> Iterator[None]:
        """Processes started within this context ignore SIGINT, which a terminal sends to all processes of a run."""
        if sys.platform == "win32":
            yield
            return
        resource_tracker.ensure_running()  # started later, with the first worker, it would reset the mask
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.received = bool(self.received), signal.Signals(number).name
        if again or self._interrupting:
            raise KeyboardInterrupt


def _log(line: str) -> None:
    if jax.process_index() == 0:
        tqdm.write(line, file=sys.stderr)


def _steps(count: float) -> str:
    return f"{count:.0f}"


def _speed(rate: float) -> str:
    return f"{rate:.2f} steps/s"
