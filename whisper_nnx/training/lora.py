"""Low-rank additions to frozen products (Hu et al. 2021): y = x W + b + alpha / rank (x A) B."""

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
    """A factor of an addition: what is trained."""


class LoraLinear(Module):
    """A linear layer and its addition; at first that is 0, since B is."""

    def __init__(self, base: nnx.Linear, rank: int, alpha: float, rngs: nnx.Rngs):
        self.base = base
        self.scale = alpha / rank
        spread = nnx.initializers.normal(base.in_features**-0.5)
        self.a = LoraParam(spread(rngs.params(), (base.in_features, rank), jnp.float32))
        self.b = LoraParam(jnp.zeros((rank, base.out_features), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [...,n_in] -> [...,n_out]."""
        (n_in, rank), n_out = self.a.shape, self.base.out_features
        # For each row: three products with both factors, gradients included, or the whole gradient of W.
        if 3 * rank * (n_in + n_out) > n_in * n_out:
            return _shifted(self.base, self.addition())(x)
        dtype = self.base.dtype or x.dtype
        low = ops.linear(x.astype(dtype), self.a[...].astype(dtype))
        return self.base(x) + ops.linear(low, (self.scale * self.b[...]).astype(dtype))

    def addition(self) -> jax.Array:
        """[n_in,n_out], float32: what W grows by."""
        return self.scale * jnp.matmul(self.a[...], self.b[...], precision=jax.lax.Precision.HIGHEST)


def add_lora(model: Whisper, config: LoraConfig, rngs: nnx.Rngs) -> Whisper:
    """A copy of the model in which every linear layer that is named in `config.targets` has an addition.

    A target is the end of a path: "q_proj" is in all attentions, "encoder_attn.q_proj" in the decoder's to the sound.
    Raises ValueError for a target that no layer has, and for a rank below 1.
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
    """A plain copy of the model with the additions inside of its weights: the same outputs, no further cost."""
    return _replaced(model, LoraLinear, lambda _, layer: _shifted(layer.base, layer.addition()))


def unmerge(merged: Whisper, model: Whisper) -> Whisper:
    """The inverse of `merge`: takes the additions of `model` out of the merged weights and puts them beside these.

    Up to rounding: a sum in float32 that is subtracted again is off by half a unit of its last place.
    """
    additions = dict(_submodules(model, LoraLinear))

    def split(path: str, layer: nnx.Linear) -> nnx.Module:
        if path not in additions:
            return layer
        wrapped = nnx.clone(additions[path])
        wrapped.base = _shifted(layer, -wrapped.addition())
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
    """A copy of the model with `change(path, layer)` in the place of every layer of a kind, outermost first."""
    model = nnx.clone(model)
    for path, layer in list(_submodules(model, kind)):
        *parents, name = path.split(".")
        setattr(_at(model, parents), name, change(path, layer))
    return model


def _at(module: Any, names: Sequence[str]) -> Any:
    for name in names:
        module = module[int(name)] if name.isdigit() else getattr(module, name)
    return module
