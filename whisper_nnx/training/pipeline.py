"""Turns rows into endless batches with grain; the batches do not depend on the number of readers."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from whisper_nnx.data.manifest import Row
from whisper_nnx.text.tokenizer import Tokenizer
from whisper_nnx.training.config import AugmentConfig, DataConfig
from whisper_nnx.training.windows import Windows

_ENDLESS = 2**48  # windows
_AHEAD = 2  # batches that each reader prefetches
_LOG = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]


class _Source:
    """The windows of one process by number: its share of each batch, batch after batch."""

    def __init__(self, windows: Windows, order: grain.MapDataset, batch: int, process: int, processes: int, start: int):
        self.windows, self.order = windows, order
        self.batch, self.process, self.processes, self.start = batch, process, processes, start

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> Batch:
        batch, row = divmod(index, self.batch)
        index = ((self.start + batch) * self.processes + self.process) * self.batch + row
        return self.windows(index, int(self.order[index]))


class Batches(Iterator[Batch]):
    """Iterator over batches. troubles: why rows could not be used, by row index."""

    def __init__(self, pipeline: Pipeline):
        self._pipeline = pipeline
        self._next = 0
        self._batches: Any = None
        self.troubles: dict[int, str] = {}

    def __next__(self) -> Batch:
        if self._batches is None:
            if not flags.FLAGS.is_parsed():  # grain reads absl's flags, which other programs do not parse
                flags.FLAGS.mark_as_parsed()
            self._batches = iter(self._pipeline.dataset(self._next))
        # Copies, since worker processes reuse their memory.
        batch = {name: np.array(value) for name, value in next(self._batches).items()}
        self._next += 1
        for trouble in filter(None, batch.pop("trouble").tolist()):
            self._report(*trouble.split("\t", 1))
        return batch

    def get_state(self) -> dict[str, int]:
        """Returns the position: JSON-serializable and independent of the number of readers."""
        return {"next_batch": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        self.close()
        self._next = state["next_batch"]

    def close(self) -> None:
        """Stops the readers; the next batch restarts them."""
        if self._batches is not None:
            self._batches.close()
        self._batches = None

    def _report(self, index: str, reason: str) -> None:
        if int(index) not in self.troubles:
            self.troubles[int(index)] = reason
            row, count = self._pipeline.rows[int(index)], len(self.troubles)
            audio = "" if isinstance(row.audio, bytes) or str(row.audio) in reason else f"{row.audio}: "
            _LOG.warning("%s:%d: %s%s (skipped; %d so far)", row.manifest, row.line, audio, reason, count)


class Pipeline:
    """Result of `make_pipeline`; each `iter` starts with the first batch."""

    def __init__(self, windows: Windows, order: grain.MapDataset, batch: int, process: int, processes: int):
        self._windows, self._order = windows, order
        self._batch, self._process, self._processes = batch, process, processes
        self.rows = windows.rows

    def __iter__(self) -> Batches:
        return Batches(self)

    def dataset(self, start: int) -> grain.IterDataset:
        """Returns grain's dataset of the batches from `start`."""
        source = _Source(self._windows, self._order, self._batch, self._process, self._processes, start)
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD)
        batches = grain.MapDataset.source(source).batch(self._batch).to_iter_dataset(ahead)
        workers = self._windows.config.workers
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_AHEAD)
        return batches.mp_prefetch(options, worker_init_fn=_end_with_parent) if workers else batches


def _end_with_parent(worker: int, workers: int) -> None:
    """Ends a worker process when its parent is killed; otherwise it would wait forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def make_pipeline(
    config: DataConfig,
    augment: AugmentConfig,
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    seed: int,
    max_target_positions: int = 448,
    process_index: int = 0,
    process_count: int = 1,
) -> Pipeline:
    """Makes batches of windows from the rows of all manifests; they depend only on the seed, not on the readers.

    Every row starts one window in each pass over the rows, or over its manifest's rows if `config.weights` are given.

    Args:
      config: how rows become windows.
      augment: changes of the audio.
      rows: of all manifests.
      tokenizer: the model's.
      batch_size: of all processes together.
      seed: of all random choices.
      max_target_positions: the model's.
      process_index: this process's share of each batch; all shares in order equal the batch of a single process.
      process_count: number of processes.

    Raises:
      ValueError: there are no rows, or configuration, tokenizer and rows do not fit each other.
    """
    if not rows:
        raise ValueError("no row can be used for training; see the problems of the manifests")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size={batch_size} must be a multiple of the {process_count} processes")
    windows = Windows(config, augment, rows, tokenizer, seed, max_target_positions)
    order = _order(rows, config.weights, seed)
    return Pipeline(windows, order, batch_size // process_count, process_index, process_count)


def _order(rows: Sequence[Row], weights: Sequence[float], seed: int) -> grain.MapDataset:
    """Returns the dataset that maps window numbers to the index of their first row."""
    names = list(dict.fromkeys(row.manifest for row in rows)) if weights else [""]
    if weights and (len(weights) != len(names) or min(weights) < 0 or not any(weights)):
        raise ValueError(f"weights={list(weights)} must be one number of at least 0 for each of {', '.join(names)}")
    parts = []
    for number, name in enumerate(names):
        indices = [index for index, row in enumerate(rows) if not weights or row.manifest == name]
        part = grain.MapDataset.source(np.array(indices)).shuffle(seed=(seed + number) % 2**32).repeat()
        parts.append(part)
    kept = [(part, weight) for part, weight in zip(parts, weights or [1.0], strict=True) if weight]
    return grain.MapDataset.mix([part for part, _ in kept], [weight for _, weight in kept])
