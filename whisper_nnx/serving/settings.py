"""`ServerSettings`: what a server accepts, and from whom."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from whisper_nnx.audio.constants import MAX_HOURS
from whisper_nnx.audio.options import check_max_hours
from whisper_nnx.decoding.options import DecodingOptions, whole_number
from whisper_nnx.runtime.options import explained, option

_access = partial(option, scope="server", group="access")
_limit = partial(option, scope="server", group="limits")


@explained
@dataclass(frozen=True)
class ServerSettings:
    """Settings of the HTTP server. Raises ValueError for values that cannot be met."""

    api_keys: tuple[str, ...] = field(
        default=(),
        metadata=_access(
            "keys, one of which each request must name (default: no key)",
            kind="texts",
            more="As `Authorization: Bearer KEY`. /health, the page and the documentation need none.",
        ),
    )
    cors_origins: tuple[str, ...] = field(
        default=(),
        metadata=_access("origins whose pages may call the server from a browser; *: all", kind="texts"),
    )
    allowed_hosts: tuple[str, ...] = field(
        default=(),
        metadata=_access(
            "names by which clients may call the server, such as *.example.org (default: localhost on a loopback "
            "address, else any)",
            kind="texts",
        ),
    )
    lm: str | None = field(
        default=None,
        metadata=option(
            "an ARPA file of n-grams over words or tokens, by which all requests prefer text",
            scope="server",
            group="models",
            kind="lm",
        ),
    )
    lm_weight: float = field(
        default=DecodingOptions.lm_weight,
        metadata=option(
            "weight of the language model's log-probabilities, where a request has no lm_weight; 0: no effect",
            scope="server",
            group="models",
        ),
    )
    max_upload_mb: int = field(default=2048, metadata=_limit("largest request, in MB", kind="some"))
    max_spool_mb: int = field(
        default=16_384,
        metadata=_limit("all uploads together, in MB", kind="some", more="Beyond 1 MB, an upload is on disk."),
    )
    max_hours: float = field(
        default=MAX_HOURS, metadata=_limit("longest recording that is decoded, in hours", kind="number")
    )
    max_candidates: int = field(
        default=16, metadata=_limit("most beams or samples of a window that a request may ask for", kind="some")
    )
    request_timeout_s: float | None = field(
        default=3600.0, metadata=_limit("seconds that a request may take once it is uploaded; None: any time")
    )
    upload_timeout_s: float = field(
        default=60.0,
        metadata=_limit(
            "seconds in which an upload must go on", more="A connection without a request is closed after them, too."
        ),
    )
    min_upload_kb_s: float = field(
        default=1.0,
        metadata=_limit(
            "KB a second that an upload must have on average, after the first upload_timeout_s; 0: any rate",
            kind="number",
        ),
    )

    def __post_init__(self):
        for name in ("api_keys", "cors_origins", "allowed_hosts"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        if "" in self.api_keys:
            raise ValueError("api_keys has an empty key, which everybody has; drop it")
        for name in ("max_upload_mb", "max_spool_mb", "max_candidates"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), 1))
        if self.max_spool_mb < self.max_upload_mb:
            raise ValueError(f"max_spool_mb={self.max_spool_mb} has no room for max_upload_mb={self.max_upload_mb}")
        check_max_hours(self.max_hours)
        DecodingOptions(lm=self.lm, lm_weight=self.lm_weight)
        for name in ("request_timeout_s", "upload_timeout_s"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value} must be above 0 s")
        if not self.min_upload_kb_s >= 0:
            raise ValueError(f"min_upload_kb_s={self.min_upload_kb_s} must be 0 KB/s or more")

    @property
    def language_model(self) -> dict[str, Any]:
        """Options of `transcribe` for all requests."""
        return {"lm": self.lm, "lm_weight": self.lm_weight} if self.lm else {}
