"""`ModelSlot`: a model that requests name, loaded on first use and released when memory is needed for others."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from whisper_nnx.model.config import WhisperConfig
from whisper_nnx.model.whisper import Whisper
from whisper_nnx.serving.encoder_cache import EncoderCache
from whisper_nnx.serving.job import Job
from whisper_nnx.transcription.batch import Batch
from whisper_nnx.transcription.queue import RoundRobin


@dataclass
class ModelSlot:
    """A model's place in the server.

    Attributes:
      name: by which requests choose it.
      load: loads it, and compiles what it runs; on any thread.
      sizes: numbers of rows of its batch.
      cache_bytes: limit of its encoder cache.
      queue: the requests that wait for a row.
      batch: None while the model is not loaded.
      used_at: time of the last use, of a monotonic clock.
      loading: whether it is being loaded.
      failure: why it could not be loaded.
      waiting: the requests that came before it was loaded.
    """

    name: str
    load: Callable[[], Whisper]
    sizes: Sequence[int]
    cache_bytes: int = 0
    queue: RoundRobin = field(default_factory=RoundRobin)
    model: Whisper | None = None
    batch: Batch | None = None
    encode: EncoderCache | None = None
    used_at: float = 0.0
    loading: bool = False
    failure: Exception | None = None
    waiting: list[Job] = field(default_factory=list)

    @property
    def config(self) -> WhisperConfig | None:
        return None if self.model is None else self.model.config

    @property
    def busy(self) -> bool:
        return bool(len(self.queue) or (self.batch and self.batch.busy))

    @property
    def memory_bytes(self) -> int:
        """Of the parameters."""
        arrays: list[Any] = jax.tree.leaves(self.model)
        return sum(array.nbytes for array in arrays if hasattr(array, "nbytes"))

    def insert(self, model: Whisper) -> None:
        self.model, self.encode = model, EncoderCache(self.cache_bytes)
        self.batch = Batch(model, max(self.sizes), sizes=self.sizes, queue=self.queue, ahead=0, encode=self.encode)
        self.used_at = time.monotonic()

    def release(self) -> None:
        self.model = self.batch = self.encode = None
