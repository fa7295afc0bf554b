"""Saves and loads the CTC head with an exported model, so that a later training stage can reuse it."""

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
    """Writes the CTC head, if any, from parameters by path in the trainee into a model's folder."""
    from safetensors.numpy import save_file

    head = {name: np.asarray(params[f"ctc_head.{name}"]) for name in _NAMES if f"ctc_head.{name}" in params}
    if head:
        partial = folder / f".{FILE}.partial"
        save_file(head, partial)
        partial.replace(folder / FILE)


def load_ctc_head(head: nnx.Linear, folder: str) -> None:
    """Loads the head of an earlier stage from `folder` if its shape fits; otherwise leaves it random."""
    from safetensors.numpy import load_file

    file = Path(folder) / FILE
    if not folder or not file.is_file():
        return
    stored = load_file(file)
    if all(stored[name].shape == getattr(head, name).shape for name in _NAMES):
        for name in _NAMES:
            getattr(head, name).set_value(jnp.asarray(stored[name]))
