"""What precedes the routes, and the form of the log; without a socket."""

import asyncio
import json
import logging
import sys

import pytest
from fastapi.testclient import TestClient

from whisper_nnx import Whisper
from whisper_nnx.cli.serve import _settings, build_parser
from whisper_nnx.serving.app import create_app
from whisper_nnx.serving.models import ModelSlot
from whisper_nnx.serving.request_log import JsonLines
from whisper_nnx.serving.scheduler import Scheduler
from whisper_nnx.serving.settings import ServerSettings

HERE = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def status():
    """The status of a request with some settings and headers."""
    scheduler = Scheduler([ModelSlot("small", Whisper, (1,))])  # never loaded
    scheduler.ready = True

    def status(method="POST", settings=None, **headers) -> int:
        app = create_app(scheduler, settings)
        names = {"host": "Host", "origin": "Origin", "site": "Sec-Fetch-Site"}
        sent = {names[name]: value for name, value in headers.items()}
        return (
            TestClient(app, HERE)
            .request(method, "/asr" if method == "POST" else "/v1/models", headers=sent)
            .status_code
        )

    yield status
    asyncio.run(scheduler.close(0))


FOREIGN = [{"origin": "https://evil.example"}, {"origin": "null"}, {"site": "cross-site"}, {"site": "same-site"}]
OWN = [
    {},
    {"origin": HERE},
    {"origin": "https://talk.example"},
    {"site": "same-origin", "origin": "https://behind.proxy"},
]


def test_pages_of_others_may_only_read(status) -> None:
    settings = ServerSettings(cors_origins="https://talk.example")
    assert [status(settings=settings, **headers) for headers in FOREIGN] == [403] * len(FOREIGN)
    assert [status(settings=settings, **headers) for headers in OWN] == [415] * len(OWN)  # there is no form
    assert [status("GET", **headers) for headers in FOREIGN] == [200] * len(FOREIGN)
    assert status(settings=ServerSettings(cors_origins="*"), **FOREIGN[0]) == 415
    assert status(settings=ServerSettings(api_keys="one"), **FOREIGN[0]) == 401


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *((host, 200) for host in ["127.0.0.1:8000", "localhost", "LOCALHOST:80", "[::1]:8000", "a.home.example"]),
        *((host, 403) for host in ["evil.example", "127.0.0.1.evil.example:8000", "home.example", ":80", "[::1"]),
    ],
)
def test_hosts_are_those_allowed(status, host, expected) -> None:
    settings = ServerSettings(allowed_hosts=("localhost", "127.0.0.1", "[::1]", "*.home.example"))
    assert status("GET", settings, host=host) == expected
    assert status("GET", host=host) == 200


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        ([], True),
        (["--host", "localhost"], True),
        (["--host", "0.0.0.0"], False),
        (["--host", "::1", "--allowed_hosts", "whisper.home"], True),
        (["--host", "0.0.0.0", "--allowed_hosts", "whisper.home"], True),
    ],
)
def test_a_loopback_address_has_local_names_alone(status, arguments, refused) -> None:
    settings = _settings(build_parser().parse_args(arguments))
    assert status("GET", settings, host="evil.example") == (403 if refused else 200)
    assert status("GET", settings, host="localhost:8000") == 200
    if "whisper.home" in arguments:
        assert status("GET", settings, host="whisper.home") == 200


def test_all_lines_of_the_log_are_json() -> None:
    record = logging.makeLogRecord(
        {"name": "uvicorn.error", "levelname": "WARNING", "msg": "Invalid %s", "args": ("x",)}
    )
    line = json.loads(JsonLines().format(record))
    assert (line["level"], line["message"]) == ("warning", "Invalid x")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record.exc_info = sys.exc_info()
    assert json.loads(JsonLines().format(record))["traceback"].endswith("two\nlines")
