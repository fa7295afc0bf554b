"""Converts arrays to float32 samples at 16 kHz and unwraps the Python objects that hold recordings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from whisper_nnx.audio.constants import SAMPLE_RATE
from whisper_nnx.audio.resampling import Resampler, as_float, mono_frame
from whisper_nnx.audio.rules import AudioError, check_duration, check_rate, check_samples, warn_if_loud

AUDIO_KEYS = ("array", "raw", "bytes", "audio", "path")  # of a dictionary; the first that is not None is used
_MAX_CHANNELS = 16


@dataclass(frozen=True)
class Later:
    """A recording that is fetched when it is loaded.

    Attributes:
      fetch: returns what `load_audio` takes, on any thread and at any time the same.
      duration_s: of the recording, in s, if known.
    """

    fetch: Callable[[], Any]
    duration_s: float | None = None


def is_array(source: Any) -> bool:
    return hasattr(source, "__array__")


def is_pair(source: Any) -> bool:
    """Whether `source` is one recording with its rate: gradio's (rate, data) or librosa's (data, rate)."""
    if not isinstance(source, tuple | list) or len(source) != 2:
        return False
    rates = [isinstance(part, Real) for part in source]
    return sum(rates) == 1 and is_array(source[rates.index(False)])


def unwrap(source: Any, sampling_rate: Any) -> tuple[Any, Any]:
    """Returns the array or file inside `source`, and an array's rate if known.

    Accepts pairs of an array and its rate, dictionaries (from `datasets` and transformers' pipelines), torchcodec's
    decoders (from `datasets`), their samples, and `Later`.
    """
    if isinstance(source, Mapping):
        inner, rate = _from_mapping(source)
    elif isinstance(source, Later):
        inner, rate = source.fetch(), None
    elif is_pair(source):
        rate, inner = source if isinstance(source[0], Real) else reversed(source)
    elif hasattr(source, "get_all_samples"):
        inner, rate = source.get_all_samples(), None
    elif hasattr(source, "data") and hasattr(source, "sample_rate"):
        inner, rate = source.data, source.sample_rate
    else:
        return source, sampling_rate
    if None not in (rate, sampling_rate) and rate != sampling_rate:
        raise AudioError(f"sampling_rate={sampling_rate} contradicts the recording's own {rate}; leave it out")
    return unwrap(inner, sampling_rate if rate is None else rate)


def _from_mapping(source: Mapping[str, Any]) -> tuple[Any, Any]:
    if unknown := [key for key in source if key not in (*AUDIO_KEYS, "sampling_rate")]:
        keys = ", ".join(map(repr, AUDIO_KEYS))
        raise AudioError(f"a recording's dictionary has {unknown[0]!r}; give one of {keys}, and 'sampling_rate'")
    given = [source[key] for key in AUDIO_KEYS if source.get(key) is not None]
    if not given:
        raise AudioError(f"a recording's dictionary has {', '.join(map(repr, source)) or 'nothing'}; it lacks 'array'")
    return given[0], source.get("sampling_rate")


def read_array(
    source: Any, name: str, sampling_rate: Any, separate: bool, max_s: float
) -> tuple[np.ndarray, np.ndarray | None]:
    """Converts [N], [N, channels] or [channels, N] to mono [N], plus [channels, N] if `separate`."""
    array = _as_numpy(source, name)
    rate = check_rate(SAMPLE_RATE if sampling_rate is None else sampling_rate, name)
    if array.ndim not in (1, 2):
        raise AudioError(f"{name} has shape {array.shape}; give samples as [N] or [N, channels]")
    if not array.size:
        channels = max(1, *array.shape) if array.ndim == 2 else 1
        return np.zeros(0, np.float32), np.zeros((channels, 0), np.float32) if separate else None
    check_duration(max(array.shape) / rate, max_s, name)
    peak = check_samples(samples := _as_float(array, name), name)
    channels = _channels_first(samples, name)
    warn_if_loud(peak, name, stacklevel=4)

    def resample(samples: np.ndarray) -> np.ndarray:
        if rate == SAMPLE_RATE:
            return samples
        resampler = Resampler("mono", clipped=False, rounded=False)
        for start in range(0, len(samples), rate):
            resampler.add(mono_frame(samples[start : start + rate], rate))
        return resampler.samples()[0]

    mixed = channels.mean(axis=0) if len(channels) > 1 else channels[0]
    return resample(mixed), np.stack([*map(resample, channels)]) if separate else None


def _as_numpy(source: Any, name: str) -> np.ndarray:
    """Converts an array of any library to numpy; bfloat16, which numpy lacks, becomes float32."""
    if hasattr(source, "detach"):  # a torch tensor, which may need a gradient or be on another device
        source = source.detach().cpu()
        if str(source.dtype) == "torch.bfloat16":
            source = source.float()
    try:
        array = np.asarray(source)
        return array.astype(np.float32) if array.dtype.name == "bfloat16" else array
    except (TypeError, ValueError, RuntimeError) as error:
        raise AudioError(f"{name} cannot be converted to a numpy array ({error}); convert it first") from error


def _as_float(array: np.ndarray, name: str) -> np.ndarray:
    """Converts samples of any type to float32 in [-1, 1]."""
    kind, n_bytes = array.dtype.kind, array.dtype.itemsize
    if kind not in "fiu" or (kind != "f" and n_bytes > 4):
        raise AudioError(
            f"{name} is not audio: its dtype is {array.dtype}; give floats in [-1, 1] or integers of 8, 16 or 32 bits"
        )
    if kind == "f" and n_bytes > 4:
        check_samples(array, name)
    return as_float(array)


def _channels_first(samples: np.ndarray, name: str) -> np.ndarray:
    """Converts [N], [N, channels] or [channels, N] to [channels, N]; rejects ambiguous shapes."""
    if samples.ndim == 1:
        return samples[None]
    few, many = sorted(samples.shape)
    if few > _MAX_CHANNELS or 1 < few == many:
        raise AudioError(
            f"{name} has shape {samples.shape}, which is ambiguous; give [N] or [N, channels] with up "
            f"to {_MAX_CHANNELS} channels, or a list for several recordings"
        )
    return np.moveaxis(samples, int(np.argmin(samples.shape)), 0)
