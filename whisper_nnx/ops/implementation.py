"""`Implementation`: the operations for one kind of processor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

Array = jax.Array
Dtype = Any


@dataclass(frozen=True)
class Implementation:
    """The functions behind `whisper_nnx.ops`, which documents them. `dataclasses.replace` makes another one.

    Args:
      heads_axis: the axis of a cache along which the heads are.
      cache_dtypes: of a model that computes in a dtype, the dtypes in which the token loop's cache stores the keys and
        values of the text, and those of the audio.
      key: what else decides the programs that are traced with it, as text: which kernels the processor has.
      window_by_window: whether work is cut into windows, heads and pieces that stay in a core's cache.
      reads_written: whether the token loop of a model that computes in a dtype reads the text's keys and values only as
        far as some are written, so that it pays to move them up when rows come and go.
      audio_multiple: the cache's number of audio positions is padded to a multiple of it.
    """

    name: str
    linear: Callable[[Array, Array, Array | None, Array | None], Array]
    embed: Callable[[Array, Array, Array | None], Array]
    unembed: Callable[[Array, Array, Array | None], Array]
    unembedding: Callable[[Array, Array | None, Dtype, int], Callable[[Array], Array]]
    attention: Callable[[Array, Array, Array, Array | None], Array]
    cached_attention: Callable[[Array, Array, Array, Array | None, Array | int], Array]
    pack: Callable[[Array], Array]
    pack_audio: Callable[[Array], Array]
    unpack: Callable[[Array, int], Array]
    heads_axis: int
    argmax: Callable[[Array], Array]
    first_positions: Callable[[Array, Array, Array], Array]
    cache_dtypes: Callable[[Dtype], tuple[Dtype, Dtype]]
    key: Callable[[], str] = str
    window_by_window: bool = False
    reads_written: Callable[[Dtype], bool] = lambda dtype: False
    audio_multiple: int = 1
