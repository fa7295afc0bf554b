"""Resamples decoded audio frames to float32 samples at 16 kHz with swresample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from whisper_nnx.audio.constants import SAMPLE_RATE

if TYPE_CHECKING:
    import av


_TOGETHER = 1 << 14  # samples that are resampled in one call


class Resampler:
    """Converts frames to 16 kHz and a channel layout, None for the first frame's, with swresample's defaults.

    Frames lose their timestamps: several are joined, as a call costs more than resampling a frame.

    clipped: clips to full scale and rounds to 16 bits. rounded: rounds to 16 bits without clipping.
    """

    def __init__(self, layout: str | None, *, clipped: bool = True, rounded: bool = True):
        self._clipped, self._rounded, self._layout = clipped, rounded, layout
        self._convert: Callable[[av.AudioFrame | None], Iterable[av.AudioFrame]] | None = None
        self._shape: tuple[str, str, int] | None = None
        self._mixable = True
        self._joined: av.AudioFifo | None = None  # frames that were not resampled yet
        self._tick = Fraction(1)  # their time base, which must be the same
        self._samples = bytearray()  # float32; grows in place, by an eighth at a time
        self._n_channels = 1

    def add(self, frame: av.AudioFrame) -> None:
        import av

        self._layout = self._layout or frame.layout.name
        if self._shape != (shape := (frame.format.name, frame.layout.name, frame.sample_rate)):
            # A stream may change format. Like ffmpeg, drop the millisecond still buffered in the old resampler.
            self._resample()
            self._shape, self._joined, self._tick = shape, av.AudioFifo(), Fraction(1, frame.sample_rate)
            self._mixable = frame.layout.name == self._layout or _is_mixable(frame)
            self._convert = None
        frame.pts, frame.time_base = None, self._tick
        assert self._joined is not None
        self._joined.write(frame)
        if self._joined.samples >= _TOGETHER:
            self._resample()

    def _resample(self) -> None:
        """Resamples the frames so far."""
        if self._joined is None or (frame := self._joined.read()) is None:
            return
        frame = frame if self._mixable else _mean_of_channels(frame)
        self._convert = self._convert or self._conversion(frame, self._layout or "")
        self._take(frame if self._clipped else _copy(frame))

    def _conversion(
        self, frame: av.AudioFrame, layout: str
    ) -> Callable[[av.AudioFrame | None], Iterable[av.AudioFrame]]:
        import av

        if self._clipped:  # packed, since PyAV reads at most 8 planes
            return av.AudioResampler("s16", layout, SAMPLE_RATE).resample
        # Like AudioResampler, but channel weights sum to at most 1, as they do for integers.
        graph = av.filter.Graph()
        rate, layouts = str(frame.sample_rate), frame.layout.name
        nodes = [
            graph.add("abuffer", sample_rate=rate, sample_fmt=frame.format.packed.name, channel_layout=layouts),
            graph.add("aresample", rematrix_maxval="1"),
            graph.add("aformat", sample_rates=str(SAMPLE_RATE), sample_fmts="dbl", channel_layouts=layout),
            graph.add("abuffersink"),
        ]
        for node, following in pairwise(nodes):
            node.link_to(following)
        graph.configure()
        return partial(_filtered, graph)

    def samples(self) -> np.ndarray:
        """Flushes the resampler and returns all samples, [channels, N]."""
        self._resample()
        self._take(None)
        return np.frombuffer(self._samples, np.float32).reshape(-1, self._n_channels).T

    def _take(self, frame: av.AudioFrame | None) -> None:
        for out in self._convert(frame) if self._convert is not None else []:
            self._n_channels = out.layout.nb_channels
            samples = out.to_ndarray()
            if self._clipped:
                samples = samples / np.float32(2**15)
            elif self._rounded:
                samples = np.rint(samples * 2**15) / 2**15 + 0  # + 0 turns -0 into 0
            self._samples += samples.astype(np.float32, copy=False).tobytes()


def _filtered(graph: av.filter.Graph, frame: av.AudioFrame | None) -> Iterator[Any]:
    """Pushes a frame, or None to flush, through a filter graph and yields its output."""
    import av

    graph.push(frame)
    while True:
        try:
            yield graph.pull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return


def _copy(frame: av.AudioFrame) -> av.AudioFrame:
    """Copies a frame as packed samples: a graph may change the layout of its input, which the next graph rejects."""
    import av

    samples = np.ascontiguousarray(packed_samples(frame).T).reshape(1, -1)
    copy = av.AudioFrame.from_ndarray(samples, frame.format.packed.name, frame.layout.name)
    copy.sample_rate = frame.sample_rate
    return copy


def mono_frame(samples: np.ndarray, sampling_rate: int) -> av.AudioFrame:
    """Makes a mono frame of samples [N]."""
    import av

    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples)[None], "flt", "mono")
    frame.sample_rate = int(sampling_rate)
    return frame


def silence_like(frame: av.AudioFrame, n_samples: int) -> av.AudioFrame:
    """Makes a silent frame of the same format, layout and rate."""
    import av

    silence = np.zeros((1, n_samples * frame.layout.nb_channels), np.float32)
    packed = av.AudioFrame.from_ndarray(silence, "flt", frame.layout.name)
    packed.sample_rate = frame.sample_rate
    (silent,) = av.AudioResampler(frame.format.name, frame.layout.name, frame.sample_rate).resample(packed)
    return silent


def packed_samples(frame: av.AudioFrame) -> np.ndarray:
    """Returns a frame's samples, [channels, N], in their own dtype."""
    import av

    (packed,) = av.AudioResampler(frame.format.packed.name).resample(frame)
    return packed.to_ndarray().reshape(-1, packed.layout.nb_channels).T


def as_float(array: np.ndarray) -> np.ndarray:
    """Scales integers by their full range to float32 in [-1, 1]; converts floats to float32."""
    if array.dtype.kind == "f":
        return array.astype(np.float32, copy=False)
    half = np.float32(2 ** (8 * array.dtype.itemsize - 1))
    return array.astype(np.float32) / half - np.float32(array.dtype.kind == "u")


def _is_mixable(frame: av.AudioFrame) -> bool:
    """Whether ffmpeg can mix these channels down; it cannot for 9, 11, 13, ... channels without a named layout."""
    import av

    try:
        av.AudioResampler("s16", "mono", SAMPLE_RATE).resample(frame)
    except av.ArgumentError:
        return False
    return True


def _mean_of_channels(frame: av.AudioFrame) -> av.AudioFrame:
    return mono_frame(as_float(packed_samples(frame)).mean(axis=0), frame.sample_rate)
