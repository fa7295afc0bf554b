"""`create_app`: the HTTP server, as an ASGI application."""

from __future__ import annotations

from typing import Any

from fastapi import Depends, FastAPI
from fastapi.middleware.cors import CORSMiddleware

from whisper_nnx.serving import openai_api, operations, other_apis
from whisper_nnx.serving.errors import add_handlers
from whisper_nnx.serving.metrics import Metrics
from whisper_nnx.serving.middleware import AnswerHead, CheckOrigin
from whisper_nnx.serving.page_routes import add_page
from whisper_nnx.serving.reference import add_reference
from whisper_nnx.serving.request_log import RequestLog, write_log
from whisper_nnx.serving.run import Serving
from whisper_nnx.serving.scheduler import Scheduler
from whisper_nnx.serving.settings import ServerSettings
from whisper_nnx.serving.uploads import UploadSpace

_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def create_app(scheduler: Scheduler, settings: ServerSettings | None = None) -> FastAPI:
    """The server of a scheduler's models, which the caller closes."""
    settings = settings or ServerSettings()
    about = "OpenAI's audio API, and those of other servers"
    app = FastAPI(title="whisper_nnx", description=about, docs_url=None, redoc_url=None)
    metrics = Metrics(scheduler)
    app.state.serving = Serving(scheduler, settings, metrics, UploadSpace(settings.max_spool_mb << 20))
    add_handlers(app)
    for router in (openai_api.router, other_apis.router, operations.metrics):
        app.include_router(router, dependencies=[Depends(operations.require_key)])
    app.include_router(operations.health)
    add_page(app)
    add_reference(app)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Warning", "Retry-After", "x-request-id"],
        )
    app.add_middleware(CheckOrigin)
    app.add_middleware(AnswerHead)
    app.add_middleware(RequestLog, metrics=metrics)
    write_log()
    _describe_errors(app)
    return app


def _describe_errors(app: FastAPI) -> None:
    """Adds the form of errors to the schema at /openapi.json."""
    whole = app.openapi

    def with_errors() -> dict[str, Any]:
        made = whole()
        made.setdefault("components", {}).setdefault("schemas", {})["Error"] = _ERROR
        return made

    app.openapi = with_errors  # type: ignore[method-assign]
