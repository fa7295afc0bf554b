"""The log, lines of JSON on standard error: one for each request, without any text that was spoken. And metrics."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import sys
import time
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from whisper_nnx.serving.errors import ClientLeft, as_api_error
from whisper_nnx.serving.metrics import Metrics
from whisper_nnx.serving.scheduler import Unavailable

lines = logging.getLogger("whisper_nnx.serving.requests")
LEFT = 499  # the status that stands for a client that left, as in nginx's log
_QUIET = ("/health", "/metrics", "/page", "/docs", "/openapi.json")


class JsonLines(logging.Formatter):
    """The lines of requests as they are; anything else as a line of the same kind."""

    def format(self, record: logging.LogRecord) -> str:
        if record.name == lines.name:
            return record.getMessage()
        line = {"time": _now(), "level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def write_log(*others: str) -> None:
    """Has the lines of the server, and of other loggers, written to standard error, unless these are configured."""
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # the response says what is wrong with a form
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("whisper_nnx.serving", *others):
        if not (log := logging.getLogger(name)).handlers:
            log.addHandler(handler)
            log.setLevel(logging.WARNING if name in others else logging.INFO)
            log.propagate = False


def log_request(**about: Any) -> None:
    lines.info(json.dumps({"time": _now(), **about}))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def note(request: HTTPConnection, **about: Any) -> None:
    """Adds to the line of this request."""
    request.scope.setdefault("log", {}).update(about)


class RequestLog:
    """Logs and counts requests, names each in `x-request-id`, and answers for what failed unexpectedly."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 0
        about = scope.setdefault("log", {})
        name = secrets.token_hex(8)

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = f"req_{name}"
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        except ClientLeft:
            about["left"] = True
        except asyncio.CancelledError:  # uvicorn stops, and the time for that is over
            about["error"] = "stopped"
            if not status:
                await as_api_error(Unavailable("the server has stopped")).response()(scope, receive, send_named)
        except Exception as error:
            about["error"] = type(error).__name__
            if status:
                as_api_error(error)  # logs it
            else:
                await as_api_error(error if not isinstance(error, ValueError) else RuntimeError(error)).response()(
                    scope, receive, send_named
                )
        finally:
            status = LEFT if about.pop("left", False) else status
            self._done(scope, f"req_{name}", status, time.monotonic() - started)

    def _done(self, scope: Scope, name: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.requests.labels(route, str(status)).inc()
        self._metrics.latency_s.labels(route).observe(seconds)
        if scope["path"].startswith(_QUIET):
            return
        log_request(
            request=name,
            client=(scope.get("client") or [None])[0],
            method=scope["method"],
            route=route,
            status=status,
            seconds=round(seconds, 3),
            **scope["log"],
        )
