"""The command `whisper-nnx serve`: a server with OpenAI's audio API. `python -m whisper_nnx.serve` is the same."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whisper_nnx.cli.options import CommandOptions, Flag, add_option, as_flags, flag_of
from whisper_nnx.cli.parser import Help, Parser, parse_spelled
from whisper_nnx.cli.transcribe import check_devices, load_named_model
from whisper_nnx.runtime.console import NAME, one_line, run_command, say
from whisper_nnx.runtime.cores import reader_processes
from whisper_nnx.runtime.options import option, options_of
from whisper_nnx.runtime.packages import require_packages
from whisper_nnx.runtime.startup import start
from whisper_nnx.serving.settings import ServerSettings
from whisper_nnx.transcription.options import CallOptions

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from whisper_nnx.serving.models import ModelSlot
    from whisper_nnx.serving.scheduler import Scheduler

_network = partial(option, scope="call", group="network")
_models = partial(option, scope="call", group="models")
_limits = partial(option, scope="call", group="limits")


@dataclass(frozen=True)
class ServeOptions:
    """Options of the command beside those of the API; only described, never made."""

    host: str = field(
        default="127.0.0.1", metadata=_network("address to listen on; 0.0.0.0: all, for other machines too")
    )
    port: int = field(default=8000, metadata=_network("port to listen on"))
    wyoming_port: int | None = field(
        default=None,
        metadata=_network("port for Home Assistant's Wyoming protocol (default: none)", kind="count or none"),
    )
    ssl_certfile: str | None = field(default=None, metadata=_network("certificate for https, a PEM file"))
    ssl_keyfile: str | None = field(default=None, metadata=_network("its private key, a PEM file"))
    lazy: bool = field(default=False, metadata=_models("load each model when it is first asked for"))
    warm_up: bool = field(
        default=True, metadata=_models("compile the programs of all batch sizes before the server is ready")
    )
    model_memory_gb: float | None = field(
        default=None,
        metadata=_models("memory for parameters; models that are not in use are released for others", kind="number"),
    )
    batch_size: int = field(default=8, metadata=_models("windows that are decoded together, at most", kind="some"))
    encoder_cache_mb: float = field(
        default=256.0, metadata=_models("memory for the encoder's results of recent windows; 0: none")
    )
    max_requests: int = field(
        default=1000, metadata=_limits("requests that are taken at a time; more are refused", kind="some")
    )
    samples_memory_gb: float = field(
        default=1.0, metadata=_limits("memory for decoded audio that waits; more is kept on disk")
    )
    stop_after_s: float = field(
        default=30.0, metadata=_limits("seconds that requests have to finish after SIGTERM or Ctrl-C")
    )


_LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
_OF_MODELS = (
    *("model_dir", "tokenizer", "revision", "token", "device", "devices", "mesh"),
    *("dtype", "weights", "kv_cache_dtype", "threads"),
)
_SHARED = {
    flag.dest: flag
    for flag in map(flag_of, options_of(CommandOptions).values())
    if flag.dest in (*_OF_MODELS, "compilation_cache")
} | {name: flag_of(options_of(CallOptions)[name]) for name in ("audio_ctx", "masked_heads", "draft", "readers")}
_SETTINGS = [flag_of(one) for one in options_of(ServerSettings).values()]
_OWN = [*map(flag_of, options_of(ServeOptions).values()), *_SETTINGS]


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=f"{NAME} serve",
        usage="%(prog)s [options]",
        description="Serve OpenAI's audio API, and a page to speak to, on this machine.",
        formatter_class=Help,
        add_help=False,
    )
    groups: dict[str, list[Flag]] = {}
    for flag in _OWN:
        groups.setdefault(flag.option.group, []).append(flag)
    groups["models"] += _SHARED.values()
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        if title == "models":
            group.add_argument(
                "--model",
                action="append",
                metavar="NAME",
                help="tiny, large-v3 ...; a repository; a folder or file; NAME=FOLDER names it in requests. Several "
                "are given one by one: --model base --model tiny.en; the first is also whisper-1 (default: turbo)",
            )
        for flag in flags:
            add_option(group, flag if flag.default != () else flag._replace(default=None))
    group = parser.add_argument_group("help")
    group.add_argument("--traceback", action="store_true", help="show where in the program an error happened")
    group.add_argument("--help", "-h", action="help", help="show this and leave")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command -> its exit status: 0 after SIGTERM or Ctrl-C. Wrong usage raises SystemExit(2)."""
    return run_command(argv, build_parser(), parse_spelled, _run, as_flags)


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    require_packages("the server", "serve", "fastapi", "uvicorn", "python_multipart", "prometheus_client")
    check_devices(parser, args)
    names = args.model or ["turbo"]
    try:
        named = dict(map(_named, names))
        if len(named) < len(names):
            raise ValueError(f"--model {' --model '.join(names)}: two models have one name; use NAME=FOLDER")
        settings = _settings(args)
    except ValueError as error:
        parser.error(one_line(error))
    device = start(args.threads, args.compilation_cache, args.device)
    import jax

    jax.config.update("jax_default_device", device)  # for all threads
    slots = [_slot(name, source, args, settings, device) for name, source in named.items()]
    return asyncio.run(_serve(slots, args, settings))


def _settings(args: argparse.Namespace) -> ServerSettings:
    """Raises ValueError. Keys may come from the environment, which no list of processes shows."""
    found = {flag.dest: getattr(args, flag.dest) for flag in _SETTINGS}
    if found["api_keys"] is None and (keys := os.environ.get("WHISPER_NNX_API_KEYS")):
        found["api_keys"] = tuple(key for part in keys.split(",") if (key := part.strip()))
    if found["allowed_hosts"] is not None or _is_loopback(args.host):
        own = f"[{args.host}]" if ":" in args.host else args.host
        found["allowed_hosts"] = (*_LOCAL_HOSTS, own, *(found["allowed_hosts"] or ()))
    return ServerSettings(**{name: value for name, value in found.items() if value is not None or name.endswith("_s")})


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _named(model: str) -> tuple[str, str]:
    """The name in requests, and what to load."""
    name, equals, source = model.partition("=")
    if equals:
        return name, source
    return (Path(model).name if Path(model).exists() else model), model


def _slot(name: str, source: str, args: argparse.Namespace, settings: ServerSettings, device: Any) -> ModelSlot:
    from whisper_nnx.serving.models import ModelSlot, programs_of
    from whisper_nnx.transcription.language_models import with_lm
    from whisper_nnx.transcription.options import TranscribeOptions
    from whisper_nnx.transcription.warmup import warmup
    from whisper_nnx.transcription.windows import tokenizer_of

    usual = TranscribeOptions.of(word_timestamps=True, **settings.language_model)
    sizes = [2**i for i in range(args.batch_size.bit_length()) if 2**i < args.batch_size] + [args.batch_size]

    def load() -> Any:
        model = load_named_model(source, args, device)
        with_lm(tokenizer_of(model), usual)  # a file that cannot be used ends the command
        if args.warm_up:
            warmup(model, sizes, usual)
        return model

    slot = ModelSlot(name, load, sizes, round(args.encoder_cache_mb * 2**20))
    if args.warm_up:
        slot.compile, slot.compiled = lambda model, options: warmup(model, sizes, options), programs_of(usual)
    return slot


async def _serve(slots: list[ModelSlot], args: argparse.Namespace, settings: ServerSettings) -> int:
    import jax

    from whisper_nnx.serving.app import create_app
    from whisper_nnx.serving.request_log import write_log
    from whisper_nnx.serving.scheduler import Scheduler

    listening = _listen(args.host, args.port)
    memory = args.model_memory_gb
    scheduler = Scheduler(
        slots,
        max_requests=args.max_requests,
        memory_bytes=None if memory is None else round(memory * 2**30),
        samples_bytes=round(args.samples_memory_gb * 2**30),
        readers=reader_processes(jax.default_backend()) if args.readers is None else args.readers,
    )
    app = create_app(scheduler, settings)
    write_log("uvicorn", "asyncio")
    server = _http_server(app, scheduler, args, settings)
    serving = asyncio.create_task(server.serve([listening]))
    wyoming = None
    if args.wyoming_port is not None:
        from whisper_nnx.serving.wyoming import serve_wyoming

        wyoming = await serve_wyoming(app.state.serving, _listen(args.host, args.wyoming_port))
    loading = asyncio.create_task(_load(scheduler, [] if args.lazy else slots))
    try:
        await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            scheme, (host, port) = "https" if args.ssl_certfile else "http", listening.getsockname()[:2]
            say(f"ready: {scheme}://{host}:{port} serves {', '.join(slot.name for slot in slots)}")
            await serving
    finally:
        loading.cancel()
        if wyoming is not None:
            wyoming.close()
        server.should_exit = True
        await serving
        await scheduler.close(0)
    if scheduler.is_occupied:  # Python would wait for the thread
        sys.stderr.flush()
        os._exit(0)
    return 0


def _http_server(
    app: FastAPI, scheduler: Scheduler, args: argparse.Namespace, settings: ServerSettings
) -> uvicorn.Server:
    """A server whose orderly end closes the scheduler."""
    import uvicorn

    from whisper_nnx.serving.connections import connection_class, raise_file_limit

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:  # SIGTERM is an orderly end
            before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            closing = asyncio.create_task(scheduler.close(args.stop_after_s))
            await super().shutdown(sockets)
            await closing

    config = uvicorn.Config(
        app,
        http=connection_class(settings.upload_timeout_s, raise_file_limit() * 3 // 4),
        ws="none",
        ssl_certfile=args.ssl_certfile,
        ssl_keyfile=args.ssl_keyfile,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=max(1, round(args.stop_after_s + 1)),  # the scheduler ends requests before that
    )
    return Server(config)


async def _load(scheduler: Scheduler, slots: Sequence[ModelSlot]) -> None:
    for slot in slots:
        say(f"loading {slot.name}")
        await scheduler.load(slot.name)
    scheduler.ready = True


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot listen on {host}, port {port}: {reason}; choose another --host or --port") from None
