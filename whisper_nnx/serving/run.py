"""A request under way: its job, watched for a client that leaves and for the time that it takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from typing import NamedTuple, TypeVar

from fastapi import Request

from whisper_nnx.output.results import Segment
from whisper_nnx.serving.asked import Asked
from whisper_nnx.serving.errors import ApiError, ClientLeft, as_api_error, too_slow, unknown_model
from whisper_nnx.serving.job import Job
from whisper_nnx.serving.metrics import Metrics
from whisper_nnx.serving.request_log import note
from whisper_nnx.serving.scheduler import Scheduler, UnknownModel
from whisper_nnx.serving.settings import ServerSettings
from whisper_nnx.serving.uploads import Form, Items, Upload, UploadSpace, read_form

T = TypeVar("T")
ALIAS = "whisper-1"  # of the first model


class Serving(NamedTuple):
    """What all requests share: `request.app.state.serving`."""

    scheduler: Scheduler
    settings: ServerSettings
    metrics: Metrics
    space: UploadSpace

    def require_ready(self) -> None:
        """Raises ApiError while the server starts or stops."""
        if not self.scheduler.accepting:
            state = "starting" if self.scheduler.alive and not self.scheduler.ready else "stopping"
            raise ApiError(503, f"the server is {state}; try again later", code="unavailable", headers=_SOON)

    def require_room(self, model: str = "") -> None:
        """Raises ApiError where a request would be refused, whatever it holds."""
        self.require_ready()
        try:
            self.scheduler.check(self.model(model))
        except Exception as error:
            raise as_api_error(error) from None

    def model(self, name: str) -> str:
        """Of this name, or the first for "" and whisper-1. Raises ApiError."""
        names = self.scheduler.names
        if name in ("", ALIAS) and name not in names:
            return names[0]
        if name not in names:
            raise unknown_model(name, names)
        return name


_SOON = {"Retry-After": "5"}


def serving_of(request: Request) -> Serving:
    return request.app.state.serving


async def receive_form(request: Request, model: str = "") -> Form:
    """The form of a request, to be closed; model: that the query names.

    Raises ApiError, where it is known that the request will be refused before its file is read.
    """
    serving = serving_of(request)
    serving.require_room(model)

    def check_model(fields: Items) -> None:
        for name in [value.strip() for field, value in fields if field == "model"]:
            serving.model(name)

    form = await read_form(request, serving.settings, serving.space, check_model)
    serving.metrics.uploaded_bytes.inc(form.size)
    note(request, bytes=form.size)
    return form


class Run:
    """A job of a request.

        run = Run(request, asked, audio)
        try:
            await run.start()
            async for segments in run:
                ...
            run.job
        finally:
            await run.close()

    Args:
      request: whose body was read.
      asked: what it asks for.
      audio: the recording.

    Raises ApiError for all that goes wrong, ClientLeft where the client has gone.
    """

    def __init__(self, request: Request, asked: Asked, audio: Upload):
        self.asked = asked
        self._request, self._audio = request, audio
        self._serving = serving_of(request)
        self._started = time.monotonic()
        timeout_s = self._serving.settings.request_timeout_s
        self._deadline = None if timeout_s is None else self._started + timeout_s
        self._left = asyncio.create_task(_until_left(request))
        self._job: Job | None = None
        self._events: AsyncIterator[list[Segment]] | None = None
        self._first: list[Segment] | None = None

    @property
    def job(self) -> Job:
        assert self._job is not None
        return self._job

    async def start(self) -> None:
        """Waits for the first segments, or for the end if there are none: by then the recording has been read."""
        asked, serving = self.asked, self._serving
        name = serving.model(asked.model)
        note(self._request, model=name, format=asked.format, stream=asked.stream, task=asked.task)
        try:
            self._job = serving.scheduler.submit(name, self._audio, asked.options)
        except UnknownModel:
            raise unknown_model(name, serving.scheduler.names) from None
        except Exception as error:
            raise as_api_error(error) from None
        self._events = aiter(self._job)
        self._first = await self._next()
        serving.metrics.audio_in_s.inc(self.job.duration_s)
        seconds = time.monotonic() - self._started
        note(self._request, first_text_s=round(seconds, 3), audio_s=round(self.job.duration_s, 2))
        serving.metrics.first_text_s.observe(seconds)

    async def __aiter__(self) -> AsyncIterator[list[Segment]]:
        segments = self._first
        while segments is not None:
            self._serving.metrics.count_windows(segments)
            yield segments
            segments = await self._next()
        self._finished()

    async def finish(self) -> Job:
        """Waits for the end."""
        async for _ in self:
            pass
        return self.job

    async def within_limits(self, work: Awaitable[T]) -> T:
        """Waits for something until the client leaves, or the time of the request is over."""
        task = asyncio.ensure_future(work)
        rest_s = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        try:
            await asyncio.wait({task, self._left}, timeout=rest_s, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if self._left.done():
                raise ClientLeft
            raise too_slow(self._serving.settings.request_timeout_s or 0)
        finally:
            task.cancel()

    async def close(self) -> None:
        """Cancels what is not done."""
        self._left.cancel()
        if self._job is not None:
            await self._job.__aexit__()

    async def _next(self) -> list[Segment] | None:
        assert self._events is not None
        try:
            return await self.within_limits(anext(self._events, None))
        except (ApiError, ClientLeft):
            raise
        except Exception as error:
            raise as_api_error(error) from error

    def _finished(self) -> None:
        seconds, audio_s = time.monotonic() - self._started, self.job.duration_s
        self._serving.metrics.audio_out_s.inc(audio_s)
        self._serving.metrics.real_time_factor.observe(audio_s / seconds if seconds else 0)
        note(self._request, decoding_s=round(seconds, 3), language=self.job.language)


async def _until_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
