"""`/docs`: the routes and their fields, as a page without scripts, from the schema at `/openapi.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html import escape
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from whisper_nnx.serving.page_routes import HEADERS

_HEAD = """<!doctype html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <title>whisper_nnx: the API</title>
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <link rel="icon" href="page/icon.svg" type="image/svg+xml">
  <link rel="stylesheet" href="page/style.css">
  <link rel="stylesheet" href="page/reference.css">
  <script src="page/theme.js"></script>
</head>
"""


def add_reference(app: FastAPI) -> None:
    """Adds `/docs`, which needs no API key."""

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(reference(app.openapi()), headers=HEADERS)


def reference(schema: dict[str, Any]) -> str:
    """A page of HTML."""
    routes = [
        (f"{method.upper()} {path}", operation)
        for path, operations in schema["paths"].items()
        for method, operation in operations.items()
    ]
    names = [name for name, _ in routes]
    links = "".join(f'<li><a href="#r{i}">{escape(name)}</a></li>' for i, name in enumerate(names))
    parts = "".join(part for i, (name, operation) in enumerate(routes) for part in _route(f"r{i}", name, operation))
    info = schema["info"]
    about = f"{escape(info.get('description', ''))}. For programs: <a href='openapi.json'>openapi.json</a>."
    return (
        f"{_HEAD}<body><main class='reference'><h1>{escape(info['title'])}: the API</h1>"
        f"<p>{about} Back to <a href='.'>the page</a>.</p>"
        f"<nav aria-label='Routes'><ul>{links}</ul></nav>{parts}</main></body></html>\n"
    )


def _route(anchor: str, name: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f'<section id="{anchor}" class="card"><h2><code>{escape(name)}</code></h2><p>{escape(operation["summary"])}.'
    yield f" {_prose(operation.get('description', ''))}</p>"
    if parameters := operation.get("parameters"):
        rows = [(one["name"], one.get("schema", {}), one.get("required", False)) for one in parameters]
        yield _table("Parameters of the address", rows)
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        body = content["schema"]
        rows = [(field, about, field in body.get("required", ())) for field, about in body["properties"].items()]
        yield _table(f"Fields ({kind})", rows)
    errors = {status: found["description"] for status, found in operation["responses"].items() if status != "200"}
    if errors:
        listed = "".join(f"<dt>{status}</dt><dd>{escape(text)}</dd>" for status, text in errors.items())
        yield f"<h3>Errors</h3><dl>{listed}</dl>"
    yield "</section>"


def _prose(text: str) -> str:
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def _table(title: str, rows: list[tuple[str, dict[str, Any], bool]]) -> str:
    head = "<tr><th>name</th><th>type</th><th>default</th><th>meaning</th></tr>"
    return f"<h3>{escape(title)}</h3><table><thead>{head}</thead><tbody>{''.join(map(_row, rows))}</tbody></table>"


def _row(row: tuple[str, dict[str, Any], bool]) -> str:
    name, about, required = row
    items = about.get("items", {})
    choices = [str(one) for one in about.get("enum") or items.get("enum") or ()]
    kind = " or ".join(choices) or ("file" if about.get("format") == "binary" else {**about, **items}.get("type", ""))
    default = "required" if required else json.dumps(about["default"]).strip('"') if "default" in about else ""
    many = ", several" if items else ""
    cells = escape(kind) + many, escape(default), _prose(about.get("description", ""))
    return f"<tr><th><code>{escape(name)}</code></th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
