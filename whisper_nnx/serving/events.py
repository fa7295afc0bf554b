"""The events of a transcription that is streamed (server-sent events), as OpenAI's API names them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, suppress
from typing import Any

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from whisper_nnx.output.results import Segment
from whisper_nnx.serving.errors import ApiError
from whisper_nnx.serving.responses import (
    diarized_segment,
    language_name,
    logprobs,
    to_json,
    tokens_used,
    verbose_segment,
    warning_headers,
)
from whisper_nnx.serving.run import Run

_LAST_S = 5  # for the last words to a client


class EventStream(Response):
    """Sends the events of a run that has started; then closes `owned`."""

    media_type = "text/event-stream"

    def __init__(self, run: Run, owned: AsyncExitStack):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers | warning_headers([*run.asked.warnings, *run.job.warnings]))
        del self.headers["content-length"]
        self._run, self._owned = run, owned

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        run = self._run

        def sent(data: bytes) -> Awaitable[None]:
            return send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})

        async with self._owned:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async for event in events(run):
                    await run.within_limits(sent(to_json(event)))
                await run.within_limits(sent(b"[DONE]"))
            except ApiError as error:  # too late for another status
                scope.setdefault("log", {})["error"] = error.message
                with suppress(TimeoutError):  # of a client that does not read
                    await asyncio.wait_for(sent(to_json(error.body)), _LAST_S)
            with suppress(TimeoutError):
                await asyncio.wait_for(send({"type": "http.response.body", "body": b"", "more_body": False}), _LAST_S)


async def events(run: Run) -> AsyncIterator[dict[str, Any]]:
    """A delta and a segment for each segment, then one event with the whole; its text is that of all deltas."""
    asked, texts = run.asked, _Deltas()
    probabilities: list[dict[str, Any]] = []
    async for segments in run:
        for segment in segments:
            found = logprobs(run.job, [segment]) if asked.logprobs else []
            probabilities += found
            if delta := texts.add(segment["text"]):
                event: dict[str, Any] = {"type": "transcript.text.delta", "delta": delta}
                if asked.logprobs:
                    event["logprobs"] = found
                if asked.format == "diarized_json":
                    event["segment_id"] = f"seg_{segment['id']}"
                yield event
            yield _segment_event(segment, run)
    done: dict[str, Any] = {
        "type": "transcript.text.done",
        "text": texts.whole,
        "usage": tokens_used(run.job),
        "languages": [{"code": run.job.language}],
        "language": language_name("en" if asked.task == "translate" else run.job.language),
        "duration": float(run.job.duration_s),
    }
    if asked.logprobs:
        done["logprobs"] = probabilities
    yield done


def _segment_event(segment: Segment, run: Run) -> dict[str, Any]:
    event = diarized_segment(segment, run.asked)
    if run.asked.format != "diarized_json":
        event = verbose_segment(segment) | event | {"text": segment["text"]}
    if run.asked.words:
        event["words"] = segment.get("words", [])
    return event


class _Deltas:
    """Texts that join to the whole without spaces around it."""

    def __init__(self) -> None:
        self.whole = ""
        self._space = ""

    def add(self, text: str) -> str:
        text = self._space + text
        kept = text.rstrip()
        if not self.whole:
            kept = kept.lstrip()
        if not kept:
            self._space = text if self.whole else ""
            return ""
        self._space = text[len(text.rstrip()) :]
        self.whole += kept
        return kept
