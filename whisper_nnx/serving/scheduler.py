"""The scheduler: one thread owns the models and decodes the windows of all requests together."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from whisper_nnx.model.whisper import Whisper
from whisper_nnx.serving.job import Job
from whisper_nnx.transcription.batch import Batch
from whisper_nnx.transcription.opening import open_recording
from whisper_nnx.transcription.options import TranscribeOptions


class Busy(Exception):
    """The queue is full; `retry_after_s` says when to come again."""

    def __init__(self, retry_after_s: int):
        super().__init__(f"the server is busy; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class UnknownModel(KeyError):
    """No model has this name."""


class Unavailable(Exception):
    """The server is starting or stopping."""


class Scheduler:
    """Placeholder: one request after the other. The interface is final, the inside is being written."""

    def __init__(self, models: Mapping[str, Whisper]):
        self._models = dict(models)
        self._numbers = itertools.count()
        self._thread = ThreadPoolExecutor(1)
        self._cancelled: set[int] = set()

    @property
    def names(self) -> list[str]:
        """Of the models; the first is the default one."""
        return list(self._models)

    def config(self, name: str) -> Any:
        """`WhisperConfig` of a model. Raises UnknownModel."""
        return self._models[name].config

    def submit(self, model: str, audio: Any, options: TranscribeOptions) -> Job:
        """Takes a request. To be called in the event loop. Raises Busy, UnknownModel, Unavailable."""
        if model not in self._models:
            raise UnknownModel(model)
        job = Job(model, audio, options, next(self._numbers), lambda job: self._cancelled.add(job.number))
        self._thread.submit(self._run, job)
        return job

    def _run(self, job: Job) -> None:
        try:
            model = self._models[job.model]
            opened = open_recording(model, job.audio, job.options, job.number)
            job.report_opened(opened)
            for live, window in Batch(model).run(iter(opened.lives)):
                if job.number in self._cancelled:
                    return
                if isinstance(window, Exception):
                    raise window
                job.report(opened.add(live, window))
            job.report(None)
        except Exception as error:
            job.report(error)

    async def close(self, grace_s: float = 30) -> None:
        """Takes no new requests, finishes those taken within `grace_s`, and ends the thread."""
        self._thread.shutdown()
