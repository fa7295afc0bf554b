"""Errors as OpenAI's API writes them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from whisper_nnx.runtime.console import one_line
from whisper_nnx.serving.scheduler import Busy, Unavailable, UnknownModel

log = logging.getLogger("whisper_nnx.serving")
_LACKS = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # of the server, not of the request
_NO_RETRY = {"x-should-retry": "false"}  # OpenAI's clients obey it


class ApiError(Exception):
    """An error that the client is to see.

    Args:
      status: of HTTP.
      message: what was wrong with the value, then what to do.
      param: the field at fault.
      code: for programs.
      headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


class ClientLeft(Exception):
    """The client has closed the connection and reads no response."""


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def too_slow(seconds: float) -> ApiError:
    message = f"the request took longer than request_timeout_s={seconds:g}; send a shorter recording"
    return ApiError(504, message, code="timeout", headers=_NO_RETRY)


def unknown_model(name: str, known: list[str]) -> ApiError:
    message = f"the model {name[:100]!r} does not exist; choose from {', '.join(known)}"
    return ApiError(404, message, param="model", code="model_not_found")


def as_api_error(error: Exception) -> ApiError:
    """What a client sees of an exception of the scheduler or of a recording; the rest is logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        headers = {"Retry-After": str(error.retry_after_s)}
        return ApiError(429, str(error), code="rate_limit_exceeded", headers=headers)
    if isinstance(error, Unavailable):
        return ApiError(503, one_line(error), code="unavailable", headers={"Retry-After": "5"})
    if isinstance(error, UnknownModel):
        return ApiError(404, one_line(error).strip("'"), param="model", code="model_not_found")
    if isinstance(error, OSError) and error.errno in _LACKS:
        log.error("a request failed", exc_info=error)
        message = "the server lacks disk space, memory or files at present; try again later"
        return ApiError(503, message, code="unavailable", headers={"Retry-After": "30"})
    if isinstance(error, ValueError | OSError):  # of the recording or of the options
        message = one_line(error)
        named = re.match(r"([a-z]\w*)=", message)
        return bad_request(message, param=named[1] if named else None)
    log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed at this request; its log says why", code="internal_error")


def add_handlers(app: FastAPI) -> None:
    """Has all errors, FastAPI's own too, written in this form."""

    async def own(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        request.scope.setdefault("log", {})["error"] = error.message
        return error.response()

    async def of_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = str(error.detail)
        if error.status_code == 404:
            message = f"there is nothing at {request.method} {request.url.path[:100]}; /docs lists what there is"
        elif error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "another method")
            message = f"{request.method} is not possible at {request.url.path[:100]}; use {allowed}"
        return ApiError(
            error.status_code, message, code=_CODES.get(error.status_code), headers=error.headers
        ).response()

    async def of_validation(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return bad_request(f"{name}: {first['msg']}", name).response()

    app.add_exception_handler(ApiError, own)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(RequestValidationError, of_validation)


_CODES = {404: "not_found", 405: "method_not_allowed"}
