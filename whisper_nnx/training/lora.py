"""LoRA, low-rank updates of frozen matrices (Hu et al. 2021): y = x W + b + alpha / rank (x A) B."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from whisper_nnx import ops
from whisper_nnx.model.summary import Module
from whisper_nnx.model.whisper import Whisper
from whisper_nnx.training.config import LoraConfig

AnyModule = TypeVar("AnyModule", bound=nnx.Module)


class LoraParam(nnx.LoRAParam):
    """A trained LoRA factor."""


class LoraLinear(Module):
    """A linear layer with a low-rank update, initially 0 since B is 0."""

    def __init__(self, base: nnx.Linear, rank: int, alpha: float, rngs: nnx.Rngs):
        self.base = base
        self.scale = alpha / rank
        spread = nnx.initializers.normal(base.in_features**-0.5)
        self.a = LoraParam(spread(rngs.params(), (base.in_features, rank), jnp.float32))
        self.b = LoraParam(jnp.zeros((rank, base.out_features), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer to x [...,n_in]; returns [...,n_out]."""
        (n_in, rank), n_out = self.a.shape, self.base.out_features
        # Per row: three matmuls with both factors, gradients included, against one full gradient of W.
        if 3 * rank * (n_in + n_out) > n_in * n_out:
            return _shifted(self.base, self.delta())(x)
        dtype = self.base.dtype or x.dtype
        low = ops.linear(x.astype(dtype), self.a[...].astype(dtype))
        return self.base(x) + ops.linear(low, (self.scale * self.b[...]).astype(dtype))

    def delta(self) -> jax.Array:
        """Returns the update of W, [n_in,n_out], float32."""
        return self.scale * jnp.matmul(self.a[...], self.b[...], precision=jax.lax.Precision.HIGHEST)


def add_lora(model: Whisper, config: LoraConfig, rngs: nnx.Rngs) -> Whisper:
    """Copies the model with LoRA on every linear layer named in `config.targets`.

    A target is the end of a path: "q_proj" matches all attentions, "encoder_attn.q_proj" only cross-attention.
    Raises ValueError for a target that matches no layer, and for a rank below 1.
    """
    if config.rank < 1:
        raise ValueError(f"lora.rank={config.rank} must be at least 1")
    paths = [path for path, _ in _submodules(model, nnx.Linear)]
    for target in config.targets:
        if not any(_ends(path, target) for path in paths):
            names = sorted({path.rsplit(".", 1)[-1] for path in paths})
            raise ValueError(f"lora.targets: no layer is named {target!r}; choose from {', '.join(names)}")

    def wrap(path: str, layer: nnx.Linear) -> nnx.Module:
        chosen = any(_ends(path, target) for target in config.targets)
        return LoraLinear(layer, config.rank, config.alpha, rngs) if chosen else layer

    return _replaced(model, nnx.Linear, wrap)


def merge(model: Whisper) -> Whisper:
    """Copies the model with the updates merged into its weights: the same outputs at no extra cost."""
    return _replaced(model, LoraLinear, lambda _, layer: _shifted(layer.base, layer.delta()))


def unmerge(merged: Whisper, model: Whisper) -> Whisper:
    """Inverts `merge`: subtracts the updates of `model` from the merged weights and keeps them as LoRA layers.

    Exact up to float32 rounding of the sum, half a unit in the last place.
    """
    updates = dict(_submodules(model, LoraLinear))

    def split(path: str, layer: nnx.Linear) -> nnx.Module:
        if path not in updates:
            return layer
        wrapped = nnx.clone(updates[path])
        wrapped.base = _shifted(layer, -wrapped.delta())
        return wrapped

    return _replaced(merged, nnx.Linear, split)


def _shifted(layer: nnx.Linear, by: jax.Array) -> nnx.Linear:
    layer = nnx.clone(layer)
    kernel = layer.kernel[...]
    layer.kernel.set_value((kernel.astype(jnp.float32) + by).astype(kernel.dtype))
    return layer


def _ends(path: str, target: str) -> bool:
    return path == target or path.endswith("." + target)


def _submodules(model: nnx.Module, kind: type[AnyModule]) -> Iterator[tuple[str, AnyModule]]:
    for path, module in nnx.iter_modules(model):
        if isinstance(module, kind):
            yield ".".join(map(str, path)), module


def _replaced(model: Whisper, kind: type[Any], change: Callable[[str, Any], nnx.Module]) -> Whisper:
    """Copies the model and replaces every layer of a kind by `change(path, layer)`, outermost first."""
    model = nnx.clone(model)
    for path, layer in list(_submodules(model, kind)):
        *parents, name = path.split(".")
        setattr(_at(model, parents), name, change(path, layer))
    return model


def _at(module: Any, names: Sequence[str]) -> Any:
    for name in names:
        module = module[int(name)] if name.isdigit() else getattr(module, name)
    return module
