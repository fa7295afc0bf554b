"""OpenAI's files by name, from a local server: verified, resumed, cached."""

import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import weight_loader.download
from tests.small import small_model
from weight_loader import CheckpointError, load_model, save_model
from weight_loader.download import SHA256, URL_VARIABLE, address_of, download
from weight_loader.hub import checkpoint_path
from whisper_nnx.model.config import ALIASES, RELEASED

CONTENT = bytes(range(256)) * 5000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class _Server(BaseHTTPRequestHandler):
    """Serves /KIND/DIGEST/NAME; the kind selects the behavior."""

    content = CONTENT

    def do_GET(self):
        kind = self.path.split("/")[1]
        self.server.asked.append((self.path, self.headers["Range"]))
        content = {"other": b"not what was promised"}.get(kind, self.content)
        if kind == "gone":
            self.send_error(404)
            return
        start = 0
        if kind != "no_ranges" and (span := self.headers["Range"]):
            start = int(re.fullmatch(r"bytes=(\d+)-", span)[1])
            if start >= len(content):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = len(content) // 2 if kind == "breaks" and not start else len(content)
        self.wfile.write(content[start:end])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), _Server) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def address(server, kind: str = "good", digest: str = DIGEST) -> str:
    return f"http://127.0.0.1:{server.server_port}/{kind}/{digest}/any.pt"


@pytest.mark.parametrize("kind", ["good", "no_ranges"])
def test_a_file_is_downloaded_once_and_verified(server, tmp_path, kind):
    file = download(address(server, kind), tmp_path)
    assert file == tmp_path / "any.pt"
    assert file.read_bytes() == CONTENT
    assert download(address(server, kind), tmp_path) == file
    assert len(server.asked) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["any.pt"]


@pytest.mark.parametrize(("kind", "again"), [("breaks", 1), ("no_ranges", 0)])
def test_an_interrupted_download_is_resumed(server, tmp_path, kind, again):
    if kind == "breaks":
        with pytest.raises(
            CheckpointError, match=r"cannot download .* \(.*\); check the network and the disk, then try again"
        ):
            download(address(server, kind), tmp_path)
    else:
        (tmp_path / f"any.pt.{DIGEST[:16]}.partial").write_bytes(CONTENT[:1000])
    assert download(address(server, kind), tmp_path).read_bytes() == CONTENT
    assert server.asked[-1][1] is not None


def test_a_complete_partial_file_is_used(server, tmp_path):
    (tmp_path / f"any.pt.{DIGEST[:16]}.partial").write_bytes(CONTENT)
    assert download(address(server), tmp_path).read_bytes() == CONTENT


def test_a_wrong_digest_is_rejected_and_not_kept(server, tmp_path):
    with pytest.raises(CheckpointError, match=r"has the SHA-256 \w{64} instead of the one in its URL; try again"):
        download(address(server, "other"), tmp_path)
    assert [entry.suffix for entry in tmp_path.iterdir()] == [".lock"]


def test_a_damaged_file_in_the_cache_is_downloaded_again(server, tmp_path):
    (tmp_path / "any.pt").write_bytes(b"half of")
    assert download(address(server), tmp_path).read_bytes() == CONTENT


def test_failed_downloads_are_reported_in_one_line(server, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"cannot download .*gone/.*any.pt \(HTTP 404 Not Found\)"):
        download(address(server, "gone"), tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot download .* \(.*refused.*\); check the network"):
        download(f"http://127.0.0.1:9/{DIGEST}/any.pt", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="does not exist and HF_HUB_OFFLINE is set; unset it once"):
        download(address(server), tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "http://example.org/model.pt",
        f"file:///tmp/{DIGEST}/model.pt",
        f"https://example.org/{DIGEST}/..",
        f"https://example.org/{DIGEST}/a/../../b.pt",
        f"https://example.org/{DIGEST}/model.pt?x",
    ],
)
def test_urls_without_a_digest_are_rejected(name):
    assert address_of(name) is None
    with pytest.raises((CheckpointError, FileNotFoundError), match=r"download it yourself|does not exist"):
        checkpoint_path(name)


def test_every_released_size_except_the_first_large_has_a_url(monkeypatch):
    assert {name.removesuffix(".pt") for name in SHA256} == RELEASED.keys() - ALIASES.keys()
    assert all(address_of(name).startswith("https://openaipublic.azureedge.net/") for name in SHA256)
    monkeypatch.setenv(URL_VARIABLE, "http://mirror/")
    assert address_of("tiny.pt") == f"http://mirror/{SHA256['tiny.pt']}/tiny.pt"


def test_a_name_loads_openais_file_from_a_mirror(server, tmp_path, monkeypatch):
    save_model(small_model(encoder_ffn_dim=64, decoder_ffn_dim=64), tmp_path / "saved.pt", "openai")
    save_model(small_model(), tmp_path / "hf")
    monkeypatch.setattr(_Server, "content", (tmp_path / "saved.pt").read_bytes())
    digest = hashlib.sha256(_Server.content).hexdigest()
    monkeypatch.setitem(weight_loader.download.SHA256, "tiny.pt", digest)
    monkeypatch.setenv(URL_VARIABLE, f"http://127.0.0.1:{server.server_port}/good")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    model = load_model("tiny.pt", tokenizer=tmp_path / "hf")
    assert model.config.d_model == 16
    assert Path("cache/whisper/tiny.pt").is_file()
    assert server.asked[0][0] == f"/good/{digest}/tiny.pt"
