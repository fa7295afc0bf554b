"""`print(model)`: the tree of modules with shapes, types and sizes on a page, equal layers once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import jax.numpy as jnp
from flax import nnx

_LISTS = (nnx.List, list, tuple)
_PARENTS = (nnx.Module, *_LISTS)


class Module(nnx.Module):
    """An `nnx.Module` whose text is `summarize`'s. In IPython, `nnx.display` shows every array, by treescope."""

    def __repr__(self) -> str:
        return summarize(self)

    def __str__(self) -> str:
        return repr(self)


def summarize(module: nnx.Module, *notes: str) -> str:
    """One line per module with its arrays; consecutive equal ones are "4 x ...".

    The first line has the number of parameters, the size and dtypes of all arrays, and the notes.
    """
    name, *rest = _lines(module)
    return "\n".join([f"{name}  # {', '.join([_size(module), *notes])}", *rest])


def _lines(value: Any) -> Iterator[str]:
    """Lines of a module or an array, with children indented."""
    if isinstance(value, nnx.Variable):
        yield _array(value)
        return
    children = dict(_children(value))
    name = f"{type(value).__name__}{_settings(value)}"
    if all(isinstance(child, nnx.Variable) for child in children.values()):
        yield f"{name}({', '.join(f'{key} {_array(child)}' for key, child in children.items())})"
        return
    yield f"{name}("
    for key, child in children.items():
        is_list = isinstance(child, _LISTS)
        for text, same in groupby("\n".join(_lines(item)) for item in (child if is_list else [child])):
            count = f"{len(list(same))} x " if is_list else ""
            first, *rest = text.splitlines()
            yield f"  {key}: {count}{first}"
            yield from (f"  {line}" for line in rest)
    yield ")"


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    """Arrays, and modules that have some."""
    for key, child in vars(value).items() if isinstance(value, nnx.Module) else ():
        if isinstance(child, nnx.Variable) or (isinstance(child, _PARENTS) and any(True for _ in _variables(child))):
            yield key, child


def _variables(value: Any) -> Iterator[nnx.Variable]:
    if isinstance(value, nnx.Variable):
        yield value
    elif isinstance(value, _LISTS):
        for item in value:
            yield from _variables(item)
    else:
        for _, child in _children(value):
            yield from _variables(child)


def _settings(value: Any) -> str:
    """Settings that the shapes do not show."""
    heads = getattr(value, "heads", None)
    return f"[{heads} heads]" if isinstance(heads, int) else ""


def _array(variable: nnx.Variable) -> str:
    """JAX's abbreviation, float32[384,1536]; the type of whatever a transformation has put in an array's place."""
    value = variable.get_value()
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        return type(value).__name__
    return f"{value.dtype}[{','.join(map(str, value.shape))}]"


def _size(module: nnx.Module) -> str:
    held = {id(variable): variable for variable in _variables(module)}
    arrays = [(v, v.get_value()) for v in held.values() if hasattr(v.get_value(), "shape")]
    parameters = sum(math.prod(x.shape) for variable, x in arrays if isinstance(variable, nnx.Param))
    types = sorted({str(x.dtype) for _, x in arrays})
    megabytes = sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for _, x in arrays) / 1e6
    return f"{parameters:,} parameters, {megabytes:.1f} MB ({', '.join(types)})"
