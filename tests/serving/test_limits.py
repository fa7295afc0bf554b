"""Who may use the server, how much, and what is left of requests that end early."""

import errno
import json
import logging
import os
import socket
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace

import openai
import pytest

from tests.serving.server import recording, started
from tests.small import quick_compilation as quick_compilation
from tests.small import small_model
from whisper_nnx.serving.settings import ServerSettings
from whisper_nnx.serving.uploads import Upload

WAV = recording(1.0)
LONG = recording(600, level=0.01)  # hundreds of windows
FIELDS = {
    "model": "small",
    "language": "en",
    "temperature_increment_on_fallback": "none",
    "no_speech_threshold": "none",
}


@pytest.fixture(scope="module")
def server():
    settings = ServerSettings(cors_origins=["https://talk.example"])
    with started({"small": small_model()}, settings, max_requests=2) as server:
        yield server


@contextmanager
def changed(server, **changes):
    """The server, with other settings."""
    state = server.app.state
    before = state.serving
    space = type(before.space)(changes.pop("space", before.space.limit))
    state.serving = before._replace(settings=replace(before.settings, **changes), space=space)
    try:
        yield
    finally:
        state.serving = before


def post(server, data=WAV, path="/v1/audio/transcriptions", **options):
    return server.http.post(path, data=FIELDS, files={"file": ("a.wav", data)}, **options)


def deleted_files() -> set[str]:
    """Open files of this process that have no name: uploads on disk."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            path = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue
        if path.endswith("(deleted)") and "/tmp" in path:
            found.add(f"{number} {path}")
    return found


def wait_until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_idle(server) -> bool:
    return server.scheduler.stats.requests == 0


@contextmanager
def connection(
    server,
    body: bytes,
    stated: int | None = None,
    stream: bool = False,
    path: str = "/v1/audio/transcriptions",
    model: str = "small",
    ended: bool = True,
):
    """A socket that has sent a request, or the beginning of one."""
    form = "".join(
        f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in {**FIELDS, "stream": str(stream), "model": model}.items()
    )
    head = f'{form}--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'.encode()
    content = head + body + (b"\r\n--b--\r\n" if ended else b"")
    length = stated if stated is not None else len(content)
    host, port = server.url.removeprefix("http://").split(":")
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: multipart/form-data; boundary=b"]
    with socket.create_connection((host, int(port))) as sock:
        sock.sendall("\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode() + content)
        yield sock


def test_keys(server) -> None:
    with changed(server, api_keys=("first", "second")):
        for headers in [{}, {"Authorization": "Bearer third"}, {"Authorization": "Basic first"}]:
            response = post(server, headers=headers)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
        with pytest.raises(openai.AuthenticationError):
            server.openai(key="wrong").models.list()
        assert server.openai(key="second").models.list().data
        assert server.http.get("/v1/models", headers={"Authorization": b"Bearer \xff"}).status_code == 401
        for path, status in [("/health", 200), ("/", 200), ("/openapi.json", 200), ("/metrics", 401)]:
            assert server.http.get(path).status_code == status


def test_a_key_may_have_any_letters(server) -> None:
    with changed(server, api_keys=("ключ",)):
        assert server.http.get("/v1/models", headers={"Authorization": "Bearer ключ".encode()}).status_code == 200


def test_large_requests_are_refused_while_they_are_read(server) -> None:
    with changed(server, max_upload_mb=1):
        big = recording(60)  # 1.9 MB
        assert post(server, big).status_code == 413

        def chunks():  # without a length
            content = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + big + b"\r\n--b--"
            yield from (content[i : i + 65536] for i in range(0, len(content), 65536))

        response = server.http.post(
            "/v1/audio/transcriptions",
            content=chunks(),
            headers={"Content-Type": "multipart/form-data; boundary=b"},
        )
        assert response.status_code == 413
        assert "max_upload_mb=1" in response.json()["error"]["message"]
        with pytest.raises(openai.APIStatusError) as error:
            server.openai().audio.transcriptions.create(file=("a.wav", big), model="small")
        assert error.value.status_code == 413
    assert post(server).status_code == 200


def test_the_space_of_all_uploads_is_limited(server) -> None:
    with changed(server, space=1000):
        response = post(server)
        assert (response.status_code, response.headers["retry-after"]) == (429, "30")
        assert server.app.state.serving.space.used == 0


def test_an_upload_that_stands_still_is_ended(server) -> None:
    with changed(server, upload_timeout_s=0.2), connection(server, WAV, stated=10**6) as sock:
        assert sock.recv(100).startswith(b"HTTP/1.1 408")


def test_an_upload_that_drips_is_ended(server) -> None:
    with changed(server, upload_timeout_s=0.3, min_upload_kb_s=100), connection(server, WAV, stated=10**8) as sock:
        sock.setblocking(False)
        end, answer = time.monotonic() + 60, b""
        while not answer:
            assert time.monotonic() < end
            time.sleep(0.05)  # never still, but at 20 bytes a second
            with suppress(BlockingIOError):
                answer = sock.recv(1000)
            with suppress(ConnectionError):
                sock.send(b"x")
    assert answer.startswith(b"HTTP/1.1 408")


def test_what_will_be_refused_is_refused_before_it_is_read(server, monkeypatch) -> None:
    def status(path="/v1/audio/transcriptions", model="small") -> int:
        with connection(server, b"", stated=10**6, path=path, model=model, ended=False) as sock:
            return int(sock.recv(100).split()[1])

    assert status(model="large") == status("/asr?model=large") == 404
    with changed(server, api_keys=("one",)):
        assert status() == 401
    with changed(server, space=10**5):
        assert status() == 429
    with monkeypatch.context() as patch:
        patch.setattr(server.scheduler, "_max_requests", 0)
        assert status() == status("/asr") == status("/inference") == status("/detect-language") == 429
    monkeypatch.setattr(server.scheduler, "ready", False)
    assert status() == 503
    wait_until(lambda: server.app.state.serving.space.used == 0)


def test_a_full_queue_says_when_to_come_again(server) -> None:
    with connection(server, LONG), connection(server, LONG):
        wait_until(lambda: server.scheduler.stats.requests == 2)
        with pytest.raises(openai.RateLimitError) as error:
            server.openai().audio.transcriptions.create(file=("a.wav", WAV), model="small")
        assert int(error.value.response.headers["retry-after"]) >= 1
    wait_until(lambda: is_idle(server))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_cancelled_and_its_upload_deleted(server, stream) -> None:
    before = deleted_files()
    with connection(server, LONG, stream=stream) as sock:
        wait_until(lambda: not is_idle(server))
        if stream:
            assert sock.recv(10)
    wait_until(lambda: is_idle(server))
    wait_until(lambda: deleted_files() == before)
    wait_until(lambda: server.app.state.serving.space.used == 0)


def test_half_an_upload_leaves_nothing(server) -> None:
    before = deleted_files()
    with connection(server, LONG[: 4 << 20], stated=10**8):
        wait_until(lambda: deleted_files() != before)
    wait_until(lambda: deleted_files() == before)
    wait_until(lambda: server.app.state.serving.space.used == 0)


def test_a_request_has_a_time_limit(server) -> None:
    with changed(server, request_timeout_s=0.5):
        response = post(server, LONG)
        assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
        assert response.headers["x-should-retry"] == "false"
        data = {**FIELDS, "stream": "true"}
        events = server.http.post("/v1/audio/transcriptions", data=data, files={"file": LONG}).text
        assert "request_timeout_s=0.5" in events.rstrip().splitlines()[-1]
    wait_until(lambda: is_idle(server))


def test_starting_and_stopping(server, monkeypatch) -> None:
    assert server.http.get("/health/ready").json() == {"status": "ready", "models": ["small"]}
    monkeypatch.setattr(server.scheduler, "ready", False)
    assert server.http.get("/health/ready").status_code == 503
    assert server.http.get("/health/live").status_code == 200
    for response in (server.http.get("/v1/models"), post(server)):
        assert (response.status_code, response.headers["retry-after"]) == (503, "5")


def test_pages_of_other_origins(server) -> None:
    for origin, allowed in [("https://talk.example", "https://talk.example"), ("https://other.example", None)]:
        response = server.http.get("/v1/models", headers={"Origin": origin})
        assert response.headers.get("access-control-allow-origin") == allowed


def test_head_is_get_without_the_content(server) -> None:
    for path in [
        "/",
        "/health",
        "/health/ready",
        "/v1/models",
        "/v1/models/small",
        "/docs",
        "/openapi.json",
        "/metrics",
    ]:
        head, get = server.http.head(path), server.http.get(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == get.headers["content-type"]
    assert server.http.head("/asr").status_code == 405


def logged(caplog) -> list[dict]:
    """The transcriptions; a request of an earlier test may be logged late."""
    lines = [json.loads(message) for message in dict.fromkeys(record.message for record in caplog.records)]
    return [line for line in lines if line["method"] == "POST"]


def test_metrics_and_log(server, caplog, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("whisper_nnx.serving"), "propagate", True)
    with caplog.at_level(logging.INFO, "whisper_nnx.serving"):
        response = post(server)
        post(server, b"nonsense")
        wait_until(lambda: len(logged(caplog)) == 2)
    good, bad = logged(caplog)
    assert good["request"] == response.headers["x-request-id"]
    assert (good["status"], good["audio_s"], good["model"], good["language"]) == (200, 1.0, "small", "en")
    assert good["seconds"] >= good["first_text_s"]
    assert (bad["status"], bad["error"].partition(" ")[0]) == (400, "a.wav")
    assert "error" not in good
    assert response.json()["text"] not in caplog.text
    text = server.http.get("/metrics").text
    for line in [
        'whisper_requests_total{route="/v1/audio/transcriptions",status="400"}',
        "whisper_audio_in_seconds_total ",
        "whisper_first_text_seconds_count ",
        "whisper_real_time_factor_sum ",
        "whisper_rows_busy 0.0",
        'whisper_retries_total{threshold="logprob"} ',
        "whisper_compilations_total ",
    ]:
        assert f"\n{line}" in text


def test_an_unexpected_failure_is_logged_and_hidden(server, monkeypatch, caplog) -> None:
    monkeypatch.setattr(logging.getLogger("whisper_nnx.serving"), "propagate", True)
    monkeypatch.setattr("whisper_nnx.serving.openai_api.Fields", lambda items: 1 / 0)
    response = post(server)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert "ZeroDivisionError" in caplog.text
    assert "division" not in response.text


def test_a_full_disk_is_the_servers_fault(server, monkeypatch) -> None:
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/secret")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    response = post(server, recording(60))
    assert (response.status_code, response.headers["retry-after"]) == (503, "30")
    assert "secret" not in response.text
    assert server.app.state.serving.space.used == 0
    monkeypatch.undo()
    assert post(server).status_code == 200


def test_an_upload_may_be_closed_while_it_is_read() -> None:
    class Slow:
        closed, inside = False, threading.Event()

        def seek(self, *_):
            return 0

        def read(self, size):
            self.inside.set()
            time.sleep(0.05)
            assert not self.closed
            return b"x" * size

        def close(self):
            self.closed = True

    upload = Upload(file := Slow(), "../../etc/\n<b>.wav")
    assert upload.name == "__b_.wav"
    reader = threading.Thread(target=upload.read, args=(3,))
    reader.start()
    file.inside.wait()
    upload.close()
    reader.join()
    assert file.closed
    assert upload.read() == b""


def test_settings_are_checked() -> None:
    assert ServerSettings(api_keys="one").api_keys == ("one",)
    for wrong in [
        {"api_keys": [""]},
        {"max_upload_mb": 0},
        {"max_spool_mb": 9},
        {"request_timeout_s": 0.0},
        {"max_hours": 0},
        {"min_upload_kb_s": -1.0},
    ]:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ServerSettings(**wrong)


def test_a_client_that_does_not_read_its_stream_is_ended(server, monkeypatch) -> None:
    monkeypatch.setattr("whisper_nnx.serving.events._LAST_S", 0.1)
    monkeypatch.setattr("whisper_nnx.serving.events.to_json", lambda content: b"x" * (32 << 20))  # fills all buffers
    with changed(server, request_timeout_s=1.0), connection(server, WAV, stream=True):
        wait_until(lambda: server.app.state.serving.space.used > 0)
        wait_until(lambda: server.app.state.serving.space.used == 0)
    wait_until(lambda: is_idle(server))
