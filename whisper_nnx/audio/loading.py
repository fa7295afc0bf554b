"""Loads recordings as mono float32 samples at 16 kHz: files through PyAV (ffmpeg's libraries), arrays through numpy."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np

from whisper_nnx.audio.arrays import is_array, read_array, unwrap
from whisper_nnx.audio.background import reader_process, warn
from whisper_nnx.audio.constants import FRAMES_PER_SECOND, MAX_HOURS, SAMPLE_RATE
from whisper_nnx.audio.files import read_file
from whisper_nnx.audio.options import check_max_hours
from whisper_nnx.audio.remote import is_remote, open_remote
from whisper_nnx.audio.rules import AudioError

__all__ = ["FRAMES_PER_SECOND", "MAX_HOURS", "SAMPLE_RATE", "AudioError", "load_audio", "load_channels", "pad_or_trim"]

_SHORT_S = 0.1
_MOST_SENT = 1 << 26  # bytes of a file without a path that another process is sent; longer ones are decoded here
OPEN_HINTS = {
    FileNotFoundError: "check the path",
    IsADirectoryError: "name a file in it",
    PermissionError: "make it readable for this user",
}


def load_audio(
    source: Any,
    sampling_rate: float | None = None,
    stream: int | None = None,
    *,
    follow_timestamps: bool = True,
    max_hours: float = MAX_HOURS,
) -> np.ndarray:
    """Loads a recording as mono samples [N], float32 in [-1, 1], at 16 kHz.

    For files the result equals `ffmpeg -i FILE -ac 1 -ar 16000 -acodec pcm_s16le` divided by 32768, as in
    openai-whisper's `load_audio`, except that silence fills gaps between timestamps. Damaged files are read as far as
    possible, with a warning. An array's channels are averaged, and it is resampled (by swresample, like files) without
    rounding to 16 bits. Samples of arrays and of float files are not clipped.

    Args:
      source: a file that ffmpeg can read (path, URL such as https:// or s3://, bytes, binary file object read from its
        current position, "-" for standard input), or an array (numpy, torch, JAX or convertible to numpy): [N],
        [N, channels] or [channels, N], the smaller dimension being the channels, floats in [-1, 1] or integers over
        their whole range. Also (rate, array), (array, rate), a dictionary {"array" or "raw": ..., "sampling_rate": ...}
        or {"bytes" or "path": ...}, and torchcodec's `AudioDecoder`, as returned by `datasets`.
      sampling_rate: of an array, in Hz, by default 16,000; a file states its own.
      stream: index of the file's audio stream, from 0; by default the one that ffmpeg selects (the one with the most
        channels among those marked as default, or among all).
      follow_timestamps: insert silence where a file's timestamps leave a gap of more than 0.1 s, at the start (a video
        whose audio starts late) or later, so that times match the container: ffmpeg's
        `aresample=async=1:first_pts=0`. Overlapping audio is kept. False joins all audio, as openai-whisper does.
      max_hours: the longest recording that is decoded.

    Raises:
      AudioError: the recording cannot be used.
      OSError: the file cannot be opened.

    Warns of digital silence, of less than 0.1 s, and of an array without samples.
    """
    return _load(source, sampling_rate, stream, follow_timestamps, max_hours)[0]


def load_channels(
    source: Any,
    sampling_rate: float | None = None,
    stream: int | None = None,
    *,
    follow_timestamps: bool = True,
    max_hours: float = MAX_HOURS,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the samples [N] of `load_audio` and those of each channel, [channels, N], in one pass."""
    samples, channels = _load(source, sampling_rate, stream, follow_timestamps, max_hours, separate=True)
    assert channels is not None
    return samples, channels


def _load(
    source: Any,
    sampling_rate: float | None,
    stream: int | None,
    follow_timestamps: bool,
    max_hours: float,
    separate: bool = False,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Loads mono samples [N], plus [channels, N] if `separate`."""
    max_s = 3600 * check_max_hours(max_hours)
    source, sampling_rate = unwrap(source, sampling_rate)
    if is_array(source):
        if stream is not None:
            raise AudioError(f"stream={stream} applies to files, not arrays; leave it out")
        name = "the array"
        samples, channels = read_array(source, name, sampling_rate, separate, max_s)
    else:
        if sampling_rate is not None:
            raise AudioError(f"sampling_rate={sampling_rate} applies to arrays; a file states its own; leave it out")
        (samples, channels), name = _read(source, stream, separate, follow_timestamps, max_s)
    if not len(samples):
        warn(f"{name} is empty: it has no samples; is it the right recording?", stacklevel=3)
    elif not samples.any():
        warn(f"{name} is digital silence: all samples are zero; is it the right recording?", stacklevel=3)
    elif len(samples) < _SHORT_S * SAMPLE_RATE:
        duration_ms = 1000 * len(samples) / SAMPLE_RATE
        warn(f"{name} lasts only {duration_ms:.0f} ms; is it the right recording?", stacklevel=3)
    return samples, channels


def _read(source: Any, *options: Any) -> tuple[tuple[np.ndarray, np.ndarray | None], str]:
    """`read_file` of a path, bytes, "-" or a file object, perhaps in another process; and its name for messages."""
    process = reader_process()
    if process is not None and (path := _path(source)) is not None and process.start():
        return process.read(path, path, *options), path
    with open_binary(source) as (file, name):
        if process is not None and _is_short(file) and process.start():
            return process.read(file.read(), name, *options), name
        return read_file(file, name, *options), name


def _path(source: Any) -> str | None:
    """The path of a file that another process finds under it, too; None if `source` is something else."""
    if not isinstance(source, str | os.PathLike) or source == "-" or is_remote(source):
        return None
    path = os.fsdecode(os.fsencode(source))  # a plain string
    return None if os.path.abspath(path).startswith(("/dev/", "/proc/")) else path


def _is_short(file: BinaryIO) -> bool:
    """Whether a file, at whose start it is and stays, is known to be short enough to be sent."""
    if not file.seekable():
        return False
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return size <= _MOST_SENT


def pad_or_trim(waveform: Any, n_samples: int = 30 * SAMPLE_RATE) -> np.ndarray:
    """Pads waveform [..., N] with silence, or trims it, to [..., n_samples]; the default is one window, 30 s."""
    waveform = np.asarray(waveform)[..., :n_samples]
    return np.pad(waveform, [*[(0, 0)] * (waveform.ndim - 1), (0, n_samples - waveform.shape[-1])])


@contextmanager
def open_binary(source: Any) -> Iterator[tuple[BinaryIO, str]]:
    """Opens a path, bytes, "-" or file object as a seekable binary file; yields it and its name for messages."""
    if is_remote(source):
        with open_remote(source) as opened, open_binary(opened) as (file, _):
            yield file, source
    elif isinstance(source, str | os.PathLike) and source != "-":
        try:
            opened = open(source, "rb")  # noqa: SIM115
        except OSError as error:
            hint = OPEN_HINTS.get(type(error))
            reason = f"{os.fspath(source)}: {error.strerror}"
            raise type(error)(f"{reason}; {hint}" if hint else reason) from None
        with opened, open_binary(opened) as file:
            yield file
    elif isinstance(source, bytes | bytearray | memoryview):
        yield io.BytesIO(source), "the given data"
    elif source == "-":
        yield io.BytesIO(sys.stdin.buffer.read()), "standard input"
    elif hasattr(source, "read"):
        name = str(getattr(source, "name", "the file object"))
        if isinstance(source, io.TextIOBase):
            raise AudioError(f"{name} is open as text; open it with mode 'rb'")
        # Some formats store their index at the end, and ffmpeg assumes that the file starts at position 0.
        in_place = hasattr(source, "seekable") and source.seekable() and source.tell() == 0
        yield source if in_place else io.BytesIO(source.read()), name
    else:
        raise AudioError(f"audio of type {type(source).__name__} is not supported; give a path, bytes, file or array")
