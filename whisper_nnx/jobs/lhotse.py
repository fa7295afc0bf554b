"""Manifests of Lhotse: recordings and cuts, each a line of JSON."""

from __future__ import annotations

import os
from typing import Any

from whisper_nnx.audio.remote import is_remote
from whisper_nnx.jobs.parts import Part, beside

_SAME_S = 1e-3  # two durations
_SOURCES = ("file", "url")


def is_lhotse(row: dict[str, Any]) -> bool:
    """Whether a line is a cut or a recording."""
    return isinstance(row.get("sources"), list) or str(row.get("type")).endswith("Cut")


def lhotse_part(row: dict[str, Any], manifest: str) -> Part:
    """The recording of a line, or the part of it that a cut is. Raises ValueError for one that is no part of a file.

    Paths are relative to the working directory, as Lhotse reads them, or to the folder of the manifest.
    """
    recording = row if "sources" in row else row.get("recording")
    if not isinstance(recording, dict):
        raise ValueError(f"a {row.get('type')} without a recording of its own cannot be transcribed; save it as audio")
    if recording.get("transforms"):
        raise ValueError("its recording is changed by transforms; save it as audio")
    try:
        [source] = recording["sources"]
        name, kind = source["source"], source["type"]
        if kind not in _SOURCES or not isinstance(name, str):
            raise ValueError
        start, duration = float(row.get("start", 0.0)), float(row["duration"])
        whole_s, channels = float(recording["duration"]), list(source["channels"])
        asked = row.get("channel", channels)
        chosen = [channels.index(one) for one in (asked if isinstance(asked, list) else [asked])]
        if not (start >= 0 and duration > 0):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ValueError("a cut or recording must have one source of the type file or url, and times") from None
    place: dict[str, Any] | None = None
    if start or abs(duration - whole_s) > _SAME_S or len(chosen) < len(channels):
        place = {"start": start, "duration": duration}
        place |= {"channels": chosen} if len(chosen) < len(channels) else {}
    path = os.path.abspath(name) if not is_remote(name) and os.path.exists(name) else beside(manifest, name)
    return Part(name, place, path, row.get("id"), duration)
