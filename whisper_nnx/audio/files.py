"""Decodes files to float32 samples at 16 kHz by PyAV (ffmpeg's libraries), aligned to the container's timestamps."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from whisper_nnx.audio.background import check_stopped, warn
from whisper_nnx.audio.resampling import Resampler, packed_samples, silence_like
from whisper_nnx.audio.rules import AudioError, check_duration, check_rate, check_samples, warn_if_loud

if TYPE_CHECKING:
    import av

_GAP_S = Fraction(1, 10)  # shorter gaps are codec delays and rounding; the default of ffmpeg's aresample
_LONGEST_S = 3600  # of silence inserted per file, or its decoded duration: a small file must not expand to hours
_SPLICE_S = 10  # longer jumps start a new timeline in formats whose timelines may be broken, as in ffmpeg


def read_file(
    file: BinaryIO, name: str, stream: int | None, separate: bool, follow_timestamps: bool, max_s: float
) -> tuple[np.ndarray, np.ndarray | None]:
    """Decodes one audio stream to mono [N], plus [channels, N] if `separate`; warns of damage."""
    import av

    if not (head := file.read(2**16)):
        raise AudioError(f"{name} is empty; give a recording")
    file.seek(0)
    try:
        container = open_container(file)
    except av.FFmpegError as error:
        raise AudioError(f"{name} cannot be read as audio ({error.strerror}); is it complete and supported?") from None
    with container:
        audio = choose_stream(container, name, stream)
        track = _Track(container, audio, name, follow_timestamps, max_s, _has_open_end(head))
        mixed = Resampler("mono", clipped=not track.is_float)
        separated = Resampler(None, clipped=not track.is_float) if separate else None
        for frame in track.frames():
            check_stopped()
            mixed.add(frame)
            if separated is not None:
                separated.add(frame)
        samples = mixed.samples()[0]
        if not len(samples):
            raise AudioError(f"{name} contains no decodable audio; is it complete and supported?")
        track.warn()
    return samples, None if separated is None else separated.samples()


def open_container(file: BinaryIO) -> av.container.InputContainer:
    """Opens a media file with PyAV; tags need not be valid Unicode.

    All protocols are disabled: a disguised playlist must not open other files or URLs.
    """
    import av

    # PyAV 19 removed this option and does not need it.
    tags: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    return av.open(file, mode="r", options={"protocol_whitelist": "none"}, **tags)


def choose_stream(container: av.container.InputContainer, name: str, stream: int | None) -> av.AudioStream:
    """The audio stream of that number, or the one that ffmpeg chooses. Raises AudioError if there is none."""
    from av.stream import Disposition

    streams = container.streams.audio
    if not streams:
        others = ", ".join(sorted({s.type for s in container.streams})) or "no streams"
        raise AudioError(f"{name} contains no audio, only {others}; give a file with an audio stream")
    if stream is not None and not 0 <= stream < len(streams):
        raise AudioError(f"stream={stream} does not exist: {name} has {len(streams)} audio streams, counted from 0")
    decodable = [s for s in (streams if stream is None else [streams[stream]]) if s.codec_context is not None]
    if not decodable:
        raise AudioError(f"{name} uses an audio codec that ffmpeg cannot decode; convert it to FLAC first")
    return max(decodable, key=lambda s: (bool(s.disposition & Disposition.default), s.codec_context.channels))


def _has_open_end(head: bytes) -> bool:
    """Whether a WAV or CAF header leaves the length unspecified, as when written to a pipe.

    Programs that cannot seek back write 0, -1, or nearly the largest 31-bit number (sox, arecord).
    """
    if head.startswith(b"caff"):
        return b"data" + b"\xff" * 8 in head
    offset = 12
    while head.startswith(b"RIFF") and offset + 8 <= len(head):
        kind, size = struct.unpack_from("<4sI", head, offset)
        if kind == b"data":
            return size in (0, 2**31) or size % 2**31 >= 0x7FFFF000
        offset += 8 + size + size % 2
    return False


class _Track:
    """An audio stream on its container's timeline, whose zero is the start of the earliest stream.

    Times are in seconds. Gaps advance the time even if they are not filled.
    """

    def __init__(
        self,
        container: av.container.InputContainer,
        audio: av.AudioStream,
        name: str,
        follow_timestamps: bool,
        max_s: float,
        open_end: bool,
    ):
        from av.format import Flags

        codec = audio.codec_context
        self._container, self._audio, self._name = container, audio, name
        self._follow, self._max_s, self._open_end = follow_timestamps, max_s, open_end
        # Lossless float samples are kept as recorded; lossy codecs may exceed full scale by accident.
        self.is_float = codec.codec.lossless and codec.format is not None and codec.format.name[:3] in ("flt", "dbl")
        flags: Any = container.format.flags
        self._splices = bool(flags & Flags.ts_discont.value)
        self._zero: Fraction | None = None
        if container.start_time is not None:
            self._zero = Fraction(container.start_time, 1_000_000)
        self._start = Fraction(0)  # of the first frame
        # The audio decoded so far ends `_since` samples at `_rate` after `_base`.
        self._base, self._since, self._rate = Fraction(0), 0, 1
        self._silence = Fraction(0)
        self._n_samples = 0
        self._peak = 0.0
        self._errors: list[str] = []
        self._jumps: list[str] = []  # gaps too long to fill

    def frames(self) -> Iterator[av.AudioFrame]:
        """Yields all decodable frames, with silence in gaps between timestamps."""
        last = None
        for frame in self._decoded():
            if last is not None:
                yield from self._placed(last)
            last = frame
        if last is not None:
            yield from self._placed(last, is_last=True)

    def _decoded(self) -> Iterator[av.AudioFrame]:
        import av

        def packets() -> Iterator[av.Packet | None]:
            try:
                yield from self._container.demux(self._audio)
            except av.FFmpegError as error:
                self._errors.append(str(error))
                yield None  # end of stream, as in ffmpeg: flushes the decoder

        for packet in packets():
            try:
                frames = self._audio.decode(packet)
            except av.FFmpegError as error:
                self._errors.append(str(error))
                continue
            if packet is not None and packet.is_corrupt and not self._open_end:  # whose last packet may be short
                self._errors.append("corrupt packet")
            yield from frames

    def _placed(self, frame: av.AudioFrame, is_last: bool = False) -> Iterator[av.AudioFrame]:
        if check_rate(rate := frame.sample_rate, self._name) != self._rate:
            self._base, self._since, self._rate = self._end, 0, rate
        gap = 0 if self._is_next(frame) else round(self._gap(frame) * rate)
        self._since += gap
        if not self._n_samples:
            self._start = self._end
        if is_last and "mp4" in self._container.format.name and self._audio.duration:
            # The edit list states where the audio ends; the rest is padding, which ffmpeg drops since version 9.
            kept = round((self._start + _seconds(self._audio.duration, self._audio.time_base) - self._end) * rate)
            frame = _cut(frame, kept) if 0 < kept < frame.samples else frame
        if self.is_float:
            samples = packed_samples(frame)
            samples = samples if len(samples) > 1 else samples[0]
            self._peak = max(self._peak, check_samples(samples, self._name, self._n_samples))
        self._n_samples += frame.samples
        self._since += frame.samples
        check_duration(self._end_s, self._max_s, self._name)
        for filled in range(0, gap if self._follow else 0, rate):
            yield silence_like(frame, min(rate, gap - filled))
        yield frame

    @property
    def _end(self) -> Fraction:
        return self._base + Fraction(self._since, self._rate)

    @property
    def _end_s(self) -> float:
        return float(self._base) + self._since / self._rate

    def _is_next(self, frame: av.AudioFrame) -> bool:
        """Whether a frame clearly has no gap before it; fractions cost more than decoding."""
        time_s = frame.time
        return (
            time_s is not None
            and self._zero is not None
            and abs(time_s - float(self._zero) - self._end_s) < float(_GAP_S) / 2
        )

    def _gap(self, frame: av.AudioFrame) -> Fraction:
        """Returns the gap before a frame in s; 0 if it overlaps earlier frames, since no audio is dropped."""
        if frame.pts is None:
            return Fraction(0)
        time = _seconds(frame.pts, frame.time_base)
        self._zero = time if self._zero is None else self._zero
        gap = time - self._zero - self._end
        if self._splices and gap < -_SPLICE_S:  # a new timeline starts, as in joined files
            self._zero += gap
            return Fraction(0)
        if gap <= _GAP_S:
            return Fraction(0)
        longest = max(Fraction(_LONGEST_S), self._end - self._silence) - self._silence
        if gap > (_SPLICE_S if self._splices and self._n_samples else longest):
            self._jumps.append(f"{float(gap):.1f} s after {float(self._end):.1f} s")
            self._zero += gap
            return Fraction(0)
        self._silence += gap
        return gap

    def warn(self) -> None:
        """Warns about damage, filled jumps and loudness found while decoding."""
        damage = [f"damaged packets: {len(self._errors)}"] if self._errors else []
        if self._end < 0.95 * (stated_s := self._stated_s()) - 0.5:  # some files' durations are estimates
            damage.append(f"it ends after {float(self._end):.1f} s, but its header states {stated_s:.1f} s")
        if damage:
            warn(f"{self._name} is damaged ({', '.join(damage)}); the rest is used", stacklevel=6)
        if self._jumps and self._follow:
            more = f" and {len(self._jumps) - 1} more" if len(self._jumps) > 1 else ""
            warn(
                f"the timestamps of {self._name} jump by {self._jumps[0]}{more}: too long to fill with silence; "
                "later times do not include the jump",
                stacklevel=6,
            )
        warn_if_loud(self._peak, self._name, stacklevel=6)

    def _stated_s(self) -> float:
        """Returns the audio's duration according to the file, or 0 if not stated for this stream alone."""
        container, audio = self._container, self._audio
        others, whole_s = [s for s in container.streams if s is not audio], (container.duration or 0) / 1e6
        if not audio.duration:
            return 0.0 if others else whole_s - (container.start_time or 0) / 1e6
        own_s = float(_seconds(audio.duration, audio.time_base))
        # ffmpeg reports the container's duration for streams without their own (Matroska, ASF).
        taken_s = [whole_s, *(float(_seconds(s.duration or 0, s.time_base)) for s in others)] if others else []
        shared = any(abs(own_s - other_s) < 1e-3 for other_s in taken_s) and "mp4" not in container.format.name
        return 0.0 if shared or container.format.name == "avi" else own_s  # AVI includes a delay that it does not store


def _seconds(time: int, time_base: Fraction | None) -> Fraction:
    return time * (time_base or Fraction(0))


def _cut(frame: av.AudioFrame, n_samples: int) -> av.AudioFrame:
    import av

    width = n_samples if frame.format.is_planar else n_samples * frame.layout.nb_channels
    data: Any = np.ascontiguousarray(frame.to_ndarray()[:, :width])
    cut = av.AudioFrame.from_ndarray(data, frame.format.name, frame.layout.name)
    cut.sample_rate = frame.sample_rate
    return cut
