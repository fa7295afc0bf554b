"""For all tests of the server."""

import threading
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def threads_end() -> Iterator[None]:
    """A server that is closed leaves its threads to finish what they compile; other modules count compilations."""
    yield
    for thread in threading.enumerate():
        if thread.name.startswith(("scheduler", "read", "load")):
            thread.join(120)
            assert not thread.is_alive(), thread
