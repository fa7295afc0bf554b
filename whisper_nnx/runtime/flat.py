"""`Flat`: a module as the list of its arrays, which a jitted function takes in a fraction of the time.

Each call of a jitted function takes its arguments apart. For a module of hundreds of arrays, in Python, that takes
milliseconds; for a `Flat` one microseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ClassVar

import jax
from flax import nnx


class Structure:
    """A tree's structure. There is one object for each, so that comparing two takes no time."""

    known: ClassVar[dict[Any, Structure]] = {}

    def __init__(self, tree: Any):
        self.tree = tree

    @classmethod
    def of(cls, tree: Any) -> Structure:
        return cls.known.setdefault(tree, cls(tree))


@jax.tree_util.register_pytree_node_class
class Flat:
    """The arrays of a module as they are now. Other attributes are the module's."""

    def __init__(self, module: Any):
        leaves, tree = jax.tree.flatten(module)
        self.leaves, self.structure, self._module = tuple(leaves), Structure.of(tree), module

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "_module" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._module, name)

    def tree_flatten(self) -> tuple[tuple[Any, ...], Structure]:
        return self.leaves, self.structure

    @classmethod
    def tree_unflatten(cls, structure: Structure, leaves: Any) -> Flat:
        one = object.__new__(cls)
        one.leaves, one.structure = tuple(leaves), structure
        return one

    def whole(self) -> Any:
        """The module of these arrays."""
        return jax.tree.unflatten(self.structure.tree, self.leaves)


def flat(value: Any) -> Any:
    """A module as a `Flat` one; anything else as it is."""
    return Flat(value) if isinstance(value, nnx.Module) else value


def whole(value: Any) -> Any:
    """The module of a `Flat` one; anything else as it is."""
    return value.whole() if isinstance(value, Flat) else value


def takes_flat(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose modules may be `Flat` ones."""

    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        return function(*map(whole, args), **{name: whole(value) for name, value in options.items()})

    return call
