"""OpenAI's audio API: transcriptions, translations and models."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response

from whisper_nnx.serving.asked import OPENAI_FIELDS, TRANSLATION_FORMATS, Asked, ask
from whisper_nnx.serving.events import EventStream
from whisper_nnx.serving.fields import OPTION_FIELDS, SUBTITLE_FIELDS, Fields, schema
from whisper_nnx.serving.job import Job
from whisper_nnx.serving.responses import json_response, response, warning_headers
from whisper_nnx.serving.run import ALIAS, Run, receive_form, serving_of
from whisper_nnx.serving.uploads import Form, Upload

router = APIRouter()
_STARTED = int(time.time())
_OPTIONS = {name: schema(field) for name, field in {**OPTION_FIELDS, **SUBTITLE_FIELDS}.items()}
ERRORS = {
    400: "A bad option, or audio that cannot be read",
    401: "No valid API key",
    404: "Unknown model",
    413: "Too large",
    415: "Not multipart/form-data",
    429: "Too many requests; see Retry-After",
    503: "Starting or stopping",
}
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {
        "description": text,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    for status, text in ERRORS.items()
}
Make = Callable[[Job, Asked, Mapping[str, str]], Response]


def form_body(properties: Mapping[str, Any], required: list[str]) -> dict[str, Any]:
    """A multipart body for OpenAPI."""
    content = {"type": "object", "properties": dict(properties), "required": required}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": content}}}}


FILE = {"type": "string", "format": "binary", "description": "Audio or video in any format that ffmpeg reads."}
_TRANSCRIPTION = {"file": FILE, **OPENAI_FIELDS, **_OPTIONS}
_FORMATS = {"response_format": {**OPENAI_FIELDS["response_format"], "enum": list(TRANSLATION_FORMATS)}}
_TRANSLATION = {name: value for name, value in (_TRANSCRIPTION | _FORMATS).items() if name != "task"}


async def answer(request: Request, form: Form, ask: Callable[[], tuple[Asked, Upload]], make: Make) -> Response:
    """Has a request done; the response is a stream, or made by `make` of the job, what was asked, and headers.

    Closes the form.
    """
    async with AsyncExitStack() as stack:
        stack.callback(form.close)
        asked, audio = await run_in_threadpool(ask)  # a grammar may take a second to read
        run = Run(request, asked, audio)
        stack.push_async_callback(run.close)
        await run.start()
        if asked.stream:
            return EventStream(run, stack.pop_all())
        job = await run.finish()
        return make(job, asked, warning_headers([*asked.warnings, *job.warnings]))


async def _answer(request: Request, translate: bool) -> Response:
    form = await receive_form(request)

    def asked() -> tuple[Asked, Upload]:
        audio = form.file("file")
        found = ask(Fields(form.fields), serving_of(request).settings, translate)
        return found, audio

    return await answer(request, form, asked, response)


@router.post(
    "/v1/audio/transcriptions",
    openapi_extra=form_body(_TRANSCRIPTION, ["file", "model"]),
    responses=ERROR_RESPONSES,
    summary="Transcribe a recording",
)
async def transcriptions(request: Request) -> Response:
    """As in OpenAI's API; the response depends on `response_format` and `stream`."""
    return await _answer(request, translate=False)


@router.post(
    "/v1/audio/translations",
    openapi_extra=form_body(_TRANSLATION, ["file", "model"]),
    responses=ERROR_RESPONSES,
    summary="Translate a recording to English",
)
async def translations(request: Request) -> Response:
    return await _answer(request, translate=True)


@router.get("/v1/models", responses={503: ERROR_RESPONSES[503]}, summary="List the models")
async def models(request: Request) -> Response:
    serving = serving_of(request)
    serving.require_ready()
    names = dict.fromkeys([*serving.scheduler.names, ALIAS])
    return json_response({"object": "list", "data": [_model(name) for name in names]})


@router.get("/v1/models/{name:path}", responses={404: ERROR_RESPONSES[404]}, summary="Describe a model")
async def model(request: Request, name: str) -> Response:
    serving_of(request).model(name)
    return json_response(_model(name))


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": _STARTED, "owned_by": "whisper_nnx"}
