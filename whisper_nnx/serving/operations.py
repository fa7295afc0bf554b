"""Routes for those who run a server: `/health`, `/health/live`, `/health/ready`, `/metrics`; and who may use it."""

from __future__ import annotations

import secrets

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from whisper_nnx.serving.errors import ApiError
from whisper_nnx.serving.metrics import CONTENT_TYPE
from whisper_nnx.serving.run import serving_of

health = APIRouter()
metrics = APIRouter()


def require_key(request: Request) -> None:
    """Raises ApiError where the server has keys and the request names none of them."""
    keys = serving_of(request).settings.api_keys
    if not keys:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    given = given.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
    # Headers are read as Latin-1. All are compared: the time that it takes tells nothing.
    matches = [secrets.compare_digest(given.encode("latin-1"), key.encode()) for key in keys]
    if not any(matches):
        fault = "is wrong" if given else "is missing"
        message = f"the API key {fault}; send a valid one in the header: Authorization: Bearer KEY"
        raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


@health.get("/health/live", summary="Whether the server works")
@health.get("/health", summary="Whether the server works")
async def live(request: Request) -> Response:
    alive = serving_of(request).scheduler.alive
    return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)


@health.get("/health/ready", summary="Whether requests are taken")
async def ready(request: Request) -> Response:
    scheduler = serving_of(request).scheduler
    accepting = scheduler.accepting
    state = "ready" if accepting else "stopping" if scheduler.ready else "starting"
    return JSONResponse({"status": state, "models": list(scheduler.stats.models)}, 200 if accepting else 503)


@metrics.get("/metrics", summary="Counters for Prometheus")
async def scrape(request: Request) -> Response:
    return Response(serving_of(request).metrics.text(), media_type=CONTENT_TYPE)
