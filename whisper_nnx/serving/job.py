"""`Job`: a request in progress. The scheduler's thread reports its events; the event loop reads them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from whisper_nnx.output.results import Segment, Transcript
from whisper_nnx.transcription.opening import Opened
from whisper_nnx.transcription.options import TranscribeOptions


class Job:
    """A recording that is to be transcribed, or is being transcribed. Created by `Scheduler.submit`.

        async with scheduler.submit(model, audio, options) as job:
            async for segments in job:  # one list for each window, as soon as it is decoded
                ...
            job.transcript, job.language, job.duration_s

    Leaving the context cancels what is not done.

    Attributes:
      model: name of the model.
      audio: whatever `load_audio` reads.
      options: of the recording.
      number: unlike that of any other job of this process.
      warnings: what the user should know of the recording or the options.
    """

    def __init__(self, model: str, audio: Any, options: TranscribeOptions, number: int, cancel: Callable[[Job], None]):
        self.model, self.audio, self.options, self.number = model, audio, options, number
        self.warnings: list[str] = []
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[list[Segment] | Exception | None] = asyncio.Queue()
        self._opened: Opened | None = None
        self._cancel = cancel
        self._ended = False

    async def __aenter__(self) -> Job:
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self._ended:
            self._ended = True
            self._cancel(self)

    async def __aiter__(self) -> AsyncIterator[list[Segment]]:
        """Yields the segments of each window, numbered and in order. Raises whatever the recording raised."""
        while True:
            event = await self._events.get()
            if isinstance(event, list):
                yield event
                continue
            self._ended = True
            if event is not None:
                raise event
            return

    async def result(self) -> Transcript:
        """Waits for the end and returns the whole. Raises whatever the recording raised."""
        async for _ in self:
            pass
        return self.transcript

    @property
    def has_opened(self) -> bool:
        return self._opened is not None

    @property
    def opened(self) -> Opened:
        assert self._opened is not None, "no window was decoded yet"
        return self._opened

    @property
    def transcript(self) -> Transcript:
        """What there is so far."""
        return self.opened.transcript()

    @property
    def language(self) -> str:
        """Known with the first list of segments."""
        return self.opened.language

    @property
    def duration_s(self) -> float:
        """Known with the first list of segments."""
        return self.opened.duration_s

    # For the scheduler, from any thread.

    def report_opened(self, opened: Opened) -> None:
        self._opened = opened

    def report(self, event: list[Segment] | Exception | None) -> None:
        """Segments of a window; None after the last; an exception if the job failed."""
        with suppress(RuntimeError):  # the loop is closed: nothing waits for it
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
