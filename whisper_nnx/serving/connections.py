"""Connections of the HTTP server: how many there may be, and how long one may be open without a request."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

_MOST_FILES = 1 << 16


def raise_file_limit() -> int:
    """Lets this process open as many files as the system allows, at most 65,536 -> how many it may open."""
    try:
        import resource
    except ImportError:  # Windows
        return _MOST_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return _MOST_FILES if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def connection_class(idle_s: float, most: int) -> type[asyncio.Protocol]:
    """uvicorn's protocol class, with limits.

    Args:
      idle_s: for which a connection may be open without a complete request header, or go on sending after a response.
      most: connections at a time; one more closes the one that has been without a request for the longest time.
    """
    timers: dict[Any, asyncio.TimerHandle] = {}  # by the time of the last response, or of the connection

    class Connection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            if len(timers) >= most:
                next((other for other in timers if other.is_idle), self).end()
            self.restart_timer()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self.restart_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self.stop_timer()
            super().connection_lost(exc)

        @property
        def is_idle(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def end(self) -> None:
            if self.is_idle:
                self.stop_timer()
                self.transport.abort()

        def restart_timer(self) -> None:
            self.stop_timer()
            if not self.transport.is_closing():
                timers[self] = self.loop.call_later(idle_s, self.end)

        def stop_timer(self) -> None:
            if (timer := timers.pop(self, None)) is not None:
                timer.cancel()

    return Connection
