"""The Wyoming protocol, with its own client."""

import asyncio
import socket

import numpy as np
import pytest
from wyoming.asr import Transcribe, Transcript
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.client import AsyncTcpClient
from wyoming.error import Error
from wyoming.event import Event
from wyoming.info import Describe, Info
from wyoming.ping import Ping

from tests.small import quick_compilation as quick_compilation
from tests.small import small_model
from whisper_nnx import load_audio, load_model, transcribe
from whisper_nnx.serving.app import create_app
from whisper_nnx.serving.scheduler import Scheduler
from whisper_nnx.serving.settings import ServerSettings
from whisper_nnx.serving.wyoming import serve_wyoming

FORMAT = {"rate": 16000, "width": 2, "channels": 1}


@pytest.fixture(scope="module")
def models():
    return {"small": small_model()}


def run(models, talk, settings=None, **options):
    """`talk(client)` with a client of a server for these models; options: of the scheduler."""

    async def main():
        scheduler = Scheduler.of(models, sizes=(1,), **options)
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # a client that does not read is noticed soon
        serving = create_app(scheduler, settings).state.serving
        server = await serve_wyoming(serving, listening)
        try:
            async with AsyncTcpClient("127.0.0.1", listening.getsockname()[1]) as client:
                return await talk(client)
        finally:
            server.close()
            await scheduler.close(0)

    return asyncio.run(main())


async def ask(client, samples: np.ndarray, request: Transcribe, **format) -> list[Event]:
    """What the server answers, up to the text or an error."""
    format = {**FORMAT, **format}
    await client.write_event(request.event())
    await client.write_event(AudioStart(**format).event())
    data = samples.tobytes()
    for at in range(0, len(data), 2048):
        await client.write_event(AudioChunk(**format, audio=data[at : at + 2048]).event())
    await client.write_event(AudioStop().event())
    events = []
    while not events or not (Transcript.is_type(events[-1].type) or Error.is_type(events[-1].type)):
        event = await client.read_event()
        assert event is not None, "the server has hung up"
        events.append(event)
    return events


@pytest.mark.real
def test_a_voice_command_becomes_text(real_tiny_en, real_speech):
    model, samples = load_model(str(real_tiny_en)), load_audio(real_speech("en_libri_5s.flac"))
    sent = (samples * 32768).astype(np.int16)

    async def talk(client):
        await client.write_event(Describe().event())
        info = Info.from_event(await client.read_event())
        assert [(one.name, one.languages) for one in info.asr[0].models] == [("tiny.en", ["en"])]
        for _ in range(2):  # one connection may ask again
            *_, answer = await ask(client, sent, Transcribe(name="tiny.en", language="en"))
            texts.append(Transcript.from_event(answer).text)
            await client.read_event()  # transcript-stop

    texts: list[str] = []
    run({"tiny.en": model}, talk)
    assert texts == [transcribe(model, samples)["text"].strip()] * 2


def test_what_cannot_be_met_is_an_error_and_the_connection_goes_on(models):
    samples = np.random.default_rng(0).normal(0, 3000, 8000).astype(np.int16)

    async def talk(client):
        await client.write_event(Ping(text="here").event())
        assert (await client.read_event()).data["text"] == "here"
        for request, format in [
            (Transcribe(name="large"), {}),
            (Transcribe(language="klingon"), {}),
            (Transcribe(), {"width": 3}),
            (Transcribe(), {"rate": 0}),
        ]:
            [error] = await ask(client, samples, request, **format)
            assert Error.is_type(error.type)
            errors.append(Error.from_event(error).text)
        *_, answer = await ask(client, samples, Transcribe(language="en", transcript_names=["the one"]))
        assert Transcript.is_type(answer.type)

    errors: list[str] = []
    run(models, talk)
    for error, part in zip(errors, ["'large'", "'klingon'", "width=3", "sampling_rate=0"], strict=True):
        assert part in error


def test_what_is_too_long_is_refused(models, monkeypatch):
    monkeypatch.setattr("whisper_nnx.serving.wyoming.MAX_AUDIO_BYTES", 4000)

    async def talk(client):
        [error] = await ask(client, np.zeros(8000, np.int16), Transcribe())
        assert "exceeds 4000 bytes" in Error.from_event(error).text
        [error] = await ask(client, np.zeros(8000, np.int16), Transcribe())  # no answer to the rest of the first
        client._writer.write(b'{"type": "audio-chunk", "payload_length": 1000000000000}\n')
        assert [event for _ in range(9) if (event := await client.read_event()) is None]

    run(models, talk)


async def is_closed(client) -> bool:
    try:
        return await asyncio.wait_for(client.read_event(), 5) is None
    except ConnectionError:
        return True


@pytest.mark.parametrize("sent", [b"", b'{"type": "ping"', b'{"type": "audio-chunk", "payload_length": 9}\nxx'])
def test_a_connection_that_stands_still_is_closed(models, sent):
    async def talk(client):
        client._writer.write(sent)
        assert await is_closed(client)

    run(models, talk, ServerSettings(upload_timeout_s=0.1))


@pytest.mark.parametrize("sent", [b"[]\n", b'{"type": "ping", "data_length": "x"}\n', b"{}\n", b"GET / HTTP/1.1\r\n"])
def test_what_is_not_of_this_protocol_ends_the_connection(models, sent):
    async def talk(client):
        client._writer.write(sent)
        assert await is_closed(client)

    run(models, talk)


def test_a_connection_that_does_not_read_is_closed(models):
    async def talk(client):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect((client.host, client.port))
            sock.sendall(b'{"type": "describe"}\n' * 500)  # 2 KB answer each
            for _ in range(200):
                await asyncio.sleep(0.05)
                try:
                    sock.send(b"\n")
                except ConnectionError:
                    return True
        return False

    assert run(models, talk, ServerSettings(upload_timeout_s=0.2))


def test_audio_that_comes_slowly_is_refused(models):
    async def talk(client):
        await client.write_event(AudioStart(**FORMAT).event())
        event = None
        while event is None:
            await client.write_event(AudioChunk(**FORMAT, audio=b"12").event())
            try:
                event = await asyncio.wait_for(client.read_event(), 0.05)
            except TimeoutError:
                continue
        assert "too slow" in Error.from_event(event).text

    run(models, talk, ServerSettings(upload_timeout_s=0.3))


def test_connections_and_their_audio_are_limited(models, monkeypatch):
    monkeypatch.setattr("whisper_nnx.serving.wyoming.MAX_CONNECTIONS", 2)
    monkeypatch.setattr("whisper_nnx.serving.wyoming.MAX_ALL_BYTES", 3000)

    async def talk(client):
        async with AsyncTcpClient(client.host, client.port) as other, AsyncTcpClient(client.host, client.port) as third:
            assert await is_closed(third)
            for one in (client, other):
                await one.write_event(AudioStart(**FORMAT).event())
                await one.write_event(AudioChunk(**FORMAT, audio=bytes(2000)).event())
                await one.write_event(Ping(text="").event())
                replies.append((await one.read_event()).type)
        [error] = await ask(client, np.zeros(2000, np.int16), Transcribe())  # the rest of the first one's audio is gone
        assert "take up" in Error.from_event(error).text

    replies: list[str] = []
    run(models, talk)
    assert replies == ["pong", "error"]


def test_a_server_without_room_says_so_before_the_audio(models):
    async def talk(client):
        await client.write_event(AudioStart(**FORMAT).event())
        return Error.from_event(await client.read_event()).text

    assert "busy" in run(models, talk, max_requests=0)
