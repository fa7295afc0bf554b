"""Reads PEFT's LoRA folders (adapter_config.json, adapter_model.safetensors or .bin), merged into their base model.

Names are Hugging Face's with the prefix "base_model.model."; a layer with an adapter has A [r,in] and B [out,r], and W
becomes W + scale * B A. Fully trained parameters (`modules_to_save`, biases) replace those of the base model.

https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from weight_loader.checkpoint import Checkpoint
from weight_loader.folder import CheckpointError, read_json, read_tokenizer
from weight_loader.hub import checkpoint_path
from weight_loader.names import Axes, parameters
from weight_loader.readers import huggingface, safetensors, torch_pickle

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight")
# Options that change more than W + scale * B A.
_OTHER_KINDS = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "megatron_config",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "use_bdlora",
)
_HARMLESS_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # others also change the base model's weights
_MERGE = "merge it with peft: PeftModel.from_pretrained(model, FOLDER).merge_and_unload().save_pretrained(NEW)"


@dataclass
class _Adapter:
    """LoRA factors by layer, {"model.encoder.layers.0.fc1": {"A": ..., "B": ...}}, and whole parameters."""

    factors: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    whole: dict[str, np.ndarray] = field(default_factory=dict)


def detect(path: Path) -> bool:
    """Detects a folder with an adapter but without the weights of a complete model, which take precedence."""
    return path.is_dir() and (path / CONFIG).exists() and huggingface.weights(path) is None


def read(path: Path, **options: Any) -> Checkpoint:
    """options: token and cache_dir for the base model, as in `load_model`.

    Raises CheckpointError for unsupported kinds of adapters, and for an adapter that does not fit its base model.
    """
    from weight_loader.readers import read_checkpoint

    config = read_json(path / CONFIG)
    _check_kind(config, path)
    base_path = _base(config, path, options)
    if detect(base_path):
        raise CheckpointError(f"{path}: its base model {base_path} is also an adapter; merge that first")
    base = read_checkpoint(base_path)
    adapter = _read_adapter(path, {p.stored["hf"].name for p in parameters(base.config) if "hf" in p.stored})
    scales = {layer: _scale(config, layer, parts["A"].shape[0], path) for layer, parts in adapter.factors.items()}
    tensors = _merged(base, adapter, scales, path)
    size = base.config.vocab_size
    beside = base_path if base_path.is_dir() else base_path.parent
    tokenizer = read_tokenizer(path, size) or base.tokenizer or read_tokenizer(beside, size)
    about = f"LoRA of {len(scales)} layers and {len(adapter.whole)} whole parameters, merged into {base.where}"
    return replace(
        base, where=str(path), tokenizer=tokenizer, tensors=tensors, details={**base.details, "adapter": about}
    )


def _check_kind(config: dict[str, Any], path: Path) -> None:
    if (kind := config.get("peft_type")) != "LORA":
        raise CheckpointError(f"{path}: adapters of type {kind!r} are not supported, only LORA; {_MERGE}")
    if other := [name for name in _OTHER_KINDS if config.get(name)]:
        raise CheckpointError(f"{path}: LoRA with {', '.join(other)} is not supported; {_MERGE}")
    if (start := config.get("init_lora_weights")) not in _HARMLESS_STARTS:
        raise CheckpointError(
            f"{path}: LoRA initialized with {start!r} also changes its base and is not supported; {_MERGE}"
        )


def _base(config: dict[str, Any], path: Path, options: dict[str, Any]) -> Path:
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name or not isinstance(revision, str | None):
        raise CheckpointError(f"{path / CONFIG} names no base model; set its base_model_name_or_path")
    try:
        return checkpoint_path(name, **{**options, "revision": revision})
    except (FileNotFoundError, CheckpointError) as error:
        fix = f"set base_model_name_or_path in {path / CONFIG} to where it is"
        raise CheckpointError(f"the base model of {path} is not available: {error}; or {fix}") from error


def _read_adapter(path: Path, known: set[str]) -> _Adapter:
    """Reads the adapter; known: Hugging Face's names of the base model's parameters."""
    adapter, odd = _Adapter(), []
    for key, array in _tensors(path):
        name = key.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        match = _FACTOR.fullmatch(name)
        parameter = f"{match[1]}.weight" if match else name
        if f"model.{parameter}" in known:  # of WhisperModel, without an output layer
            parameter = f"model.{parameter}"
        if parameter not in known or (not match and parameter.endswith(".embed_tokens.weight")):
            odd.append(key)  # including an output layer that is no longer tied to the embedding
        elif match and array.ndim == 2:
            adapter.factors.setdefault(parameter.removesuffix(".weight"), {})[match[2]] = array
        elif match:
            odd.append(key)  # of a convolution
        else:
            adapter.whole[parameter] = array
    odd += [f"{layer} without A or B" for layer, parts in adapter.factors.items() if len(parts) < 2]
    if odd:
        some = ", ".join(name[:100] if name.isprintable() else ascii(name[:100]) for name in odd[:5])
        raise CheckpointError(f"{path}: {len(odd)} of its tensors cannot be merged here ({some}); {_MERGE}")
    if not adapter.factors and not adapter.whole:
        raise CheckpointError(f"{path}: its adapter has no tensors; download it again")
    return adapter


def _tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    file = next((path / name for name in _WEIGHTS if (path / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{path} has no {' or '.join(_WEIGHTS)}; download it again")
    if not torch_pickle.is_torch_file(file):
        return safetensors.tensors(file)
    state = torch_pickle.load(file)
    if not torch_pickle.is_state(state):
        raise CheckpointError(f"{file} contains more than tensors by name; it may be malicious")
    return torch_pickle.arrays(file, state)


def _scale(config: dict[str, Any], layer: str, rank: int, path: Path) -> float:
    alpha, patterns = config.get("lora_alpha", 8), config.get("alpha_pattern") or {}
    for name in patterns:
        if not re.fullmatch(r"[\w.]+", name):  # a regular expression in peft
            raise CheckpointError(f"{path}: alpha_pattern {name!r:.80} is not a plain name; {_MERGE}")
    alpha = next((patterns[name] for name in patterns if layer == name or layer.endswith(f".{name}")), alpha)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha) or rank < 1:
        raise CheckpointError(
            f"{path / CONFIG}: lora_alpha={alpha!r:.80} with rank {rank} is invalid; download it again"
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _merged(
    base: Checkpoint, adapter: _Adapter, scales: dict[str, float], path: Path
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the base model's tensors; those changed by the adapter are float32."""
    rows = [p.stored for p in parameters(base.config) if "hf" in p.stored and base.format in p.stored]
    names: dict[str, tuple[str, Axes, Axes]] = {
        stored[base.format].name: (stored["hf"].name, stored[base.format].axes, stored["hf"].stored_axes)
        for stored in rows
    }
    left = {*adapter.whole, *(f"{layer}.weight" for layer in adapter.factors)}
    for name, array in base.tensors:
        changed, axes, hf_axes = names.get(name, ("", (), ()))
        if changed not in left:
            yield name, array
            continue
        left.remove(changed)
        # To Hugging Face's axis order and back.
        order = tuple(axes[axis] for axis in hf_axes)
        array = array.transpose(order).astype(np.float32)
        array = _changed(array, adapter, scales, changed, path)
        yield name, np.ascontiguousarray(array.transpose(np.argsort(order)))
    if left:
        raise CheckpointError(f"{path} changes {', '.join(sorted(left)[:5])}, which its base model lacks; {_MERGE}")


def _changed(array: np.ndarray, adapter: _Adapter, scales: dict[str, float], name: str, path: Path) -> np.ndarray:
    whole = adapter.whole.get(name)
    if whole is not None:
        if whole.shape != array.shape:
            raise CheckpointError(f"{path}: {name} is {whole.shape}, in its base model {array.shape}; {_MERGE}")
        array = whole.astype(np.float32)
    parts = adapter.factors.get(layer := name.removesuffix(".weight"))
    if parts is None or not name.endswith(".weight"):
        return array
    a, b = parts["A"].astype(np.float32), parts["B"].astype(np.float32)
    if b.shape[1:] != a.shape[:1] or (b.shape[0], a.shape[1]) != array.shape:
        raise CheckpointError(f"{path}: {layer} has A {a.shape} and B {b.shape} for a weight {array.shape}; {_MERGE}")
    return array + np.float32(scales[layer]) * (b @ a)
