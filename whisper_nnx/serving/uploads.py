"""Reads the form of a request: its fields, and its file, which is kept in memory or in a file without a name."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from whisper_nnx.serving.errors import ApiError, ClientLeft, bad_request
from whisper_nnx.serving.settings import ServerSettings

_MB = 1 << 20
Items = list[tuple[str, str]]
_MAX_FIELDS, _MAX_FIELD_BYTES = 400, 1 << 16


class UploadSpace:
    """How many bytes the uploads of all requests may take together."""

    def __init__(self, limit: int):
        self.limit, self.used = limit, 0

    def take(self, size: int) -> None:
        """Raises ApiError where there is no space."""
        self.require(size)
        self.used += size

    def require(self, size: int) -> None:
        if self.used + size > self.limit:
            message = f"uploads in progress take up the server's {self.limit // _MB} MB; try again later"
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": "30"})

    def release(self, size: int) -> None:
        self.used -= size


class Upload:
    """An uploaded file, read on another thread, which may be closed at any time: it then ends there.

    Args:
      file: the file.
      name: for messages.
      head: bytes that precede the file's own.
    """

    def __init__(self, file: Any, name: str = "", head: bytes = b""):
        name = re.sub(r"[^\w .()+-]", "_", name.replace("\\", "/").rsplit("/", 1)[-1])[-80:]
        self.name = name or "the upload"
        self.head = head
        self._file = file
        self._position, self._closed = 0, False
        self._lock = threading.Lock()

    def read(self, size: int = -1) -> bytes:
        with self._lock:
            if self._closed:
                return b""
            if self._position < len(self.head):
                data = self.head[self._position :][: size if size >= 0 else None]
                if size < 0:
                    self._file.seek(0)
                    data += self._file.read()
            else:
                self._file.seek(self._position - len(self.head))
                data = self._file.read(size)
            self._position += len(data)
            return data

    def seek(self, offset: int, whence: int = 0) -> int:
        with self._lock:
            if self._closed:
                return self._position
            if whence == 2:
                base = len(self.head) + self._file.seek(0, 2)
            else:
                base = self._position if whence == 1 else 0
            self._position = max(0, base + offset)
            return self._position

    def tell(self) -> int:
        return self._position

    def seekable(self) -> bool:
        return True

    @property
    def size(self) -> int:
        before = self.tell()
        size = self.seek(0, 2)
        self.seek(before)
        return size

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._file.close()


class Form:
    """Fields and files of a request. Closing it deletes the files and frees their space."""

    def __init__(self, fields: Items, files: dict[str, Upload], space: UploadSpace, size: int):
        self.fields, self.files = fields, files
        self.size, self._space, self._held = size, space, size

    def file(self, *names: str) -> Upload:
        """The file of that name; ApiError where there is none."""
        for name in names:
            if name in self.files:
                return self.files[name]
        if any(name == names[0] for name, _ in self.fields):
            raise bad_request(f"{names[0]!r} is text; send it as a file, with a file name", names[0])
        raise bad_request(f"the field {names[0]!r}, the audio file, is missing", names[0])

    def close(self) -> None:
        for upload in self.files.values():
            upload.close()
        self._space.release(self._held)
        self._held = 0


class Pace:
    """How long an upload may take that starts now."""

    def __init__(self, settings: ServerSettings):
        self._started, self._settings = time.monotonic(), settings

    def rest_s(self, size: int) -> float:
        """For the next piece, after `size` bytes."""
        patience_s, rate = self._settings.upload_timeout_s, self._settings.min_upload_kb_s * 1024
        if not rate:
            return patience_s
        return min(patience_s, self._started + patience_s + size / rate - time.monotonic())

    @property
    def fault(self) -> str:
        settings, rate = self._settings, f"{self._settings.min_upload_kb_s:g} KB/s"
        return f"nothing has arrived for {settings.upload_timeout_s:g} s, or less than {rate}"


class _Parser(MultiPartParser):
    """Hands the fields that precede a file to `before_file`, which may raise what refuses the request."""

    def __init__(self, *args: Any, before_file: Callable[[Items], None], **options: Any):
        super().__init__(*args, **options)
        self._before_file = before_file

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        if self._current_part.file is not None:
            self._before_file([(name, value) for name, value in self.items if isinstance(value, str)])


async def read_form(
    request: Request, settings: ServerSettings, space: UploadSpace, before_file: Callable[[Items], None]
) -> Form:
    """Reads a multipart request. The size is counted while reading: a header may be wrong, or missing.

    Raises ApiError, also of `before_file`, which is called with the fields that precede the file; and ClientLeft where
    the connection ends before the request does.
    """
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "multipart/form-data":
        raise ApiError(415, "the request must be multipart/form-data, with the audio as the field 'file'")
    body = _Body(request, settings, space)
    limits = {"max_files": 1, "max_fields": _MAX_FIELDS, "max_part_size": _MAX_FIELD_BYTES}
    parser = _Parser(request.headers, body.chunks(), before_file=before_file, **limits)
    try:
        items = (await parser.parse()).multi_items()
    except BaseException as error:
        space.release(body.size)
        if isinstance(error, MultiPartException):
            raise bad_request(f"the form cannot be read: {error.message}") from None
        if isinstance(error, ClientDisconnect):
            raise ClientLeft from None
        raise
    files = {name: Upload(v.file, v.filename or "") for name, v in items if isinstance(v, UploadFile)}
    return Form([(name, v) for name, v in items if isinstance(v, str)], files, space, body.size)


class _Body:
    def __init__(self, request: Request, settings: ServerSettings, space: UploadSpace):
        self._request, self._settings, self._space = request, settings, space
        self.size = 0

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        limit = self._settings.max_upload_mb * _MB
        stated = self._request.headers.get("content-length", "")
        size = int(stated[:20]) if stated.isdecimal() else 0
        if size > limit:
            raise self._too_large()
        self._space.require(size)
        stream, pace = self._request.stream(), Pace(self._settings)
        while True:
            try:
                chunk = await asyncio.wait_for(anext(stream, b""), pace.rest_s(self.size))
            except TimeoutError:
                raise ApiError(408, f"the upload is too slow: {pace.fault}; send it again") from None
            if not chunk:  # the last one is empty
                return
            if self.size + len(chunk) > limit:
                raise self._too_large()
            self._space.take(len(chunk))
            self.size += len(chunk)
            yield chunk

    def _too_large(self) -> ApiError:
        limit = self._settings.max_upload_mb
        return ApiError(
            413, f"the request is larger than max_upload_mb={limit}; send a compressed or shorter recording"
        )
