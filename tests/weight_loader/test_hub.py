"""The Hugging Face Hub, as the real huggingface_hub meets it: a server on this machine stands for it."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from weight_loader.hub import repository_of

COMMIT = "c0ffee" * 6 + "c0de"
FILES = {
    "config.json": b'{"d_model": 4}',
    "model.safetensors": b"weights",
    "model.fp32-00001-of-00001.safetensors": b"the same weights again",
    "pytorch_model.bin": b"and again",
    "onnx/model.safetensors": b"and again",
    "vocab.json": b"{}",
    "README.md": b"words",
}
OLD = {"config.json": b'{"d_model": 4}', "pytorch_model.bin": b"weights", "flax_model.msgpack": b"the same again"}
LORA = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights", "README.md": b"words"}
ERRORS = {  # by repository: what the Hub answers
    "nobody/nothing": (404, "RepoNotFound"),
    "meta/gated": (403, "GatedRepo"),
    "busy/hub": (500, ""),
}


class _Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        requested = self.path.partition("?")[0].removeprefix("/api/models/").lstrip("/")
        repository, (kind, revision, *rest) = "/".join(requested.split("/")[:2]), requested.split("/")[2:] or (None, "")
        files = {"acme/old": OLD, "acme/lora": LORA}.get(repository, FILES)
        if repository in ERRORS and self.headers["Authorization"] != "Bearer hf_friend":
            self._answer(*ERRORS[repository])
        elif revision not in ("main", COMMIT):
            self._answer(404, "RevisionNotFound")
        elif kind == "revision":
            self._json({"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        elif kind == "tree":
            entry = {"type": "file", "oid": "0" * 40}
            self._json([{**entry, "path": name, "size": len(content)} for name, content in files.items()])
        elif repository == "acme/broken" and rest[-1] == "model.safetensors":
            self._answer(403)
        else:
            self._answer(200, content=files["/".join(rest)], name=rest[-1])

    do_HEAD = do_GET

    def _json(self, content):
        self._answer(200, content=json.dumps(content).encode(), name=".json")

    def _answer(self, status, code="", content=b"", name=""):
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{name}-{len(content)}"')
        self.send_header("Content-Type", "application/json" if name == ".json" else "application/octet-stream")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub():
    """The address of a Hub with one repository, acme/whisper."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def find(
    repository: str, cache: Path, revision: str | None = None, token: str | None = None, **environment: str
) -> str:
    """What `checkpoint_path` returns or raises, in a process of its own: huggingface_hub reads its settings once."""
    code = f"""
from weight_loader.folder import CheckpointError
from weight_loader.hub import checkpoint_path
try:
    print(checkpoint_path({repository!r}, revision={revision!r}, token={token!r}))
except CheckpointError as error:
    print("error:", error)
"""
    root = Path(__file__).parents[2]
    environment = {"HF_HUB_OFFLINE": "0", "HF_TOKEN": "", **environment}
    environment |= {"HF_HOME": str(cache), "PYTHONPATH": str(root), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("tiny", "openai/whisper-tiny"),
        ("base.en", "openai/whisper-base.en"),
        ("large", "openai/whisper-large-v3"),
        ("turbo", "openai/whisper-large-v3-turbo"),
        ("distil-large-v3.5", "distil-whisper/distil-large-v3.5"),
        ("owner/my-whisper", "owner/my-whisper"),
    ],
)
def test_short_names_mean_the_published_repositories(name, repository):
    assert repository_of(name) == repository


def test_a_repository_is_downloaded_once_and_without_what_is_not_needed(hub, tmp_path):
    folder = Path(find("acme/whisper", tmp_path, HF_ENDPOINT=hub))
    assert {file.name for file in folder.rglob("*") if file.is_file()} == {
        "config.json",
        "model.safetensors",
        "vocab.json",
    }
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert find("acme/whisper", tmp_path, HF_ENDPOINT=hub, HF_HUB_OFFLINE="1") == str(folder)


def test_a_repository_without_safetensors_gives_the_next_format_that_it_has(hub, tmp_path):
    folder = Path(find("acme/old", tmp_path, HF_ENDPOINT=hub))
    assert {file.name for file in folder.iterdir()} == {"config.json", "pytorch_model.bin"}
    assert find("acme/old", tmp_path, HF_ENDPOINT=hub, HF_HUB_OFFLINE="1") == str(folder)


def test_a_repository_of_an_adapter_gives_the_adapter(hub, tmp_path):
    folder = Path(find("acme/lora", tmp_path, HF_ENDPOINT=hub))
    assert {file.name for file in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_the_address_of_a_file_gives_that_file_alone(hub, tmp_path):
    file = Path(find(f"{hub}/acme/whisper/resolve/main/onnx/model.safetensors", tmp_path, HF_ENDPOINT=hub))
    assert file.read_bytes() == b"and again"
    assert [other for other in file.parents[1].rglob("*") if other.is_file()] == [file]
    said = find(f"{hub}/acme/whisper/resolve/main/nothing.bin", tmp_path, HF_ENDPOINT=hub)
    assert said.startswith("error: acme/whisper has no file nothing.bin; see ")
    said = find("http://example.org/ggml-tiny.bin", tmp_path, HF_ENDPOINT=hub)
    assert "download it yourself and give the file" in said


def test_a_token_opens_what_is_gated(hub, tmp_path):
    assert Path(find("meta/gated", tmp_path, token="hf_friend", HF_ENDPOINT=hub)).is_dir()


@pytest.mark.parametrize(
    ("repository", "revision", "message"),
    [
        ("nobody/nothing", None, "neither a local folder nor a repository"),
        ("meta/gated", None, "is gated; request access at"),
        ("acme/whisper", "v9", "has no revision 'v9'"),
        ("busy/hub", None, "500"),
        ("acme/broken", None, "403"),
    ],
)
def test_what_the_hub_refuses_is_one_line_that_names_the_fix(hub, tmp_path, repository, revision, message):
    said = find(repository, tmp_path, revision, HF_ENDPOINT=hub)
    assert said.startswith(f"error: {repository} ")
    assert message in said
    assert "\n" not in said


def test_without_a_network_the_line_says_so(tmp_path):
    said = find("acme/whisper", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert said.startswith("error: acme/whisper is not in the cache and cannot be downloaded from http://127.0.0.1:9 (")
    assert "refused" in said
    assert said.endswith("; check the network, or give a folder")
    assert "\n" not in said


def test_offline_and_not_in_the_cache_says_so(tmp_path):
    said = find("tiny", tmp_path, HF_HUB_OFFLINE="1")
    assert said.startswith("error: openai/whisper-tiny is not in the cache and HF_HUB_OFFLINE is set; unset it")
    assert "\n" not in said
