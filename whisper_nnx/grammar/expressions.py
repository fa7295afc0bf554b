"""Regular expressions as trees, and rules that refer to each other solved into one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

MAX_NESTING = 5  # how often a rule may occur within itself, other than at one end
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

    Recursion at the left or right end of a rule is repetition. Other recursion is not regular: there a rule occurs
    within itself up to `MAX_NESTING` times, and deeper nesting does not match.
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
        return _with_parts(node, [self._expand(part, within) for part in node.parts]) if node.references else node

    def _without(self, body: Node, name: str) -> Node:
        """The solution of name = body: by Arden's rule at an end of the body, by nesting within it."""
        inner: Node = NOTHING
        for _ in range(MAX_NESTING):
            again, rest = self._split(body, name, inner, at_end=False)
            if again is NOTHING:
                again, rest = self._split(body, name, inner, at_end=True)
                inner = Sequence((Repeat((again,)), rest))
            else:
                inner = Sequence((rest, Repeat((again,))))
        return inner

    def _split(self, node: Node, name: str, inner: Node, *, at_end: bool) -> tuple[Node, Node]:
        """(a, b) such that the node is b, or a beside `name`; within both, `name` stands for `inner`.

        at_end: a precedes it; else it follows.
        """
        self._step()
        if name not in node.references:
            return NOTHING, node
        if isinstance(node, Reference):
            return EMPTY, NOTHING
        if isinstance(node, Choice):
            pairs = [self._split(part, name, inner, at_end=at_end) for part in node.parts]
            repeated = tuple(a for a, _ in pairs if a is not NOTHING)
            return Choice(repeated) if repeated else NOTHING, Choice(tuple(b for _, b in pairs))
        if isinstance(node, Sequence):
            *others, last = node.parts if at_end else node.parts[::-1]
            kept = [self._substitute(part, name, inner) for part in others]

            def joined(part: Node) -> Node:
                parts = [*kept, part]
                return NOTHING if part is NOTHING else Sequence(tuple(parts if at_end else parts[::-1]))

            again, rest = self._split(last, name, inner, at_end=at_end)
            return joined(again), joined(rest)
        if isinstance(node, Repeat) and (node.least, node.most) == (0, 1):
            again, rest = self._split(node.parts[0], name, inner, at_end=at_end)
            return again, Choice((rest, EMPTY))
        return NOTHING, self._substitute(node, name, inner)

    def _substitute(self, node: Node, name: str, value: Node) -> Node:
        self._step()
        if name not in node.references:
            return node
        if isinstance(node, Reference):
            return value
        return _with_parts(node, [self._substitute(part, name, value) for part in node.parts])

    def _step(self) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise ValueError("its rules refer to each other in too many ways; simplify them")


def _with_parts(node: Node, parts: list[Node]) -> Node:
    if isinstance(node, Repeat):
        return Repeat(tuple(parts), node.least, node.most)
    return type(node)(tuple(parts))
