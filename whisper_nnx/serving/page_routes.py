"""The page at `/`: static files, which use the same API as any other client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles

from whisper_nnx.text.languages import LANGUAGES

FOLDER = Path(__file__).parent / "page"
HEADERS = {
    # Only the page's own files; blob: is the recording that the player plays.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Permissions-Policy": "microphone=(self)",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # the browser asks each time whether a file has changed
}
# Not from mimetypes: systems map .js to text/plain, which browsers refuse as a module.
_TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}


class _Files(StaticFiles):
    def file_response(self, full_path: Any, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(full_path, *args, **kwargs)
        response.headers.update(HEADERS)
        response.headers["Content-Type"] = f"{_TYPES[Path(full_path).suffix]}; charset=utf-8"
        return response


def add_page(app: FastAPI) -> None:
    """Adds `/` and `/page/...`, which need no API key; the page asks for one where the API does."""

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(FOLDER / "index.html", headers=HEADERS)

    @app.get("/page/languages.json", include_in_schema=False)
    async def languages() -> JSONResponse:
        return JSONResponse(LANGUAGES, headers=HEADERS)

    app.mount("/page", _Files(directory=FOLDER))
