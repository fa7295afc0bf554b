"""Any recording -> mono float32 samples at 16 kHz: files through PyAV (ffmpeg's libraries), arrays through numpy."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

if TYPE_CHECKING:
    import av

SAMPLE_RATE = 16_000
FRAMES_PER_SECOND = 100  # of the mel spectrogram
_SHORT_S = 0.1
_OPEN_HINTS = {
    FileNotFoundError: "check the path",
    IsADirectoryError: "name a file in it",
    PermissionError: "make it readable for this user",
}


class AudioError(ValueError):
    """A recording that cannot be used; the message is one line: what is wrong, then what to do."""


def load_audio(source: Any, sampling_rate: int | None = None, stream: int | None = None) -> np.ndarray:
    """Mono samples [N], float32 in [-1, 1], at 16 kHz.

    source: a file that ffmpeg can read (path, its bytes, a binary file object read from where it stands, "-" for
    standard input), or an array (numpy's or anything that numpy can take over): [N], [N, channels] or [channels, N],
    the smaller dimension being the channels, floats in [-1, 1] or integers over their whole range.
    sampling_rate: of an array, in Hz, by default 16,000; a file states its own.
    stream: which of a file's audio streams, from 0; by default the one that ffmpeg takes (of those marked as default,
    or of all, the one with most channels).

    A file's samples are those of `ffmpeg -i FILE -ac 1 -ar 16000 -acodec pcm_s16le` divided by 32768, as in
    openai-whisper's `load_audio`; a damaged one is read as far as it can be, with a warning. An array's channels are
    averaged, and it is resampled (by swresample, as files are) without rounding to 16 bits.
    Warns of digital silence and of less than 0.1 s. Raises AudioError, or OSError for a file that cannot be opened.
    """
    return _load(source, sampling_rate, stream)[0]


def load_channels(
    source: Any, sampling_rate: int | None = None, stream: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The samples [N] of `load_audio`, and beside them those of each channel, [channels, N], from reading it once."""
    samples, channels = _load(source, sampling_rate, stream, separate=True)
    assert channels is not None
    return samples, channels


def _load(
    source: Any, sampling_rate: int | None, stream: int | None, separate: bool = False
) -> tuple[np.ndarray, np.ndarray | None]:
    """[N], and [channels, N] where they are to be kept separate, too."""
    if hasattr(source, "__array__"):
        if stream is not None:
            raise AudioError(f"stream={stream} is for files, but an array was given; leave it out")
        name = "the array"
        samples, channels = _from_array(np.asarray(source), sampling_rate, separate)
    else:
        if sampling_rate is not None:
            raise AudioError(f"sampling_rate={sampling_rate} is for arrays, a file states its own; leave it out")
        with _binary_file(source) as (file, name):
            samples, channels = _from_file(file, name, stream, separate)
    if not samples.any():
        warnings.warn(f"{name} is digital silence: all samples are zero; is it the right recording?", stacklevel=3)
    elif len(samples) < _SHORT_S * SAMPLE_RATE:
        duration_ms = 1000 * len(samples) / SAMPLE_RATE
        warnings.warn(f"{name} lasts only {duration_ms:.0f} ms; is it the right recording?", stacklevel=3)
    return samples, channels


def pad_or_trim(waveform: Any, n_samples: int = 30 * SAMPLE_RATE) -> np.ndarray:
    """waveform [..., N] -> [..., n_samples]: silence is appended, or the end cut off. 30 s is what a model takes."""
    waveform = np.asarray(waveform)[..., :n_samples]
    return np.pad(waveform, [*[(0, 0)] * (waveform.ndim - 1), (0, n_samples - waveform.shape[-1])])


def _from_array(array: np.ndarray, sampling_rate: int | None, separate: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """[N], [N, channels] or [channels, N] at sampling_rate -> what `_load` gives."""
    sampling_rate = SAMPLE_RATE if sampling_rate is None else sampling_rate
    if array.ndim not in (1, 2) or not array.size:
        raise AudioError(f"the array has shape {array.shape}; give at least one sample, as [N] or [N, channels]")
    if not (isinstance(sampling_rate, int | np.integer) and 1_000 <= sampling_rate <= 1_000_000):
        raise AudioError(f"sampling_rate={sampling_rate!r} must be an int of Hz, 1,000 to 1,000,000")
    channels = np.moveaxis(np.atleast_2d(_as_float(array)), np.argmin(np.atleast_2d(array).shape), 0)
    samples = channels.mean(axis=0) if len(channels) > 1 else channels[0]
    if (peak := max(samples.max(), -samples.min())) > 10:
        warnings.warn(f"the array reaches {peak:.0f}, but floats are taken to be in [-1, 1]; scale it", stacklevel=4)

    def at_16_khz(samples: np.ndarray) -> np.ndarray:
        if sampling_rate == SAMPLE_RATE:
            return samples
        resampler = _Resampler("flt", "mono")
        for at in range(0, len(samples), int(sampling_rate)):
            resampler.add(_mono_frame(samples[at : at + sampling_rate], sampling_rate))
        return resampler.samples()[0]

    return at_16_khz(samples), np.stack([*map(at_16_khz, channels)]) if separate else None


def _as_float(array: np.ndarray) -> np.ndarray:
    """Samples of any type -> float32 in [-1, 1]."""
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):
            samples = array.astype(np.float32, copy=False)
        if not np.isfinite(samples).all():
            first = np.argwhere(~np.isfinite(samples))[0]
            where = ", ".join(map(str, first))
            raise AudioError(f"sample {where} of the array is {array[tuple(first)]}; replace what is not finite")
        return samples
    if array.dtype.kind in "iu" and array.dtype.itemsize <= 4:
        half = np.float32(2 ** (8 * array.dtype.itemsize - 1))
        return array.astype(np.float32) / half - np.float32(array.dtype.kind == "u")
    raise AudioError(f"the array's dtype is {array.dtype}; give floats in [-1, 1] or integers of 8, 16 or 32 bits")


@contextmanager
def _binary_file(source: Any) -> Iterator[tuple[BinaryIO, str]]:
    """An open, seekable binary file for a path, bytes, "-" or a file object, and what to call it in messages."""
    if isinstance(source, str | os.PathLike) and source != "-":
        try:
            opened = open(source, "rb")  # noqa: SIM115
        except OSError as error:
            hint = "a URL must be downloaded first" if "://" in os.fspath(source) else _OPEN_HINTS.get(type(error))
            reason = f"{os.fspath(source)}: {error.strerror}"
            raise type(error)(f"{reason}; {hint}" if hint else reason) from None
        with opened, _binary_file(opened) as file:
            yield file
    elif isinstance(source, bytes | bytearray | memoryview):
        yield io.BytesIO(source), "the given data"
    elif source == "-":
        yield io.BytesIO(sys.stdin.buffer.read()), "standard input"
    elif hasattr(source, "read"):
        name = str(getattr(source, "name", "the file object"))
        if isinstance(source, io.TextIOBase):
            raise AudioError(f"{name} is open as text; open it with mode 'rb'")
        # Some formats keep their index at the end, and ffmpeg takes a file's beginning for position 0.
        in_place = hasattr(source, "seekable") and source.seekable() and source.tell() == 0
        yield source if in_place else io.BytesIO(source.read()), name
    else:
        raise AudioError(f"audio of type {type(source).__name__} is not known; give a path, bytes, a file or an array")


def _from_file(file: BinaryIO, name: str, stream: int | None, separate: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Decodes one audio stream -> what `_load` gives; warns when parts of it are missing."""
    import av

    if not file.read(1):
        raise AudioError(f"{name} is empty; give a recording")
    file.seek(0)
    try:
        container = open_container(file)
    except av.FFmpegError as error:
        raise AudioError(f"{name} cannot be read as audio ({error.strerror}); is it a whole, supported file?") from None
    with container:
        audio = _choose_stream(container, name, stream)
        errors: list[str] = []
        frames = _frames(container, audio, errors)
        if "mp4" in container.format.name and audio.duration and audio.time_base:
            frames = _without_padding(frames, audio.duration * audio.time_base)
        mixed, apart = _Resampler("s16", "mono"), _Resampler("s16", None) if separate else None
        for frame in frames:
            mixed.add(frame)
            if apart is not None:
                apart.add(frame)
        samples = mixed.samples()[0]
        stated_s = _stated_duration_s(container, audio)
    if not len(samples):
        raise AudioError(f"{name} holds no sound that can be decoded; is it a whole, supported file?")
    duration_s = len(samples) / SAMPLE_RATE
    damage = [f"damaged packets: {len(errors)}"] if errors else []
    if duration_s < 0.95 * stated_s - 0.5:  # some files' durations are estimates
        damage.append(f"it ends after {duration_s:.1f} of the {stated_s:.1f} s that it states")
    if damage:
        warnings.warn(f"{name} is damaged ({', '.join(damage)}); the rest is used", stacklevel=4)
    return samples, None if apart is None else apart.samples()


def open_container(file: BinaryIO) -> av.container.InputContainer:
    """A media file as PyAV reads it; tags need not be Unicode.

    No protocols: a playlist in disguise must not make us open other files or addresses.
    """
    import av

    # PyAV 19 has no such option and needs none.
    tags: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    return av.open(file, mode="r", options={"protocol_whitelist": "none"}, **tags)


def _choose_stream(container: av.container.InputContainer, name: str, stream: int | None) -> av.AudioStream:
    from av.stream import Disposition

    streams = container.streams.audio
    if not streams:
        others = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
        raise AudioError(f"{name} holds no audio, but {others}; give a file with sound")
    if stream is not None and not 0 <= stream < len(streams):
        raise AudioError(f"stream={stream} does not exist: {name} has {len(streams)} audio streams, counted from 0")
    decodable = [s for s in (streams if stream is None else [streams[stream]]) if s.codec_context is not None]
    if not decodable:
        raise AudioError(f"{name} holds audio of a kind that ffmpeg cannot decode; convert it to FLAC first")
    return max(decodable, key=lambda s: (bool(s.disposition & Disposition.default), s.codec_context.channels))


def _frames(
    container: av.container.InputContainer, audio: av.AudioStream, errors: list[str]
) -> Iterator[av.AudioFrame]:
    """What can be decoded; `errors` gets one line for each packet that is damaged or missing."""
    import av

    def packets() -> Iterator[av.Packet | None]:
        try:
            yield from container.demux(audio)
        except av.FFmpegError as error:
            errors.append(str(error))
            yield None  # the end, as for ffmpeg; the decoder gives what it still holds

    for packet in packets():
        try:
            frames = audio.decode(packet)
        except av.FFmpegError as error:
            errors.append(str(error))
            continue
        if packet is not None and packet.is_corrupt:
            errors.append("corrupt packet")
        yield from frames


def _without_padding(frames: Iterable[av.AudioFrame], duration_s: Fraction) -> Iterator[av.AudioFrame]:
    """Cuts the last frame of an mp4 where its edit list says that the sound ends, as ffmpeg does from version 9 on."""
    last, seen = None, 0
    for frame in frames:
        if last is not None:
            yield last
        last, seen = frame, seen + frame.samples
    if last is not None:
        kept = last.samples - (seen - round(duration_s * last.sample_rate))
        yield _cut(last, kept) if 0 < kept < last.samples else last


def _cut(frame: av.AudioFrame, n_samples: int) -> av.AudioFrame:
    import av

    width = n_samples if frame.format.is_planar else n_samples * frame.layout.nb_channels
    data: Any = np.ascontiguousarray(frame.to_ndarray()[:, :width])
    cut = av.AudioFrame.from_ndarray(data, frame.format.name, frame.layout.name)
    cut.sample_rate = frame.sample_rate
    return cut


class _Resampler:
    """Brings frames to 16 kHz with swresample's defaults, and to a layout of channels; None keeps the first frame's.

    sample_format: "flt" or "s16", which rounds to 16 bits; not planar, since PyAV reads no more than 8 planes.
    """

    def __init__(self, sample_format: str, layout: str | None):
        self._format, self._layout = sample_format, layout
        self._resampler: av.AudioResampler | None = None
        self._shape: tuple[str, str, int] | None = None
        self._mixable = True
        self._chunks: list[np.ndarray] = []

    def add(self, frame: av.AudioFrame) -> None:
        import av

        self._layout = self._layout or frame.layout.name
        if self._shape != (shape := (frame.format.name, frame.layout.name, frame.sample_rate)):
            # A stream may change midway. Like ffmpeg, drop the millisecond that the old resampler still holds.
            self._shape = shape
            self._resampler = av.AudioResampler(self._format, self._layout, SAMPLE_RATE)
            self._mixable = frame.layout.name == self._layout or _is_mixable(frame)
        self._resample(frame if self._mixable else _mean_of_channels(frame))

    def samples(self) -> np.ndarray:
        """[channels, N] of all frames that were added."""
        self._resample(None)
        if not self._chunks:
            return np.zeros((1, 0), np.float32)
        samples = np.concatenate(self._chunks, axis=1, dtype=np.float32)
        return np.divide(samples, 2**15, out=samples) if self._format == "s16" else samples

    def _resample(self, frame: av.AudioFrame | None) -> None:
        if self._resampler is not None:
            self._chunks += [_unpacked(out) for out in self._resampler.resample(frame) if out is not None]


def _is_mixable(frame: av.AudioFrame) -> bool:
    """Whether ffmpeg has a rule to mix these channels down; it has none for 9, 11, 13, ... without a named layout."""
    import av

    try:
        av.AudioResampler("s16", "mono", SAMPLE_RATE).resample(frame)
    except av.ArgumentError:
        return False
    return True


def _mean_of_channels(frame: av.AudioFrame) -> av.AudioFrame:
    import av

    (packed,) = av.AudioResampler(frame.format.packed.name).resample(frame)
    return _mono_frame(_as_float(_unpacked(packed)).mean(axis=0), frame.sample_rate)


def _unpacked(frame: av.AudioFrame) -> np.ndarray:
    """[channels, N]"""
    return frame.to_ndarray().reshape(-1, frame.layout.nb_channels).T


def _mono_frame(samples: np.ndarray, sampling_rate: int) -> av.AudioFrame:
    import av

    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples)[None], "flt", "mono")
    frame.sample_rate = int(sampling_rate)
    return frame


def _stated_duration_s(container: av.container.InputContainer, audio: av.AudioStream) -> float:
    """How long the file says that the audio is; 0 where it says nothing (or speaks of other streams, too)."""
    if audio.duration and audio.time_base:
        return float(audio.duration * audio.time_base)
    if container.duration and len(container.streams) == 1:
        return (container.duration - (container.start_time or 0)) / 1e6
    return 0.0
