"""Makes a student from a teacher (Gandhi et al. 2023): the whole encoder and some decoder layers."""

from __future__ import annotations

from dataclasses import replace

from flax import nnx

from whisper_nnx.model.whisper import Whisper
from whisper_nnx.training.config import DistillConfig


def kept_layers(layers: int, keep: int) -> tuple[int, ...]:
    """Returns the teacher layers that the student gets, evenly spaced from first to last; the first for keep=1.

    Raises ValueError unless 1 <= keep <= layers.
    """
    if not 1 <= keep <= layers:
        raise ValueError(f"distill.decoder_layers={keep} must be from 1 to the teacher's {layers}")
    return tuple(round(i * (layers - 1) / max(1, keep - 1)) for i in range(keep))


def make_student(teacher: Whisper, config: DistillConfig) -> Whisper:
    """Copies the teacher with `decoder_layers` of its decoder layers and the alignment heads in them.

    Raises ValueError if the teacher has fewer layers.
    """
    kept = kept_layers(teacher.config.decoder_layers, config.decoder_layers)
    student = nnx.clone(teacher)
    student.decoder.layers = nnx.List(student.decoder.layers[layer] for layer in kept)
    heads = teacher.config.alignment_heads or ()
    kept_heads = tuple((kept.index(layer), head) for layer, head in heads if layer in kept)
    student.config = replace(teacher.config, decoder_layers=len(kept), alignment_heads=kept_heads or None)
    return student
