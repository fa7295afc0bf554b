"""`ModelSlot`: a model that requests name, loaded on first use and released when memory is needed for others."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import jax

from whisper_nnx.model.whisper import Whisper
from whisper_nnx.serving.encoder_cache import EncoderCache
from whisper_nnx.serving.job import Job
from whisper_nnx.transcription.attempts import strategy_of
from whisper_nnx.transcription.batch import Batch
from whisper_nnx.transcription.grammars import grammar_program
from whisper_nnx.transcription.options import TranscribeOptions
from whisper_nnx.transcription.queue import RoundRobin
from whisper_nnx.transcription.windows import tokenizer_of

Program = Hashable
MOST_STEPS = 32  # tokens of each row after which a request that came meanwhile gets a free row


@dataclass
class ModelSlot:
    """A model's place in the server.

    Attributes:
      name: by which requests choose it.
      load: loads it, and compiles what it runs; on any thread.
      compile: compiles what requests with these options run; on any thread. None: it is compiled when it is first run.
      compiled: the programs that need not be compiled any more, as `programs_of` names them.
      sizes: numbers of rows of its batch.
      cache_bytes: limit of its encoder cache.
      queue: the requests that wait for a row.
      batch: None while the model is not loaded.
      used_at: time of the last use, of a monotonic clock.
      loading: whether it is being loaded.
      compiling: whether `prepare` compiles.
      failure: why it could not be loaded.
      waiting: the requests that came before it was loaded.
      retries: as of a `Batch`, of all batches that it has had.
    """

    name: str
    load: Callable[[], Whisper]
    sizes: Sequence[int]
    cache_bytes: int = 0
    compile: Callable[[Whisper, TranscribeOptions], None] | None = None
    compiled: frozenset[Program] = frozenset()
    queue: RoundRobin = field(default_factory=RoundRobin)
    model: Whisper | None = None
    batch: Batch | None = None
    encode: EncoderCache | None = None
    used_at: float = 0.0
    loading: bool = False
    compiling: bool = False
    failure: Exception | None = None
    waiting: list[Job] = field(default_factory=list)
    retries: Counter[str] = field(default_factory=Counter)
    _past_hits: int = 0

    @property
    def busy(self) -> bool:
        return bool(len(self.queue) or (self.batch and self.batch.busy))

    @property
    def cache_hits(self) -> int:
        """Windows that the encoder cache had, of all times that the model was loaded."""
        return self._past_hits + (self.encode.hits if self.encode else 0)

    @property
    def memory_bytes(self) -> int:
        """Of the parameters."""
        arrays: list[Any] = jax.tree.leaves(self.model)
        return sum(array.nbytes for array in arrays if hasattr(array, "nbytes"))

    def is_prepared(self, options: TranscribeOptions) -> bool:
        """Whether requests with these options run without compiling anything, as far as `compile` can see to it."""
        return self.compile is None or programs_of(options, self.model) <= self.compiled

    def prepare(self, options: TranscribeOptions) -> None:
        """Sees to it. Takes seconds; called on one thread alone."""
        model = self.model
        if model is None or self.compile is None or self.is_prepared(options):
            return
        self.compiling = True
        with suppress(Exception):  # of options that cannot be met: the request itself fails at them
            self.compile(model, options)
        self.compiling, self.compiled = False, self.compiled | programs_of(options, model)

    def insert(self, model: Whisper) -> None:
        self.model, self.encode = model, EncoderCache(self.cache_bytes)
        about: dict[str, Any] = {"sizes": self.sizes, "queue": self.queue, "encode": self.encode}
        self.batch = Batch(model, max(self.sizes), ahead=0, most_steps=MOST_STEPS, **about)
        self.batch.retries = self.retries
        self.used_at = time.monotonic()

    def release(self) -> None:
        self._past_hits = self.cache_hits
        self.model = self.batch = self.encode = None


def programs_of(options: TranscribeOptions, model: Whisper | None = None) -> frozenset[Program]:
    """Names of what XLA compiles for a request, beside what all requests run; model: for the size of a grammar."""
    fallback, decoding, longform = options.fallback, options.window_options, options.longform
    limits = decoding.repetition_penalty, decoding.no_repeat_ngram_size, decoding.max_repeats
    strategies = {strategy_of(fallback.options_at(t, decoding)) for t in fallback.temperatures}
    preferred = sum(len(text) for one in decoding.bias or () for text in (one.text, *one.variants)).bit_length()
    timed = {("times", longform.refine_word_times, longform.alignment_heads)} if longform.timed else ()
    grammar: tuple[Any, ...] = ()
    if decoding.constraint is not None and model is not None:
        with suppress(ValueError):  # no text can be written: the request itself fails at it
            size = grammar_program(tokenizer_of(model), model.config.vocab_size, decoding)
            grammar = (*size, decoding.grammar_penalty is None)
    kinds = limits != (1.0, 0, None), preferred, *grammar
    return frozenset({*((strategy, *kinds) for strategy in strategies), *timed})
