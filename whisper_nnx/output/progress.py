"""Shows progress, a bar on a terminal or a line per minute elsewhere, and reads stated durations of recordings."""

from __future__ import annotations

import io
import math
import os
import stat
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, BinaryIO

from whisper_nnx.audio.arrays import AUDIO_KEYS, Later, is_pair
from whisper_nnx.audio.constants import SAMPLE_RATE
from whisper_nnx.audio.files import open_container
from whisper_nnx.audio.remote import is_remote, open_remote

LINE_EVERY_S = 60.0
_BAR = "{percentage:3.0f}%|{bar}| {done} / {whole} [{elapsed}<{remaining}, {speed}{postfix}]"
_WITHOUT_TOTAL = "{done} [{elapsed}, {speed}{postfix}]"


def clock(seconds: float) -> str:
    """Formats seconds as minutes and seconds, with hours if not zero: 2:05, 1:00:00."""
    whole_s = round(seconds)
    hours, minutes, rest_s = whole_s // 3600, whole_s // 60 % 60, whole_s % 60
    return f"{hours}:{minutes:02d}:{rest_s:02d}" if hours else f"{minutes}:{rest_s:02d}"


class Bar:
    """Context manager that shows progress, speed and remaining time on stderr.

    Args:
      whole: total units; infinite where unknown.
      show: formats a number of units.
      speed: formats units per second.
      start: units done at the start.
      shown: False shows nothing.
      line_start: prefix of each line if stderr is not a terminal.
    """

    def __init__(
        self,
        whole: float,
        show: Callable[[float], str],
        speed: Callable[[float], str],
        *,
        start: float = 0,
        shown: bool = True,
        line_start: str = "whisper-nnx: ",
    ):
        self._show, self._speed, self._line_start = show, speed, line_start
        self._done = self._start = start
        self._whole, self._note = whole, ""
        self._started_s = self._line_s = time.monotonic()
        self._in_lines = shown and not _is_terminal()
        self._last_line: float | None = None  # units done at the last line
        self._bar = _make_bar(self) if shown and not self._in_lines else None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._last_line is not None and self._done > self._last_line:
            self._line()
        self._in_lines = False

    def update(self, done: float, whole: float, note: str = "") -> None:
        self._done, self._whole, self._note = done, whole, note
        if self._bar is not None:
            self._bar.total = whole if math.isfinite(whole) else None
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._bar.n)
        elif self._in_lines and time.monotonic() - self._line_s >= LINE_EVERY_S:
            self._line()

    def write(self, line: str, file: Any = None) -> None:
        """Prints a line, above the bar if there is one."""
        if self._bar is None:
            print(line, file=file, flush=True)
        else:
            self._bar.write(line, file=file)

    def _line(self) -> None:
        self._last_line, self._line_s = self._done, time.monotonic()
        per_second = (self._done - self._start) / max(self._line_s - self._started_s, 1e-9)
        shown, left = self._show(self._done), ""
        if math.isfinite(self._whole):
            percent = 100 * self._done / self._whole if self._whole else 100.0
            shown = f"{percent:.0f} %: {shown} of {self._show(self._whole)}"
            left = f", {clock((self._whole - self._done) / per_second)} left" if per_second else ""
        note = f", {self._note}" if self._note else ""
        print(f"{self._line_start}{shown}, {self._speed(per_second)}{left}{note}", file=sys.stderr, flush=True)


def _is_terminal() -> bool:
    return "ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())


def _make_bar(shown: Bar) -> Any:
    from tqdm import tqdm

    class _Tqdm(tqdm):
        @property
        def format_dict(self) -> dict[str, Any]:
            known = super().format_dict
            elapsed_s, advanced = known["elapsed"], known["n"] - known["initial"]
            rate = known["rate"] or (advanced / elapsed_s if elapsed_s else 0.0)
            texts = {"done": shown._show(known["n"]), "speed": shown._speed(rate)}
            if not math.isfinite(shown._whole):
                return {**known, **texts, "bar_format": _WITHOUT_TOTAL}
            return {**known, **texts, "whole": shown._show(shown._whole)}

    total = shown._whole if math.isfinite(shown._whole) else None
    return _Tqdm(total=total, initial=shown._start, bar_format=_BAR, dynamic_ncols=True, file=sys.stderr)


class AudioProgress:
    """Seconds of audio done over all recordings of a call; neither they nor their share ever decrease.

    stated_s: each recording's stated duration, or None if unknown before it is opened; until then the average of the
    others is used. If a recording turns out longer than stated, the share stays constant until progress catches up.
    None: the number of recordings is unknown, and the total is infinite until `is_complete` is set.
    """

    def __init__(self, stated_s: Sequence[float | None] | None):
        self.is_complete = stated_s is not None
        self._count, self._n_known = len(stated_s or ()), 0
        self._of: dict[int, tuple[float, float]] = {}  # s done and in total of the recordings in progress
        self._done_s, self._known_s = 0.0, 0.0
        self._share = 0.0
        for number, length_s in enumerate(stated_s or ()):
            self.add(number, length_s)

    def add(self, number: int, stated_s: float | None) -> None:
        """A recording's stated duration, which the constructor may not have had."""
        if not self.is_complete:
            self._count += 1
        if stated_s is not None:
            self.set(number, 0.0, stated_s)

    def set(self, number: int, done_s: float, whole_s: float) -> None:
        """Updates a recording's progress and duration in constant time."""
        self._n_known += number not in self._of
        before_s, length_s = self._of.get(number, (0.0, 0.0))
        self._of[number] = done_s, whole_s
        self._done_s += done_s - before_s
        self._known_s += whole_s - length_s

    def forget(self, number: int) -> None:
        """Keeps only the sums of a recording whose progress will not change any more."""
        self._of.pop(number, None)

    def length_s(self, number: int) -> float:
        """Returns a recording's duration in s, or 0 if unknown."""
        return self._of.get(number, (0.0, 0.0))[1]

    def now(self) -> tuple[float, float]:
        """Returns (seconds done, total seconds)."""
        if not self.is_complete:
            return round(self._done_s, 6), math.inf
        whole_s = self._known_s * self._count / max(1, self._n_known)
        if whole_s > 0:
            self._share = max(self._share, self._done_s / whole_s)
        return round(self._share * whole_s, 6), round(whole_s, 6)


def stated_duration_s(
    source: Any, sampling_rate: float | None = None, track: int | None = None, remote: bool = False
) -> float | None:
    """Returns a recording's duration in s from its header or number of samples, without decoding; None if unknown.

    Args:
      source: what `load_audio` takes. A file that cannot be read gives None; loading it reports the error.
      sampling_rate: of an array, in Hz.
      track: index of the file's audio stream.
      remote: whether to ask the server of a URL.
    """
    source, sampling_rate = unwrapped(source, sampling_rate)
    if isinstance(source, Later):
        return source.duration_s
    if hasattr(source, "__array__"):
        return max(getattr(source, "shape", (0,)), default=0) / (sampling_rate or SAMPLE_RATE)
    try:
        if isinstance(source, bytes):
            return _container_s(io.BytesIO(source), track)
        if remote and is_remote(source):
            with open_remote(source) as file:
                return _container_s(file, track)
        if isinstance(source, str | os.PathLike) and source != "-" and stat.S_ISREG(os.stat(source).st_mode):
            with open(source, "rb") as file:
                return _container_s(file, track)
    except Exception:  # loading the recording will report it
        pass
    return None  # also for pipes, which can be read only once


def _container_s(file: BinaryIO, track: int | None) -> float | None:
    with open_container(file) as container:
        streams = container.streams.audio
        audio = streams[track] if track is not None else container.streams.best("audio") or streams[0]
        if audio.duration and audio.time_base:
            return float(audio.duration * audio.time_base)
        return container.duration / 1e6 if container.duration else None


def unwrapped(source: Any, sampling_rate: Any = None) -> tuple[Any, Any]:
    """Returns the array or file inside a dictionary or a pair, without reading it, and the sampling rate."""
    while True:
        if isinstance(source, Mapping):
            sampling_rate = source.get("sampling_rate", sampling_rate)
            source = next((source[key] for key in AUDIO_KEYS if source.get(key) is not None), None)
        elif is_pair(source):
            sampling_rate, source = source if isinstance(source[0], Real) else source[::-1]
        else:
            return source, sampling_rate
