"""A smaller student of a larger teacher (Gandhi et al. 2023): all of its encoder, some layers of its decoder."""

from __future__ import annotations

from dataclasses import replace

from flax import nnx

from whisper_nnx.model.whisper import Whisper
from whisper_nnx.training.config import DistillConfig


def kept_layers(layers: int, keep: int) -> tuple[int, ...]:
    """Which of the teacher's layers the student gets: evenly spread from the first to the last; of one, the first.

    Raises ValueError unless 1 <= keep <= layers.
    """
    if not 1 <= keep <= layers:
        raise ValueError(f"distill.decoder_layers={keep} must be from 1 to the teacher's {layers}")
    return tuple(round(i * (layers - 1) / max(1, keep - 1)) for i in range(keep))


def make_student(teacher: Whisper, config: DistillConfig) -> Whisper:
    """A copy of the teacher with `decoder_layers` of its decoder's layers. Its alignment heads are those that are left.

    Raises ValueError for more layers than the teacher has.
    """
    kept = kept_layers(teacher.config.decoder_layers, config.decoder_layers)
    student = nnx.clone(teacher)
    student.decoder.layers = nnx.List(student.decoder.layers[layer] for layer in kept)
    heads = teacher.config.alignment_heads or ()
    left = tuple((kept.index(layer), head) for layer, head in heads if layer in kept)
    student.config = replace(teacher.config, decoder_layers=len(kept), alignment_heads=left or None)
    return student
