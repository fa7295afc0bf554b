"""What precedes all routes: from which hosts and pages a request may come, and HEAD."""

from __future__ import annotations

from fnmatch import fnmatchcase
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from whisper_nnx.serving.errors import ApiError
from whisper_nnx.serving.settings import ServerSettings


class CheckOrigin:
    """Refuses requests that a foreign web page may have caused, where nothing else would: pages need no key here.

    A page can name its own host as this server's address (DNS rebinding): its requests then have a foreign Host. It can
    also post a form, which browsers do without asking the server: such a request has a foreign Origin.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (fault := _fault(scope, scope["app"].state.serving.settings)):
            scope.setdefault("log", {})["error"] = fault
            await ApiError(403, fault, code="forbidden").response()(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _fault(scope: Scope, settings: ServerSettings) -> str:
    headers = Headers(scope=scope)
    if not _is_allowed_host(headers.get("host", ""), settings):
        host = headers["host"][:100]
        return f"the host {host!r} is not among the server's --allowed_hosts; use localhost, or have it added there"
    if scope["method"] in ("GET", "HEAD", "OPTIONS") or settings.api_keys:
        return ""
    origin = headers.get("origin", "")
    if not _is_foreign(headers) or origin in settings.cors_origins or "*" in settings.cors_origins:
        return ""
    return f"the page {origin[:100] or 'of another site'} is not among the server's --cors_origins; have it added there"


def _is_allowed_host(host: str, settings: ServerSettings) -> bool:
    """A request without a host comes from no browser."""
    if not settings.allowed_hosts or not host:
        return True
    name = _host_name(host)
    return bool(name) and any(fnmatchcase(name, _host_name(allowed)) for allowed in settings.allowed_hosts)


def _host_name(host: str) -> str:
    """Without a port and brackets; "" where it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_foreign(headers: Headers) -> bool:
    """Browsers name the origin of all requests but GET; a proxy may change the host, but not sec-fetch-site."""
    if site := headers.get("sec-fetch-site"):
        return site not in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is not None and urlsplit(origin).netloc.lower() != headers.get("host", "").lower()


class AnswerHead:
    """Answers HEAD as GET, without the content."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        as_get = {**scope, "method": "GET"}
        try:
            await self._app(as_get, receive, send_head)
        finally:
            scope["route"] = as_get.get("route")
