"""The Wyoming protocol, by which Home Assistant and its satellites ask for text."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import Any

import numpy as np
from wyoming.asr import Transcribe, Transcript, TranscriptChunk, TranscriptStart, TranscriptStop
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.error import Error
from wyoming.event import Event
from wyoming.info import AsrModel, AsrProgram, Attribution, Describe, Info
from wyoming.ping import Ping, Pong
from wyoming.server import AsyncEventHandler

from whisper_nnx import __version__
from whisper_nnx.runtime.console import one_line
from whisper_nnx.serving.scheduler import Scheduler
from whisper_nnx.text.languages import LANGUAGES
from whisper_nnx.transcription.options import TranscribeOptions

MAX_EVENT_BYTES = 1 << 20  # of the data or the payload of one event
_OWN = Attribution(name="whisper_nnx", url="https://github.com/whisper-nnx/whisper-nnx")
_OPENAI = Attribution(name="OpenAI", url="https://github.com/openai/whisper")


async def serve_wyoming(scheduler: Scheduler, listening: socket.socket, max_bytes: int) -> asyncio.Server:
    """Serves the protocol; the result is to be closed. max_bytes: of the audio of one request."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await Handler(scheduler, max_bytes, reader, writer).run()

    return await asyncio.start_server(connected, sock=listening)


class _BoundedReader:
    """A stream reader that refuses what is too long, where the protocol's own reader would take any length."""

    def __init__(self, reader: asyncio.StreamReader):
        self.readline, self._reader = reader.readline, reader

    async def readexactly(self, n: int) -> bytes:
        if not 0 <= n <= MAX_EVENT_BYTES:
            raise ValueError(f"an event of {n} bytes exceeds the limit of {MAX_EVENT_BYTES}")  # ends the connection
        return await self._reader.readexactly(n)


class Handler(AsyncEventHandler):
    """One connection: `transcribe`, then audio, is answered by the text, as often as the client asks."""

    def __init__(self, scheduler: Scheduler, max_bytes: int, reader: Any, writer: asyncio.StreamWriter):
        super().__init__(_BoundedReader(reader), writer)  # type: ignore[arg-type]
        self._scheduler, self._max_bytes = scheduler, max_bytes
        self._request = Transcribe()
        self._start: AudioStart | None = None
        self._audio = bytearray()
        self._refused = False  # what is left of audio that was refused is ignored

    async def handle_event(self, event: Event) -> bool:
        try:
            await self._handle(event)
        except Exception as error:  # the connection goes on
            self._reset()
            self._refused = not AudioStop.is_type(event.type)
            await self.write_event(Error(one_line(error), type(error).__name__).event())
        return True

    async def _handle(self, event: Event) -> None:
        if Ping.is_type(event.type):
            await self.write_event(Pong(Ping.from_event(event).text).event())
        elif Describe.is_type(event.type):
            await self.write_event(self._info().event())
        elif Transcribe.is_type(event.type):
            self._request = Transcribe.from_event(event)
        elif AudioStart.is_type(event.type):
            self._audio.clear()
            self._start, self._refused = AudioStart.from_event(event), False
        elif self._refused:
            self._refused = not AudioStop.is_type(event.type)
        elif AudioChunk.is_type(event.type):
            chunk = AudioChunk.from_event(event)
            self._start = self._start or AudioStart(chunk.rate, chunk.width, chunk.channels)
            if len(self._audio) + len(chunk.audio) > self._max_bytes:
                raise ValueError(f"the audio exceeds {self._max_bytes} bytes; send less at a time")
            self._audio += chunk.audio
        elif AudioStop.is_type(event.type):
            await self._transcribe()
            self._reset()

    def _reset(self) -> None:
        self._request, self._start = Transcribe(), None
        self._audio = bytearray()

    async def _transcribe(self) -> None:
        model, options = self._request.name or self._scheduler.names[0], self._options()
        async with self._scheduler.submit(model, self._samples(), options) as job:
            # A client that goes is noticed only while it is read from; it sends nothing until it has the text.
            text, started = "", False
            async for segments in job:
                if not started:
                    await self.write_event(TranscriptStart(language=job.language).event())
                    started = True
                part = "".join(segment["text"] for segment in segments)
                text += part
                await self.write_event(TranscriptChunk(text=part).event())
            await self.write_event(Transcript(text=text.strip(), language=job.language).event())
            if started:
                await self.write_event(TranscriptStop().event())

    def _options(self) -> TranscribeOptions:
        request, start = self._request, self._start
        words = [*(request.transcript_names or []), *(request.transcript_terms or [])]
        return TranscribeOptions.of(
            language=request.language or None,
            hotwords=", ".join(words) or None,
            sampling_rate=start.rate if start else None,
        )

    def _samples(self) -> np.ndarray:
        """The audio [N, channels]."""
        width, channels = (self._start.width, self._start.channels) if self._start else (2, 1)
        if width not in (2, 4):
            raise ValueError(f"audio has width={width} bytes a sample; send 2 or 4")
        if not 1 <= channels <= 8:
            raise ValueError(f"audio has channels={channels}; send 1 to 8")
        whole = len(self._audio) // (width * channels) * width * channels
        samples = np.frombuffer(bytes(self._audio[:whole]), f"<i{width}").reshape(-1, channels)
        return samples[:, 0] if channels == 1 else samples

    def _info(self) -> Info:
        models = [
            AsrModel(
                name=name, attribution=_OPENAI, installed=True, description=name, version=None, languages=[*LANGUAGES]
            )
            for name in self._scheduler.names
        ]
        program = AsrProgram(
            name="whisper-nnx",
            attribution=_OWN,
            installed=True,
            description="Whisper in JAX",
            version=__version__,
            models=models,
            supports_transcript_streaming=True,
        )
        return Info(asr=[program])
