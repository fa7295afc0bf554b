"""What a client sees when the time of a server that stops is over."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

from whisper_nnx.serving.request_log import RequestLog


def test_a_request_that_is_cut_off_gets_503() -> None:
    sent: list[dict[str, Any]] = []

    async def send(message) -> None:
        sent.append(message)

    async def main() -> None:
        metrics = SimpleNamespace(requests=MagicMock(), latency_s=MagicMock())
        app = RequestLog(cast(Any, lambda *_: asyncio.sleep(60)), cast(Any, metrics))
        scope = {"type": "http", "path": "/asr", "method": "POST", "headers": []}
        task = asyncio.create_task(app(scope, cast(Any, None), cast(Any, send)))
        await asyncio.sleep(0)
        task.cancel()
        await task

    asyncio.run(main())
    assert sent[0]["status"] == 503
    assert b'"the server has stopped"' in sent[1]["body"]
