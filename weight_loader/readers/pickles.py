"""Pickles of tensors, read without running anything.

A pickle is a program for a stack machine, which may call any importable function. The machine here is our own: it knows
the instructions that dictionaries of tensors need, and the few names in `_CALLS` and `_STORAGES`, for which it makes
plain data. It imports nothing and calls nothing else. Its memory stays within what a pickle of that length can fill.

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
    """A view of a storage: where its numbers are, not yet the numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in numbers

    def __post_init__(self) -> None:
        matching = len(self.shape) == len(self.strides) <= 8
        if not matching or not all(map(_whole, (*self.shape, *self.strides, self.offset))):
            raise Refused(f"a tensor of shape {short(self.shape)} with strides {short(self.strides)}")
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        size = math.prod(self.shape)
        # One number seen many times over could ask for any amount of memory.
        if size and (last >= self.storage.length or size > self.storage.length):
            raise Refused(f"a tensor of shape {short(self.shape)} that reaches beyond its storage")


class Refused(ValueError):
    """What a pickle asks for and does not get."""


def _whole(number: Any) -> bool:
    return type(number) is int and 0 <= number < 2**48


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxlong = 2, 80, 40


def short(value: Any) -> str:
    """In a few words: values that hold one another may be endless when written out."""
    return " ".join(_REPR.repr(value).split())


class _Name(NamedTuple):
    """What a pickle names in order to call it; here a text."""

    name: str


_MARK = _Name("(a mark)")


class _Machine:
    """Its memory: a stack, on which MARK leaves marks, and a memo of numbered values."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def pop_to_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise Refused("an instruction without its mark")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def pop(self, number: int = 1) -> tuple[Any, ...]:
        if len(self.stack) < number:
            raise Refused("an instruction without its values")
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
        raise Refused(f"a tensor made of {short((storage, shape, strides))}")
    return Tensor(storage, offset, shape, strides)


def _parameter(data: Any, requires_grad: Any = False, hooks: Any = None) -> Any:
    return data


def _dictionary() -> dict[Any, Any]:
    """torch fills it afterwards. Made of what is given, it could be filled without end."""
    return {}


# What may be called, and what is done instead.
_CALLS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": _dictionary,
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
}


def _global(name: str) -> _Name:
    if name not in _CALLS and name not in _STORAGES:
        raise Refused(f"the global {short(name.replace(' ', '.'))}, which weights do not need")
    return _Name(name)


def _reduce(called: Any, arguments: Any) -> Any:
    if not isinstance(called, _Name) or called.name not in _CALLS or not isinstance(arguments, tuple):
        raise Refused(f"a call of {short(called)}")
    return _CALLS[called.name](*arguments)


def _persistent(identity: Any) -> Storage:
    match identity:
        case ("storage", _Name(kind), str(key), str(), int(length)) if kind in _STORAGES and _whole(length):
            if re.fullmatch(r"\w{1,40}", key, re.ASCII):
                return Storage(key, _STORAGES[kind], length)
    raise Refused(f"the storage {short(identity)}")


def _set(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict) or len(items) % 2:
        raise Refused("items that are set in no dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int):  # the hash of a deep tuple takes forever, or the process with it
            raise Refused(f"a dictionary's key of type {type(key).__name__}")
        target[key] = value


def _extend(target: Any, items: list[Any]) -> None:
    if not isinstance(target, list):
        raise Refused("items that are appended to no list")
    target.extend(items)


def _memoize(machine: _Machine, at: int | None) -> None:
    if not machine.stack:
        raise Refused("nothing to keep")
    machine.memo[len(machine.memo) if at is None else at] = machine.stack[-1]


def _recall(machine: _Machine, at: int) -> None:
    if at not in machine.memo:
        raise Refused(f"a value number {at} that was never kept")
    machine.stack.append(machine.memo[at])


def _stack_global(machine: _Machine) -> None:
    module, name = machine.pop(2)
    machine.stack.append(_global(f"{module} {name}"))


def _push(value: Callable[[Any], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, argument: machine.stack.append(value(argument))


def _combine(number: int, function: Callable[..., Any]) -> Callable[[_Machine, Any], None]:
    """Replaces the last values by what the function makes of them."""
    return lambda machine, _: machine.stack.append(function(*machine.pop(number)))


def _change(function: Callable[[Any, list[Any]], None], number: int) -> Callable[[_Machine, Any], None]:
    """Lets the function change the value below the last ones (number 0: those behind the mark)."""

    def change(machine: _Machine, _: Any) -> None:
        items = list(machine.pop(number)) if number else machine.pop_to_mark()
        if not machine.stack:
            raise Refused("nothing to change")
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
    """Raises ValueError for what is cut off, or asks for anything that is not in the tables above."""
    machine = _Machine()
    for instruction, argument, _ in pickletools.genops(data):
        if instruction.name not in _INSTRUCTIONS:
            raise Refused(f"the instruction {instruction.name}, which weights do not need")
        _INSTRUCTIONS[instruction.name](machine, argument)
    return machine.pop()[0]
