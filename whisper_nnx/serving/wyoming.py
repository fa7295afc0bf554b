"""The Wyoming protocol, by which Home Assistant and its satellites ask for text."""

from __future__ import annotations

import asyncio
import socket
import time
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
from whisper_nnx.serving.errors import as_api_error, log, too_slow
from whisper_nnx.serving.job import Job
from whisper_nnx.serving.request_log import LEFT, log_request
from whisper_nnx.serving.run import Serving
from whisper_nnx.serving.uploads import Pace, UploadSpace
from whisper_nnx.text.languages import LANGUAGES
from whisper_nnx.transcription.options import TranscribeOptions

MAX_CONNECTIONS = 256
MAX_EVENT_BYTES = 1 << 20  # of the data or the payload of one event
MAX_AUDIO_BYTES, MAX_HOURS = 64 << 20, 0.5  # of a request
MAX_ALL_BYTES = 256 << 20  # of the audio of all requests that is in memory
_ROUTE = "wyoming"
_OWN = Attribution(name="whisper_nnx", url="https://github.com/whisper-nnx/whisper-nnx")
_OPENAI = Attribution(name="OpenAI", url="https://github.com/openai/whisper")


async def serve_wyoming(serving: Serving, listening: socket.socket) -> asyncio.Server:
    """Serves the protocol; the result is to be closed."""
    space = UploadSpace(MAX_ALL_BYTES)
    connections: set[Handler] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(connections) >= MAX_CONNECTIONS:
            writer.close()
            return
        handler = Handler(serving, space, reader, writer)
        connections.add(handler)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await handler.run()
        except TimeoutError:
            writer.transport.abort()  # it may not read, either
        except Exception as error:  # what it sent is not of this protocol
            log.warning("a Wyoming connection has ended: %s", one_line(error))
        finally:
            connections.discard(handler)

    return await asyncio.start_server(connected, sock=listening)


class _BoundedReader:
    """A stream reader that refuses what is too long or too slow; the protocol's own reader has no limits."""

    def __init__(self, reader: asyncio.StreamReader, timeout_s: float):
        self._reader, self._timeout_s = reader, timeout_s

    async def readline(self) -> bytes:
        return await asyncio.wait_for(self._reader.readline(), self._timeout_s)

    async def readexactly(self, n: int) -> bytes:
        if not 0 <= n <= MAX_EVENT_BYTES:
            raise ValueError(f"an event of {n} bytes exceeds the limit of {MAX_EVENT_BYTES}")  # ends the connection
        return await asyncio.wait_for(self._reader.readexactly(n), self._timeout_s)


class Handler(AsyncEventHandler):
    """One connection: `transcribe`, then audio, is answered by the text, as often as the client asks."""

    def __init__(self, serving: Serving, space: UploadSpace, reader: Any, writer: asyncio.StreamWriter):
        timeout_s = serving.settings.upload_timeout_s
        super().__init__(_BoundedReader(reader, timeout_s), writer)  # type: ignore[arg-type]
        self._timeout_s = timeout_s
        self._serving, self._scheduler, self._space = serving, serving.scheduler, space
        self._client = (writer.get_extra_info("peername") or [None])[0]
        self._request = Transcribe()
        self._start: AudioStart | None = None
        self._pace = Pace(serving.settings)
        self._audio = bytearray()
        self._refused = False  # what is left of audio that was refused is ignored

    async def write_event(self, event: Event) -> None:
        await asyncio.wait_for(super().write_event(event), self._timeout_s)

    async def disconnect(self) -> None:
        self._reset()

    async def handle_event(self, event: Event) -> bool:
        try:
            await self._handle(event)
        except (ConnectionError, TimeoutError):
            self._done(LEFT)
            raise
        except Exception as error:  # the connection goes on
            fault = as_api_error(error)
            self._reset()
            self._refused = not AudioStop.is_type(event.type)
            self._done(fault.status, error=fault.message)
            await self.write_event(Error(fault.message, fault.code or type(error).__name__).event())
        return True

    async def _handle(self, event: Event) -> None:
        if Ping.is_type(event.type):
            await self.write_event(Pong(Ping.from_event(event).text).event())
        elif Describe.is_type(event.type):
            await self.write_event(self._info().event())
        elif Transcribe.is_type(event.type):
            self._request = Transcribe.from_event(event)
        elif AudioStart.is_type(event.type):
            self._clear()
            self._start, self._refused, self._pace = AudioStart.from_event(event), False, Pace(self._serving.settings)
            self._scheduler.check(self._model)
        elif self._refused:
            self._refused = not AudioStop.is_type(event.type)
        elif AudioChunk.is_type(event.type):
            self._add(AudioChunk.from_event(event))
        elif AudioStop.is_type(event.type):
            await self._transcribe()
            self._reset()

    def _add(self, chunk: AudioChunk) -> None:
        self._start = self._start or AudioStart(chunk.rate, chunk.width, chunk.channels)
        if len(self._audio) + len(chunk.audio) > MAX_AUDIO_BYTES:
            raise ValueError(f"the audio exceeds {MAX_AUDIO_BYTES} bytes; send less at a time")
        if self._pace.rest_s(len(self._audio)) < 0:
            raise ValueError(f"the audio is too slow: {self._pace.fault}")
        self._space.take(len(chunk.audio))
        self._audio += chunk.audio

    def _clear(self) -> None:
        self._space.release(len(self._audio))
        self._audio = bytearray()

    def _reset(self) -> None:
        self._clear()
        self._request, self._start = Transcribe(), None

    @property
    def _model(self) -> str:
        return self._serving.model(self._request.name or "")

    async def _transcribe(self) -> None:
        started, limit_s = time.monotonic(), self._serving.settings.request_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                job = await self._send_text()
        except TimeoutError:
            raise too_slow(limit_s or 0) from None
        seconds, metrics = time.monotonic() - started, self._serving.metrics
        metrics.latency_s.labels(_ROUTE).observe(seconds)
        metrics.audio_in_s.inc(job.duration_s)
        metrics.audio_out_s.inc(job.duration_s)
        about = {"seconds": round(seconds, 3), "model": job.model, "audio_s": round(job.duration_s, 2)}
        self._done(200, **about, language=job.language)

    def _done(self, status: int, **about: Any) -> None:
        self._serving.metrics.requests.labels(_ROUTE, str(status)).inc()
        log_request(client=self._client, route=_ROUTE, status=status, **about)

    async def _send_text(self) -> Job:
        async with self._scheduler.submit(self._model, self._samples(), self._options()) as job:
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
            return job

    def _options(self) -> TranscribeOptions:
        request, start = self._request, self._start
        words = [*(request.transcript_names or []), *(request.transcript_terms or [])]
        return TranscribeOptions.of(
            language=request.language or None,
            hotwords=", ".join(words) or None,
            sampling_rate=start.rate if start else None,
            max_hours=min(MAX_HOURS, self._serving.settings.max_hours),
            **self._serving.settings.language_model,
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

    def _languages(self, name: str) -> list[str]:
        tokenizer = self._scheduler.tokenizer(name)
        return [*LANGUAGES] if tokenizer is None or tokenizer.is_multilingual else ["en"]

    def _info(self) -> Info:
        common: dict[str, Any] = {"attribution": _OPENAI, "installed": True, "version": None}
        models = [
            AsrModel(name=name, description=name, languages=self._languages(name), **common)
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
