"""The page in a real browser, against a server with tiny.en in this process. Run on request: see CONTRIBUTING.md.

CHROMIUM names the browser, by default /usr/bin/chromium.
"""

import os

import pytest
from playwright.sync_api import sync_playwright

from tests.serving.server import started
from whisper_nnx import load_model
from whisper_nnx.serving.settings import ServerSettings

KEY = "secret"


@pytest.fixture(scope="session")
def tiny_en(real_tiny_en):
    return {"tiny.en": load_model(real_tiny_en)}


@pytest.fixture(scope="session")
def server(tiny_en):
    with started(tiny_en) as server:
        yield server.url


@pytest.fixture
def locked_server(tiny_en):
    """Asks for KEY."""
    with started(tiny_en, ServerSettings(api_keys=(KEY,))) as server:
        yield server.url


@pytest.fixture(scope="session")
def browser(shared):
    """Chromium, whose microphone plays a recording."""
    speech = shared / "real" / "audio" / "en_lj_8s.wav"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"),
            args=[
                "--use-fake-device-for-media-stream",
                "--use-fake-ui-for-media-stream",
                f"--use-file-for-fake-audio-capture={speech}",
                "--autoplay-policy=no-user-gesture-required",
            ],
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, server):
    """Opens the page in a browser without history; fails the test on any error of a script."""
    contexts, errors = [], []

    def open_page(address=server, script=None, **context):
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context}))
        if script:
            contexts[-1].add_init_script(script)
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


@pytest.fixture
def page(open_page):
    page = open_page()
    page.locator("#server[data-state=ready]").wait_for()
    return page
