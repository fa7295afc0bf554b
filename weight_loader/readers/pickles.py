"""Reads pickles of tensors without executing them.

A pickle is a program for a stack machine, which may call any importable function. This restricted machine supports only
the instructions that dictionaries of tensors need, and the names in `_CALLS` and `_STORAGES`, for which it makes plain
data. It imports and calls nothing else. Its memory is bounded by the pickle's length.

https://docs.python.org/3/library/pickletools.html
"""

from __future__ import annotations

import math
import pickletools
import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

_STORAGES = {
    "torch DoubleStorage": "float64",
    "torch FloatStorage": "float32",
    "torch HalfStorage": "float16",
    "torch BFloat16Storage": "bfloat16",
    "torch LongStorage": "int64",
    "torch IntStorage": "int32",
    "torch ShortStorage": "int16",
    "torch CharStorage": "int8",
    "torch ByteStorage": "uint8",
    "torch BoolStorage": "bool",
}


class Storage(NamedTuple):
    key: str
    dtype: str
    length: int  # numbers


@dataclass(frozen=True)
class Tensor:
    """A view of a storage, without its data."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in numbers

    def __post_init__(self) -> None:
        matching = len(self.shape) == len(self.strides) <= 8
        if not matching or not all(map(_whole, (*self.shape, *self.strides, self.offset))):
            raise Rejected(f"a tensor of shape {short(self.shape)} with strides {short(self.strides)}")
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        size = math.prod(self.shape)
        # A view that repeats one number could claim any amount of memory.
        if size and (last >= self.storage.length or size > self.storage.length):
            raise Rejected(f"a tensor of shape {short(self.shape)} that exceeds its storage")


class Rejected(ValueError):
    """A pickle contains something unsupported."""


def _whole(number: Any) -> bool:
    return type(number) is int and 0 <= number < 2**48


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxlong = 2, 80, 40


def short(value: Any) -> str:
    """Shortens a value's repr, which may be infinite for values that contain each other."""
    return " ".join(_REPR.repr(value).split())


class _Name(NamedTuple):
    """A global that a pickle names to call it."""

    name: str


_MARK = _Name("(a mark)")


class _Machine:
    """The machine's memory: a stack with marks, and a memo of numbered values."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def pop_to_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise Rejected("an instruction without its mark")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def pop(self, number: int = 1) -> tuple[Any, ...]:
        if len(self.stack) < number:
            raise Rejected("an instruction without its values")
        items = tuple(self.stack[len(self.stack) - number :])
        del self.stack[len(self.stack) - number :]
        return items


def _tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any = False,
    hooks: Any = None,
    metadata: Any = None,
) -> Tensor:
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise Rejected(f"a tensor made of {short((storage, shape, strides))}")
    return Tensor(storage, offset, shape, strides)


def _parameter(data: Any, requires_grad: Any = False, hooks: Any = None) -> Any:
    return data


def _dictionary() -> dict[Any, Any]:
    """Ignores arguments; torch fills the dictionary later."""
    return {}


# Functions that may be called, and their replacements.
_CALLS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": _dictionary,
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
}


def _global(name: str) -> _Name:
    if name not in _CALLS and name not in _STORAGES:
        raise Rejected(f"the global {short(name.replace(' ', '.'))}, which weights do not need")
    return _Name(name)


def _reduce(called: Any, arguments: Any) -> Any:
    if not isinstance(called, _Name) or called.name not in _CALLS or not isinstance(arguments, tuple):
        raise Rejected(f"a call of {short(called)}")
    return _CALLS[called.name](*arguments)


def _persistent(identity: Any) -> Storage:
    match identity:
        case ("storage", _Name(kind), str(key), str(), int(length)) if kind in _STORAGES and _whole(length):
            if re.fullmatch(r"\w{1,40}", key, re.ASCII):
                return Storage(key, _STORAGES[kind], length)
    raise Rejected(f"the storage {short(identity)}")


def _set(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict) or len(items) % 2:
        raise Rejected("items set outside a dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int):  # hashing a deep tuple may take forever or crash
            raise Rejected(f"a dictionary's key of type {type(key).__name__}")
        target[key] = value


def _extend(target: Any, items: list[Any]) -> None:
    if not isinstance(target, list):
        raise Rejected("items appended outside a list")
    target.extend(items)


def _memoize(machine: _Machine, at: int | None) -> None:
    if not machine.stack:
        raise Rejected("nothing to memoize")
    machine.memo[len(machine.memo) if at is None else at] = machine.stack[-1]


def _recall(machine: _Machine, at: int) -> None:
    if at not in machine.memo:
        raise Rejected(f"a value number {at} that was never memoized")
    machine.stack.append(machine.memo[at])


def _stack_global(machine: _Machine) -> None:
    module, name = machine.pop(2)
    machine.stack.append(_global(f"{module} {name}"))


def _push(value: Callable[[Any], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, argument: machine.stack.append(value(argument))


def _combine(number: int, function: Callable[..., Any]) -> Callable[[_Machine, Any], None]:
    """Replaces the last values by the function's result."""
    return lambda machine, _: machine.stack.append(function(*machine.pop(number)))


def _change(function: Callable[[Any, list[Any]], None], number: int) -> Callable[[_Machine, Any], None]:
    """Applies the function to the value below the last ones (number 0: those after the mark)."""

    def change(machine: _Machine, _: Any) -> None:
        items = list(machine.pop(number)) if number else machine.pop_to_mark()
        if not machine.stack:
            raise Rejected("nothing to change")
        function(machine.stack[-1], items)

    return change


_INSTRUCTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda machine, _: None),
    **dict.fromkeys(
        (
            *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
            *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        ),
        _push(lambda value: value),
    ),
    "NONE": _push(lambda _: None),
    "NEWTRUE": _push(lambda _: True),
    "NEWFALSE": _push(lambda _: False),
    "MARK": _push(lambda _: _MARK),
    "EMPTY_DICT": _push(lambda _: {}),
    "EMPTY_LIST": _push(lambda _: []),
    "EMPTY_TUPLE": _push(lambda _: ()),
    "GLOBAL": _push(_global),
    "STACK_GLOBAL": lambda machine, _: _stack_global(machine),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.pop_to_mark())),
    "TUPLE1": _combine(1, lambda *items: items),
    "TUPLE2": _combine(2, lambda *items: items),
    "TUPLE3": _combine(3, lambda *items: items),
    "REDUCE": _combine(2, _reduce),
    "BINPERSID": _combine(1, _persistent),
    "BUILD": _change(lambda target, state: None, 1),  # a state_dict's _metadata: versions of modules
    "SETITEM": _change(_set, 2),
    "SETITEMS": _change(_set, 0),
    "APPEND": _change(_extend, 1),
    "APPENDS": _change(_extend, 0),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _memoize),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _recall),
}


def unpickle(data: bytes) -> Any:
    """Reads a pickle. Raises ValueError if it is truncated or uses anything that is not in the tables above."""
    machine = _Machine()
    for instruction, argument, _ in pickletools.genops(data):
        if instruction.name not in _INSTRUCTIONS:
            raise Rejected(f"the instruction {instruction.name}, which weights do not need")
        _INSTRUCTIONS[instruction.name](machine, argument)
    return machine.pop()[0]
