"""Clients that hold connections without using them; with a trivial application."""

import asyncio
import socket
import threading
import time

import pytest
import uvicorn

from whisper_nnx.serving.connections import connection_class, raise_file_limit

IDLE_S, MOST = 0.4, 8


async def _app(scope, receive, send) -> None:
    await asyncio.sleep(2 * IDLE_S if scope["path"] == "/slow" else 0)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"answer"})


@pytest.fixture(scope="module")
def address():
    config = uvicorn.Config(
        _app, port=0, http=connection_class(IDLE_S, MOST), ws="none", lifespan="off", log_config=None
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()
    server.should_exit = True
    thread.join()


def is_closed(client: socket.socket, within_s: float) -> bool:
    client.settimeout(within_s)
    try:
        return not client.recv(100)
    except ConnectionError:
        return True
    except TimeoutError:
        return False


def get(address, path: bytes = b"/") -> bytes:
    with socket.create_connection(address, timeout=5) as client:
        client.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return b"".join(iter(lambda: client.recv(1000), b""))


@pytest.mark.parametrize("sent", [b"", b"G", b"GET / HTTP/1.1\r\nHost: x\r\nX-Half: "])
def test_a_connection_without_a_request_is_closed(address, sent) -> None:
    with socket.create_connection(address) as client:
        client.sendall(sent)
        assert not is_closed(client, IDLE_S / 2)
        assert is_closed(client, 5)


def test_a_response_may_take_longer_than_that(address) -> None:
    assert b"answer" in get(address, b"/slow")


def test_a_body_that_nothing_reads_ends_the_connection(address) -> None:
    with socket.create_connection(address, timeout=5) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")

        def send_on() -> None:
            for _ in range(500):
                client.sendall(b"5\r\n12345\r\n")
                time.sleep(0.01)

        with pytest.raises(ConnectionError):
            send_on()


def test_idle_connections_make_room_for_others(address) -> None:
    idle = [socket.create_connection(address) for _ in range(3 * MOST)]
    assert b"answer" in get(address)
    assert is_closed(idle[0], 0.1)
    for client in idle:
        client.close()


def test_the_limit_of_open_files_is_raised() -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        allowed = raise_file_limit()
        assert allowed == resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 512
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
