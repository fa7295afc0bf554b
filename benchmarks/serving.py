"""Loads the server with many clients, beside a minimal server around faster-whisper and our own batches offline.

    python benchmarks/serving.py CHECKPOINT MANIFEST --result benchmarks/results/NAME.serving.json

Each client sends one recording after the other, drawn from the manifest's English ones and from pieces of them, until
the time is over. Reported for each server: errors, requests, latency and time to the first text (median and 95th
percentile), seconds of audio and words a second of what ended after the first minute, and memory at each minute; for
ours also what a long recording does to the latency of a short one.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.checkpoints import prepare
from benchmarks.scoring import write_result
from benchmarks.speech import Recording, cut, long, read
from benchmarks.systems import SAMPLE_RATE, WhisperNNX, Work

BATCH = 8
ROUTE = "/v1/audio/transcriptions"


@dataclass
class Load:
    """What clients saw of a server."""

    latencies_s: list[float] = field(default_factory=list)
    first_texts_s: list[float] = field(default_factory=list)
    ended: list[tuple[float, float, int]] = field(default_factory=list)  # seconds since the start, of audio, and words
    errors: list[str] = field(default_factory=list)
    memory_mb: list[tuple[float, float]] = field(default_factory=list)  # seconds since the start, and what is resident

    def summary(self, wall_s: float) -> dict[str, Any]:
        warm_s = min(60, wall_s / 3)  # until then fewer requests end than are served: all came at once
        counted = [(audio_s, words) for at, audio_s, words in self.ended if warm_s < at <= wall_s]
        return {
            "requests": len(self.latencies_s),
            "errors": len(self.errors),
            "first_error": self.errors[0] if self.errors else None,
            "audio_s_per_s": round(sum(audio_s for audio_s, _ in counted) / (wall_s - warm_s), 2),
            "words_per_s": round(sum(words for _, words in counted) / (wall_s - warm_s), 2),
            "latency_s": percentiles(self.latencies_s),
            "first_text_s": percentiles(self.first_texts_s),
            "memory_mb": [round(mb) for at, mb in self.memory_mb if warm_s <= at][::12],
        }


def percentiles(seconds: Sequence[float]) -> list[float] | None:
    """Median and 95th percentile."""
    return [round(float(np.percentile(seconds, p)), 2) for p in (50, 95)] if seconds else None


def as_wav(audio: np.ndarray) -> bytes:
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((np.clip(audio, -1, 1) * 32767).astype("<i2").tobytes())
    return content.getvalue()


@contextmanager
def running(command: Callable[[int], list[str]], ready: str) -> Iterator[tuple[str, int]]:
    """A server in a process of its own -> its address and process id, when `ready` answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command(port), stdout=log, stderr=log)
        try:
            while True:
                if process.poll() is not None:
                    log.seek(0)
                    raise SystemExit(f"the server ended: {log.read().decode()[-2000:]}")
                try:
                    if httpx.get(address + ready).status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.5)
            yield address, process.pid
        finally:
            process.terminate()
            process.wait(60)


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 1e6


async def ask(
    client: httpx.AsyncClient, content: bytes, stream: bool, first_text: asyncio.Event | None = None, **fields: str
) -> tuple[str, float | None, float]:
    """One request -> the text, seconds to the first part of it where it is streamed, and to its end."""
    started, first, text = time.monotonic(), None, ""
    data = {"model": "whisper-1", "language": "en", "temperature": "0", "stream": str(stream), **fields}
    files = {"file": ("speech.wav", content, "audio/wav")}
    async with client.stream("POST", ROUTE, data=data, files=files) as response:
        if response.status_code != 200:
            raise ValueError(f"{response.status_code}: {(await response.aread())[:200]!r}")
        async for line in response.aiter_lines():
            if stream and line.startswith("data: {") and first is None:
                first = time.monotonic() - started
                if first_text is not None:
                    first_text.set()
            text += line
    return text, first, time.monotonic() - started


async def load(address: str, pid: int, clips: list[np.ndarray], clients: int, seconds: float, stream: bool) -> Load:
    found, end, started = Load(), time.monotonic() + seconds, time.monotonic()
    contents = [as_wav(clip) for clip in clips]
    limits = httpx.Limits(max_connections=None)

    async def one(number: int, client: httpx.AsyncClient) -> None:
        order = random.Random(number)
        while time.monotonic() < end:
            place = order.randrange(len(clips))
            try:
                text, first, latency = await ask(client, contents[place], stream)
            except Exception as error:
                found.errors.append(f"{type(error).__name__}: {error}")
                continue
            found.latencies_s.append(latency)
            found.first_texts_s += [first] if first is not None else []
            audio_s = len(clips[place]) / SAMPLE_RATE
            found.ended.append((time.monotonic() - started, audio_s, len(text_of(text).split())))

    async def watch() -> None:
        while True:
            found.memory_mb.append((time.monotonic() - started, resident_mb(pid)))
            await asyncio.sleep(5)

    async with httpx.AsyncClient(base_url=address, timeout=None, limits=limits) as client:
        watching = asyncio.create_task(watch())
        await asyncio.gather(*(one(number, client) for number in range(clients)))
        watching.cancel()
    return found


def text_of(answer: str) -> str:
    """The text of a JSON answer, or of a stream's last event."""
    parts = [part for part in answer.split("data: ") if '"text"' in part]
    return str(json.loads(parts[-1])["text"]) if parts else ""


async def beside_a_long_one(address: str, short: np.ndarray, lengthy: bytes, times: int = 5) -> dict[str, Any]:
    """Latency of a short recording alone, and beside a long one: window by window, and in VAD's pieces."""
    content = as_wav(short)
    async with httpx.AsyncClient(base_url=address, timeout=None) as client:
        alone = [(await ask(client, content, stream=False))[2] for _ in range(times + 1)][1:]
        found: dict[str, Any] = {"alone_s": round(statistics.median(alone), 2)}
        for name, fields in {"beside_windows_s": {}, "beside_pieces_s": {"vad_filter": "true"}}.items():
            started = asyncio.Event()
            other = asyncio.create_task(ask(client, lengthy, stream=True, first_text=started, **fields))
            await asyncio.wait({other, waiting := asyncio.create_task(started.wait())}, return_when="FIRST_COMPLETED")
            waiting.cancel()
            beside = [(await ask(client, content, stream=False))[2] for _ in range(times)]
            if other.done():
                raise RuntimeError(f"the long recording ended too soon: {other.result()}")
            other.cancel()
            found[name] = [round(statistics.median(beside), 2), round(max(beside), 2)]
    return found


def offline(checkpoint: Path, clips: list[np.ndarray]) -> dict[str, Any]:
    """The same recordings as one list, in batches as large as the server's."""
    system = WhisperNNX("float32", "float32", checkpoint, None)
    work = Work("en", batch_size=BATCH, defaults=True)
    chosen = [clips[random.Random(i).randrange(len(clips))] for i in range(64)]
    system.transcribe(chosen[:BATCH], work)
    started = time.monotonic()
    written = system.transcribe(chosen, work)
    wall_s = time.monotonic() - started
    return {
        "audio_s_per_s": round(sum(map(len, chosen)) / SAMPLE_RATE / wall_s, 2),
        "words_per_s": round(sum(len(one.text.split()) for one in written) / wall_s, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--long_hours", type=float, default=3)
    parser.add_argument("--formats", type=Path, help="folder for the converted checkpoint")
    parser.add_argument("--result", type=Path)
    args = parser.parse_args()
    recordings = read(args.manifest, {"en"})
    clips = [piece for recording in recordings for piece in [recording.audio, *cut(recording.audio, 12, 6)]]
    clips = [clip for clip in clips if len(clip) > SAMPLE_RATE]
    with tempfile.TemporaryDirectory() as folder:
        formats = prepare(args.checkpoint, args.formats or Path(folder), only={"huggingface", "ctranslate2"})
        found = compare(formats, clips, recordings, args)
    if args.result:
        import faster_whisper
        import jax

        versions = {"jax": jax.__version__, "faster-whisper": faster_whisper.__version__}
        write_result(args.result, args.checkpoint.name, versions, clients=args.clients, minutes=args.minutes, **found)


def compare(
    formats: Path, clips: list[np.ndarray], recordings: list[Recording], args: argparse.Namespace
) -> dict[str, Any]:
    """Offline, ours, and the peer, one after the other."""
    found: dict[str, Any] = {"offline": offline(formats, clips)}
    print(found, flush=True)

    def ours(port: int) -> list[str]:
        options = ["--model", f"bench={formats / 'huggingface'}", "--port", str(port), "--batch_size", str(BATCH)]
        options += ["--encoder_cache_mb", "0"]  # clips repeat here, which the recordings of users do not
        return [sys.executable, "-m", "whisper_nnx.serve", *options]

    seconds = 60 * args.minutes
    with running(ours, "/health/ready") as (address, pid):
        seen = asyncio.run(load(address, pid, clips, args.clients, seconds, stream=True))
        found["whisper_nnx"] = seen.summary(seconds)
        print(found["whisper_nnx"], flush=True)
        short = recordings[0].audio[: 3 * SAMPLE_RATE]
        lengthy = as_wav(long(recordings, 60 * args.long_hours).audio)
        found["beside"] = asyncio.run(beside_a_long_one(address, short, lengthy))
        print(found["beside"], flush=True)

    def peer(port: int) -> list[str]:
        script = str(Path(__file__).with_name("peer_server.py"))
        return [sys.executable, script, str(formats / "ctranslate2"), str(port), "float32"]

    with running(peer, "/health") as (address, pid):
        seen = asyncio.run(load(address, pid, clips, args.clients, seconds, stream=False))
        found["faster-whisper"] = seen.summary(seconds)
        print(found["faster-whisper"], flush=True)
    return found


if __name__ == "__main__":
    main()
