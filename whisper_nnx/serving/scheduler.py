"""The scheduler: one thread owns the models and decodes the windows of all requests together."""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from whisper_nnx.model.config import WhisperConfig
from whisper_nnx.model.whisper import Whisper
from whisper_nnx.output.results import Segment
from whisper_nnx.serving.job import Job
from whisper_nnx.serving.models import ModelSlot
from whisper_nnx.serving.readers import Readers
from whisper_nnx.serving.spool import Spool
from whisper_nnx.text.tokenizer import Tokenizer
from whisper_nnx.transcription.batch import is_out_of_memory
from whisper_nnx.transcription.opening import RecordingAudio, open_audio, read_recording
from whisper_nnx.transcription.options import TranscribeOptions
from whisper_nnx.transcription.rows import Live


class Busy(Exception):
    """The queue is full; `retry_after_s` says when to come again."""

    def __init__(self, retry_after_s: int):
        super().__init__(f"the server is busy; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class UnknownModel(LookupError):
    """No model has this name."""


class Unavailable(Exception):
    """The server is starting or stopping, or the model could not be loaded."""


class Stats(NamedTuple):
    """Requests that were taken, rows in use, models in memory; steps, hits of the encoder cache and retries so far."""

    requests: int
    rows: int
    models: tuple[str, ...]
    steps: int
    cache_hits: int
    retries: Counter[str]


class Scheduler:
    """Takes requests from an event loop, reads their audio on other threads, and decodes them on its own thread.

    Requests share the rows of their model's batch and take turns, window by window; each result equals that of the
    recording alone.

    Args:
      slots: the models; the first is the default one.
      max_requests: taken at a time, those that wait included.
      memory_bytes: of the parameters of all models; idle models are released for others. None: no limit.
      samples_bytes: of the samples of waiting recordings; more are kept on disk.
      readers: processes that decode audio; 0: threads of this process.
    """

    def __init__(
        self,
        slots: Sequence[ModelSlot],
        *,
        max_requests: int = 1000,
        memory_bytes: int | None = None,
        samples_bytes: int = 1 << 30,
        readers: int = 0,
    ):
        self._slots = {slot.name: slot for slot in slots}
        self._max_requests, self._memory_bytes = max_requests, memory_bytes
        self._spool = Spool(samples_bytes)
        self._numbers = itertools.count()
        self._jobs: dict[int, Job] = {}
        self._held: dict[int, int] = {}  # job -> bytes of memory that its samples take
        self._inbox: deque[Callable[[], None]] = deque()  # what other threads want done on the scheduler's
        self._wake = threading.Condition()
        self.ready = False  # set by whoever has loaded what is to be there from the start
        self._stopping, self._ended = False, False
        self._steps, self._busy_s, self._window_s = 0, 0.0, 0.5  # seconds since a window was done, and for each
        self._readers = Readers(readers)
        self._loader = ThreadPoolExecutor(1, "load")
        self._current = threading.local()  # .job: whose warnings they are
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    @classmethod
    def of(cls, models: Mapping[str, Whisper], sizes: Sequence[int] = (1, 2, 4), **options: Any) -> Scheduler:
        """A scheduler, ready, for models that are in memory. `sizes`: numbers of rows of their batches."""
        slots = [ModelSlot(name, partial(_itself, model), sizes, cache_bytes=1 << 28) for name, model in models.items()]
        for slot, model in zip(slots, models.values(), strict=True):
            slot.insert(model)
        scheduler = cls(slots, **options)
        scheduler.ready = True
        return scheduler

    @property
    def names(self) -> list[str]:
        """Of the models; the first is the default one."""
        return list(self._slots)

    def tokenizer(self, name: str) -> Tokenizer | None:
        """Of a model, None while it is not loaded. Raises UnknownModel."""
        model = self._slot(name).model
        return None if model is None else model.tokenizer

    def _slot(self, name: str) -> ModelSlot:
        if name not in self._slots:
            raise UnknownModel(f"there is no model {name!r}, but {', '.join(self._slots)}")
        return self._slots[name]

    @property
    def alive(self) -> bool:
        """Whether the scheduler's thread runs."""
        return self._thread.is_alive()

    @property
    def is_occupied(self) -> bool:
        """Whether a thread loads, compiles or decodes: nothing can interrupt that, and `close` does not wait for it."""
        return self.alive or any(slot.loading or slot.compiling for slot in self._slots.values())

    @property
    def accepting(self) -> bool:
        """Whether requests are taken: not while starting or stopping."""
        return self.alive and self.ready and not self._stopping

    @property
    def stats(self) -> Stats:
        slots = list(self._slots.values())
        return Stats(
            requests=len(self._jobs),
            rows=sum(batch.rows_in_use for slot in slots if (batch := slot.batch)),
            models=tuple(slot.name for slot in slots if slot.model is not None),
            steps=self._steps,
            cache_hits=sum(slot.cache_hits for slot in slots),
            retries=sum((slot.retries for slot in slots), Counter()),
        )

    async def load(self, name: str) -> None:
        """Loads a model, unless it is in memory. Raises what loading raised."""
        slot, started = self._slot(name), threading.Event()

        def load() -> None:
            self._load(slot)
            started.set()

        self._do(load)
        while not started.is_set() or slot.loading:
            await asyncio.sleep(0.02)
        if slot.failure is not None:
            raise slot.failure

    def check(self, model: str) -> None:
        """Raises what `submit` would raise at present."""
        self._slot(model)
        if not self.accepting:
            raise Unavailable("the server is stopping" if self._stopping else "the server is starting")
        if len(self._jobs) >= self._max_requests:
            raise Busy(max(1, math.ceil(len(self._jobs) * self._window_s)))

    def submit(self, model: str, audio: Any, options: TranscribeOptions) -> Job:
        """Takes a request. To be called in the event loop. Raises Busy, UnknownModel, Unavailable."""
        self.check(model)
        slot = self._slot(model)
        job = Job(model, audio, options, next(self._numbers), lambda job: self._do(lambda: self._end(job)))
        self._jobs[job.number] = job
        self._do(lambda: self._admit(job, slot))
        return job

    async def close(self, grace_s: float = 30) -> None:
        """Takes no new requests, finishes those taken within `grace_s`, and ends the threads."""
        self._stopping = True
        end = time.monotonic() + grace_s
        while self._jobs and self.alive and time.monotonic() < end:
            await asyncio.sleep(0.02)

        def stop() -> None:
            for job in list(self._jobs.values()):
                self._end(job, Unavailable("the server has stopped"))
            self._ended = True

        self._do(stop)
        await asyncio.to_thread(self._thread.join, 5)
        self._readers.close()
        self._loader.shutdown(wait=False, cancel_futures=True)

    def _do(self, work: Callable[[], None]) -> None:
        """Has something done on the scheduler's thread, before the next step."""
        with self._wake:
            self._inbox.append(work)
            self._wake.notify()

    # On the scheduler's thread.

    def _run(self) -> None:
        with _warnings_to(self._warn):
            while not self._ended:
                with self._wake:
                    while not self._inbox and not any(slot.busy for slot in self._loaded()):
                        self._wake.wait()
                while self._inbox:
                    self._inbox.popleft()()
                for slot in self._loaded():
                    if slot.busy and not self._ended:
                        self._step(slot)

    def _loaded(self) -> list[ModelSlot]:
        return [slot for slot in self._slots.values() if slot.batch is not None]

    def _step(self, slot: ModelSlot) -> None:
        assert slot.batch is not None
        slot.queue.start_round()
        started = slot.used_at = time.monotonic()
        try:
            events = slot.batch.step()
        except Exception as error:  # of the device, not of one recording
            jobs = [job for job in list(self._jobs.values()) if job.model == slot.name]
            for failed in [job for job in jobs if job.has_opened] or jobs:
                self._end(failed, error)
            return
        self._steps, self._busy_s = self._steps + 1, self._busy_s + time.monotonic() - started
        if done := sum(isinstance(result, list) for _, result in events):
            self._window_s, self._busy_s = 0.9 * self._window_s + 0.1 * self._busy_s / done, 0.0
        for live, result in events:
            if (job := self._jobs.get(live.number)) is not None:
                self._report(job, live, result)

    def _report(self, job: Job, live: Live, result: list[Segment] | Exception | None) -> None:
        try:
            if isinstance(result, Exception):
                raise result
            if segments := job.opened.add(live, result):
                job.report(segments)
        except Exception as error:
            self._end(job, error)
        else:
            if job.opened.done:
                self._end(job)

    def _admit(self, job: Job, slot: ModelSlot) -> None:
        """Has a request's audio read, as soon as its model is there."""
        if job.number not in self._jobs:
            return
        if slot.model is None:
            self._load(slot)
            slot.waiting.append(job)
            return
        config = slot.model.config
        self._readers.submit(self._read, job, slot, config)

    def _load(self, slot: ModelSlot) -> None:
        if slot.model is not None or slot.loading:
            return
        slot.loading, slot.failure = True, None

        def load() -> None:
            try:
                model = slot.load()
            except Exception as error:
                failure = error
                self._do(lambda: self._loading_failed(slot, failure))
            else:
                self._do(lambda: self._insert(slot, model))

        self._loader.submit(load)

    def _loading_failed(self, slot: ModelSlot, error: Exception) -> None:
        slot.loading, slot.failure = False, error
        jobs, slot.waiting = slot.waiting, []
        for job in jobs:
            self._end(job, Unavailable(f"model {slot.name!r} cannot be loaded: {error}"))

    def _insert(self, slot: ModelSlot, model: Any) -> None:
        slot.insert(model)
        slot.loading = False
        jobs, slot.waiting = slot.waiting, []
        for job in jobs:
            self._admit(job, slot)
        self._release_models(slot)

    def _release_models(self, kept: ModelSlot) -> None:
        """Releases models without requests, other than `kept`, while all take more memory than they may."""
        if self._memory_bytes is None:
            return
        in_use = {kept.name, *(job.model for job in list(self._jobs.values()))}
        idle = [other for other in self._loaded() if other.name not in in_use]
        for other in sorted(idle, key=lambda s: s.used_at):
            if sum(s.memory_bytes for s in self._loaded()) > self._memory_bytes:
                other.release()

    def _add(self, job: Job, slot: ModelSlot, audio: RecordingAudio, held: int) -> None:
        """A request whose audio was read takes its turn."""
        if job.number not in self._jobs:
            self._spool.release(held)
            return
        self._held[job.number] = held

        def open() -> Sequence[Live]:
            assert slot.model is not None
            assert slot.encode is not None
            with self._of(job):
                opened = open_audio(slot.model, audio, job.options, job.number, slot.encode, at_once=False)
            job.report_opened(opened)
            if opened.done:
                self._end(job)
            return opened.lives

        def open_or_fail() -> Sequence[Live]:
            try:
                return open()
            except Exception as error:
                if is_out_of_memory(error) and slot.batch is not None and slot.batch.may_halve:
                    raise
                self._end(job, error)
                return []

        slot.queue.add(job.number, open_or_fail)

    def _end(self, job: Job, error: Exception | None = None) -> None:
        """Ends a request: done, failed or cancelled."""
        if self._jobs.pop(job.number, None) is None:
            return
        self._spool.release(self._held.pop(job.number, 0))
        slot = self._slots[job.model]
        slot.queue.discard(job.number)
        if slot.batch is not None:
            slot.batch.cancel(job.number)
        self._release_models(slot)
        job.report(error)

    # On readers' threads.

    def _read(self, job: Job, slot: ModelSlot, config: WhisperConfig) -> None:
        if job.number not in self._jobs:  # cancelled
            return
        try:
            with self._of(job), self._readers.reading(self._warn):
                audio = read_recording(config, job.audio, job.options)
            audio.mel.waveform, held = self._spool.keep(audio.mel.waveform)
        except Exception as error:
            failure = error
            self._do(lambda: self._end(job, failure))
        else:
            work = partial(self._add, job, slot, audio, held)
            if slot.is_prepared(job.options):
                self._do(work)
            else:
                self._loader.submit(self._prepare, job, slot, work)
        finally:
            job.audio = None

    def _prepare(self, job: Job, slot: ModelSlot, work: Callable[[], None]) -> None:
        """On the loader's thread: the scheduler's would hold up all requests while it compiles for one."""
        if job.number in self._jobs:
            slot.prepare(job.options)
        self._do(work)

    # Warnings, on any thread.

    @contextmanager
    def _of(self, job: Job) -> Iterator[None]:
        """What is warned of on this thread is about this request."""
        self._current.job = job
        try:
            yield
        finally:
            self._current.job = None

    def _warn(self, message: str) -> None:
        if (job := getattr(self._current, "job", None)) is not None:
            job.warnings.append(message)


def _itself(model: Whisper) -> Whisper:
    return model


@contextmanager
def _warnings_to(receive: Callable[[str], None]) -> Iterator[None]:
    """All warnings of this process go to `receive`, again and again."""

    def show(message: Warning | str, *_: Any) -> None:
        receive(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show  # type: ignore[assignment]
        yield
