"""A server on a loopback port, in a thread, for tests."""

import asyncio
import io
import threading
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import uvicorn
from openai import OpenAI

from whisper_nnx.serving.app import create_app
from whisper_nnx.serving.scheduler import Scheduler
from whisper_nnx.serving.settings import ServerSettings


@dataclass
class Server:
    """`loop` is that of the server's thread."""

    url: str
    app: Any
    scheduler: Scheduler
    loop: asyncio.AbstractEventLoop
    http: httpx.Client
    clients: list[OpenAI]

    def openai(self, kind: Any = OpenAI, key: str = "none", **options: Any) -> Any:
        """A client that refuses what does not fit its types."""
        strict = {"_strict_response_validation": True, "max_retries": 0, **options}
        client = kind(base_url=f"{self.url}/v1", api_key=key, **strict)
        if isinstance(client, OpenAI):
            self.clients.append(client)
        return client


@contextmanager
def started(models: dict[str, Any], settings: ServerSettings | None = None, **options: Any) -> Iterator[Server]:
    """A real server, stopped at the end. options: of the scheduler."""
    box: list[Server] = []
    up = threading.Event()
    stop: list[uvicorn.Server] = []

    async def main() -> None:
        scheduler = Scheduler.of(models, **{"sizes": (1, 2), **options})
        app = create_app(scheduler, settings)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False, lifespan="off"))
        stop.append(server)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        http = httpx.Client(base_url=url, timeout=60)
        box.append(Server(url, app, scheduler, asyncio.get_running_loop(), http, []))
        up.set()
        await serving
        await scheduler.close(0)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert up.wait(60)
    try:
        yield box[0]
    finally:
        for client in [box[0].http, *box[0].clients]:
            client.close()
        stop[0].should_exit = True
        thread.join()


def recording(seconds: float = 2.5, channels: int = 1, seed: int = 0, level: float = 0.1) -> bytes:
    """Noise as a WAV file at 16 kHz; of two channels the second is silent."""
    noise = np.random.default_rng(seed).normal(0, level, (round(seconds * 16000), 1))
    samples = (noise * [32767] if channels == 1 else noise * [32767, 0]).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(2)
        out.setframerate(16000)
        out.writeframes(samples.tobytes())
    return file.getvalue()
