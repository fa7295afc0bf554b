"""Where each parameter is on a mesh: Megatron-style tensor parallelism over the axis `model`, as one table.

Loading, inference and training use it. The queries, keys, values and the MLP's first matrix are divided by columns (by
heads, by channels), what follows them by rows, so that each attention and each MLP ends in one sum over the devices
(Shoeybi et al. 2019, section 3). Caches follow the heads.

The token embedding is on every device: the logits of a token are then computed by one device alone, in one order, and
the rules and the search need no communication. So are convolutions, norms and positions, which are small.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from whisper_nnx.model.config import WhisperConfig
from whisper_nnx.runtime import devices as runtime
from whisper_nnx.runtime.devices import MODEL, as_mesh, put

if TYPE_CHECKING:
    from whisper_nnx.model.whisper import Whisper

# Path of an array, as a pattern -> how it is divided. The first that matches counts; the others are on every device.
TABLE = (
    (r"layers\.\d+\.\w+_attn\.[qkv]_proj\.kernel", P(None, MODEL)),
    (r"layers\.\d+\.\w+_attn\.[qkv]_proj\.(bias|scale)", P(MODEL)),
    (r"layers\.\d+\.\w+_attn\.out_proj\.kernel", P(MODEL, None)),
    (r"layers\.\d+\.fc1\.kernel", P(None, MODEL)),
    (r"layers\.\d+\.fc1\.(bias|scale)", P(MODEL)),
    (r"layers\.\d+\.fc2\.kernel", P(MODEL, None)),
)
EVERYWHERE = P()


def spec_of(path: str, mesh: Mesh) -> P:
    """How the array at a path, such as "decoder.layers.0.fc1.kernel", is divided on this mesh."""
    if mesh.shape.get(MODEL, 1) == 1:
        return EVERYWHERE
    return next((spec for pattern, spec in TABLE if re.fullmatch(rf"(.*\.)?{pattern}", path)), EVERYWHERE)


def sharding_of(path: Iterable[Any], mesh: Mesh) -> NamedSharding:
    """Where the array at a path, such as ("decoder", "layers", 0, "fc1", "kernel"), is on this mesh."""
    return NamedSharding(mesh, spec_of(".".join(map(str, path)), mesh))


def check_fits(config: WhisperConfig, mesh: Mesh) -> None:
    """Raises ValueError unless the axis `model` divides the heads and the MLP."""
    parts = mesh.shape.get(MODEL, 1)
    for name in ("encoder_attention_heads", "decoder_attention_heads", "encoder_ffn_dim", "decoder_ffn_dim"):
        if (size := getattr(config, name)) % parts:
            raise ValueError(f"a mesh of {parts} parts of each layer does not divide {name}={size}; choose a divisor")


def shard_model(model: Whisper, devices: int | str | Mesh) -> Whisper:
    """Copies a model to several devices; whatever is computed with the result runs there.

    `load_model(..., mesh=...)` is the way for a model that no single device can hold.

    Args:
      model: any model.
      devices: a number of devices over which rows of batches are divided, "all", or a mesh (`make_mesh`).

    Raises:
      ValueError: there are not so many devices, or the mesh does not divide the model's heads.
    """
    mesh = as_mesh(devices)
    check_fits(model.config, mesh)
    graph, state = nnx.split(model)
    placed = [
        (path, variable.replace(put(variable[...], sharding_of(path, mesh))))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(placed))


def on_devices(model: Whisper, devices: int | str | Mesh | None) -> Whisper:
    """The model, copied to these devices unless it is there already; None: where it is."""
    if devices is None or mesh_of(model) == (mesh := as_mesh(devices)):
        return model
    return shard_model(model, mesh)


def mesh_of(model: Whisper) -> Mesh | None:
    """The mesh that a model is on; None: a single device."""
    return runtime.mesh_of(model.decoder.embed_tokens.embedding[...])
