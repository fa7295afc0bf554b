"""Regular expressions as trees, and rules that refer to each other solved into one of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

MAX_STEPS = 200_000  # of solving rules
MAX_CODE_POINT = 0x10FFFF

Intervals = tuple[tuple[int, int], ...]  # of code points, inclusive


@dataclass(frozen=True, eq=False)
class Node:
    """An expression; `parts` are what it consists of."""

    parts: tuple[Node, ...] = ()

    @cached_property
    def references(self) -> frozenset[str]:
        """Names of the rules that it refers to."""
        return frozenset().union(*(part.references for part in self.parts))

    def with_parts(self, parts: Iterable[Node]) -> Self:
        return replace(self, parts=tuple(parts))


@dataclass(frozen=True, eq=False)
class Chars(Node):
    """One character of a set."""

    intervals: Intervals = ()


class Sequence(Node):
    """All parts in order; without parts, the empty text."""


class Choice(Node):
    """Any of the parts; without parts, nothing matches."""


@dataclass(frozen=True, eq=False)
class Repeat(Node):
    """Its part, at least so many times and at most so many; None for any number."""

    least: int = 0
    most: int | None = None


@dataclass(frozen=True, eq=False)
class Reference(Node):
    """A rule, by name."""

    name: str = ""

    @cached_property
    def references(self) -> frozenset[str]:
        return frozenset([self.name])


class NotRegularError(ValueError):
    """No automaton has all texts of the rules."""


EMPTY: Node = Sequence()
NOTHING: Node = Choice()


def literal(text: str) -> Node:
    return Sequence(tuple(Chars(intervals=((ord(c), ord(c)),)) for c in text))


def optional(node: Node) -> Node:
    return Repeat((node,), 0, 1)


def complement(intervals: Intervals) -> Intervals:
    """All other code points."""
    found, start = [], 0
    for low, high in sorted(intervals):
        if low > start:
            found.append((start, low - 1))
        start = max(start, high + 1)
    if start <= MAX_CODE_POINT:
        found.append((start, MAX_CODE_POINT))
    return tuple(found)


class Rules:
    """Rules by name, solved into expressions without references.

    Recursion at the left or right end of a rule is repetition. Other recursion is not regular: `NotRegularError`.
    """

    def __init__(self, rules: Mapping[str, Node]):
        self._rules, self._solved, self._steps = rules, dict[str, Node](), 0

    def solve(self, name: str, within: tuple[str, ...] = ()) -> Node:
        """The expression of a rule, with references only to those that it is expanded within."""
        if name in within:
            return Reference(name=name)
        if name not in self._solved:
            body = self._expand(self._rules[name], (*within, name))
            solved = self._without(body, name) if name in body.references else body
            if solved.references:
                return solved
            self._solved[name] = solved
        return self._solved[name]

    def _expand(self, node: Node, within: tuple[str, ...]) -> Node:
        self._step()
        if isinstance(node, Reference):
            return self.solve(node.name, within)
        if not node.references:
            return node
        return node.with_parts([self._expand(part, within) for part in node.parts])

    def _without(self, body: Node, name: str) -> Node:
        """The solution of name = body, by Arden's rule."""
        try:
            again, rest = self._split(body, name, at_end=False)
            return Sequence((rest, Repeat((again,))))
        except NotRegularError:
            again, rest = self._split(body, name, at_end=True)
            return Sequence((Repeat((again,)), rest))

    def _split(self, node: Node, name: str, *, at_end: bool) -> tuple[Node, Node]:
        """(a, b) such that the node is b, or a beside `name`. at_end: a precedes it; else it follows."""
        self._step()
        if name not in node.references:
            return NOTHING, node
        if isinstance(node, Reference):
            return EMPTY, NOTHING
        if isinstance(node, Choice):
            pairs = [self._split(part, name, at_end=at_end) for part in node.parts]
            repeated = tuple(a for a, _ in pairs if a is not NOTHING)
            return Choice(repeated) if repeated else NOTHING, Choice(tuple(b for _, b in pairs))
        if isinstance(node, Sequence):
            *others, last = node.parts if at_end else node.parts[::-1]
            if not any(name in part.references for part in others):

                def joined(part: Node) -> Node:
                    parts = [*others, part]
                    return NOTHING if part is NOTHING else Sequence(tuple(parts if at_end else parts[::-1]))

                again, rest = self._split(last, name, at_end=at_end)
                return joined(again), joined(rest)
        if isinstance(node, Repeat) and (node.least, node.most) == (0, 1):
            again, rest = self._split(node.parts[0], name, at_end=at_end)
            return again, Choice((rest, EMPTY))
        raise NotRegularError(f"rule {name!r} contains itself other than at one end")

    def _step(self) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise ValueError("its rules refer to each other in too many ways; simplify them")
