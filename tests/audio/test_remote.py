"""Recordings with a URL, from a real HTTP server and from fsspec's memory."""

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest

from tests.audio.test_loading import as_int16, tone, write_wav
from whisper_nnx import load_audio
from whisper_nnx.audio.remote import name_of
from whisper_nnx.audio.rules import AudioError
from whisper_nnx.cli.inputs import find_inputs
from whisper_nnx.jobs.inputs import read_input


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("site")
    write_wav(folder / "a.wav", as_int16(tone(0.5)))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", folder
        server.shutdown()
        thread.join()


def test_a_recording_is_loaded_from_its_address(site):
    url, folder = site
    np.testing.assert_array_equal(load_audio(f"{url}/a.wav?token=1"), load_audio(folder / "a.wav"))


def test_what_cannot_be_opened_is_one_line(site):
    url, _ = site
    for bad, error, message in (
        (f"{url}/b.wav", FileNotFoundError, f"{url}/b.wav: not found; check the address"),
        ("nothing://a.wav", AudioError, "nothing://a.wav cannot be opened: Protocol not known: nothing"),
        ("http://127.0.0.1:1/a.wav", (OSError, FileNotFoundError), "http://127.0.0.1:1/a.wav"),
    ):
        with pytest.raises(error, match=message):
            load_audio(bad)


def test_outputs_have_the_name_in_the_address():
    assert name_of("https://example.org/talks/a.b.mp3?key=x/y#t") == "a.b.mp3"
    [one], problems = find_inputs(["https://example.org/talks/a.b.mp3?key=x/y"])
    assert (one.stem, problems) == ("a.b", [])


def test_a_job_reads_folders_and_patterns_elsewhere(tmp_path):
    files = fsspec.filesystem("memory")
    data = write_wav(tmp_path / "a.wav", as_int16(tone(0.5))).read_bytes()
    for name in ("x.wav", "deep/y.wav", ".hidden.wav", "notes.txt"):
        files.pipe(f"/talks/{name}", data)
    found = list(read_input("memory://talks"))
    assert [(one.audio, one.size) for one in found] == [
        ("memory:///talks/deep/y.wav", len(data)),
        ("memory:///talks/x.wav", len(data)),
    ]
    [matched] = read_input("memory://talks/*.wav")
    assert matched == found[1]
    assert len(load_audio(matched.audio)) == 8000
