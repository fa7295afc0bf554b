"""The CTC head beside an exported model: a further stage of training goes on with it instead of a random one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

FILE = "ctc_head.safetensors"
_NAMES = ("kernel", "bias")


def save_ctc_head(params: Mapping[str, jax.Array], folder: Path) -> None:
    """Writes the head's parameters, by their path in the trainee, into the folder of a model; nothing without one."""
    from safetensors.numpy import save_file

    head = {name: np.asarray(params[f"ctc_head.{name}"]) for name in _NAMES if f"ctc_head.{name}" in params}
    if head:
        partial = folder / f".{FILE}.partial"
        save_file(head, partial)
        partial.replace(folder / FILE)  # whole or not at all


def load_ctc_head(head: nnx.Linear, folder: str) -> None:
    """Fills the head with what `folder` has of an earlier stage, if it spelled the same units; else it stays random."""
    from safetensors.numpy import load_file

    file = Path(folder) / FILE
    if not folder or not file.is_file():
        return
    stored = load_file(file)
    if all(stored[name].shape == getattr(head, name).shape for name in _NAMES):
        for name in _NAMES:
            getattr(head, name).set_value(jnp.asarray(stored[name]))
