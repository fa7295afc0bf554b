"""The page's routes and files; what it does in a browser is tested in tests/browser."""

import re
from html.parser import HTMLParser
from importlib import metadata

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from whisper_nnx.serving.page_routes import FOLDER, add_page
from whisper_nnx.text.languages import LANGUAGES

FILES = sorted(path.name for path in FOLDER.iterdir())


@pytest.fixture(scope="module")
def client():
    app = FastAPI()
    add_page(app)
    return TestClient(app)


class Document(HTMLParser):
    """Files that a document names, its ids, and what its security policy would block."""

    def __init__(self, text: str):
        super().__init__()
        self.files, self.ids, self.blocked, self._in_script = set(), [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if (tag, name) in {("script", "src"), ("img", "src"), ("link", "href")}:
                self.files.add(value)
            if name == "id":
                self.ids.append(value)
            if name == "style" or name.startswith("on"):
                self.blocked.append((tag, name))
        self._in_script = tag in {"script", "style"}

    def handle_endtag(self, tag):
        self._in_script = False

    def handle_data(self, data):
        if self._in_script and data.strip():
            self.blocked.append(data)


DOCUMENT = Document((FOLDER / "index.html").read_text())


@pytest.mark.parametrize("path", ["", *(f"page/{name}" for name in FILES), "page/languages.json"])
def test_every_file_is_served_under_the_policy(client, path):
    response = client.get(f"/{path}")
    assert response.status_code == 200
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert response.headers["x-content-type-options"] == "nosniff"
    kind = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml", "json": "application/json"}
    assert response.headers["content-type"].startswith(kind.get(path.rpartition(".")[2], "text/html"))


def test_an_unchanged_file_is_not_sent_again(client):
    first = client.get("/page/app.js")
    again = client.get("/page/app.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("path", ["/page/none.js", "/page/../page_routes.py", "/page/%2e%2e/page_routes.py", "/page/"])
def test_nothing_else_is_served(client, path):
    assert client.get(path).status_code == 404


def test_the_languages_are_the_tokenizers(client):
    assert client.get("/page/languages.json").json() == LANGUAGES


def test_the_document_keeps_to_its_policy():
    assert DOCUMENT.blocked == []
    assert {f"page/{name}" for name in FILES} >= DOCUMENT.files


@pytest.mark.parametrize("name", FILES)
def test_files_name_only_what_exists_and_nothing_outside(name):
    text = (FOLDER / name).read_text()
    outside = re.findall(r"(?:https?:)?//[\w-]+\.[\w./-]+", text)
    assert set(outside) <= {"http://www.w3.org/2000/svg"}  # a name, which is not fetched
    assert text.count("\n") <= 400
    assert set(re.findall(r'from "\./([^"]+)"', text)) <= set(FILES)
    if name.endswith(".js"):
        assert set(re.findall(r'\$\("([^"]+)"\)', text)) <= set(DOCUMENT.ids)


def test_ids_are_unique():
    assert len(DOCUMENT.ids) == len(set(DOCUMENT.ids))


def test_the_files_are_installed_with_the_package():
    installed = {str(path) for path in metadata.files("whisper-nnx")}
    if "whisper_nnx/__init__.py" in installed:  # not of an editable installation, whose files are these
        assert {f"whisper_nnx/serving/page/{name}" for name in FILES} <= installed
