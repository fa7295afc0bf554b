"""From an expression to the smallest deterministic automaton over the bytes of UTF-8."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from whisper_nnx.grammar.expressions import Chars, Choice, Intervals, Node, Repeat, Sequence

MAX_STATES = 4096
_MAX_PARTS = 50_000  # states of the nondeterministic automaton
_MAX_WORK = 4_000_000  # of its states and edges looked at
_LAST_OF_LENGTH = (0x7F, 0x7FF, 0xFFFF, 0x10FFFF)


@dataclass(frozen=True)
class ByteAutomaton:
    """A minimal automaton whose states all lead to an end.

    table: [S,256], the next state, or -1. ends: [S], whether the text may end. It starts in state 0.
    """

    table: np.ndarray
    ends: np.ndarray


def byte_automaton(expression: Node) -> ByteAutomaton:
    """Raises ValueError if it would have more than `MAX_STATES` states, or matches nothing."""
    try:
        parts = _Parts()
        end = parts.add(expression, parts.new())
    except RecursionError:
        raise ValueError("is nested too deeply; simplify it") from None
    table, ends = _deterministic(parts, end)
    return _minimal(table, ends)


@dataclass
class _Parts:
    """A nondeterministic automaton: edges (first byte, last byte, next state) and jumps of each state."""

    edges: list[list[tuple[int, int, int]]] = field(default_factory=list)
    jumps: list[list[int]] = field(default_factory=list)
    added: int = 0  # expressions, of which empty ones need no state

    def new(self) -> int:
        if len(self.edges) >= _MAX_PARTS:
            raise ValueError(f"is too large: it has more than {_MAX_PARTS} parts; simplify it")
        self.edges.append([])
        self.jumps.append([])
        return len(self.edges) - 1

    def add(self, node: Node, start: int) -> int:
        """Adds an expression after a state -> the state after it."""
        self.added += 1
        if self.added >= 4 * _MAX_PARTS:
            raise ValueError(f"is too large: it has more than {_MAX_PARTS} parts; simplify it")
        if isinstance(node, Sequence):
            for part in node.parts:
                start = self.add(part, start)
            return start
        if isinstance(node, Repeat):
            return self._repeat(node, start)
        end = self.new()
        if isinstance(node, Choice):
            for part in node.parts:
                self.jumps[self.add(part, start)].append(end)
        elif isinstance(node, Chars):
            for ranges in utf8_ranges(node.intervals):
                here = start
                for low, high in ranges[:-1]:
                    middle = self.new()
                    self.edges[here].append((low, high, middle))
                    here = middle
                self.edges[here].append((*ranges[-1], end))
        return end

    def _repeat(self, node: Repeat, start: int) -> int:
        [part] = node.parts
        for _ in range(node.least):
            start = self.add(part, start)
        if node.most is None:
            hub = self.new()
            self.jumps[start].append(hub)
            self.jumps[self.add(part, hub)].append(hub)
            return hub
        end = self.new()
        for _ in range(node.most - node.least):
            self.jumps[start].append(end)
            start = self.add(part, start)
        self.jumps[start].append(end)
        return end


@lru_cache(maxsize=256)
def utf8_ranges(intervals: Intervals) -> list[list[tuple[int, int]]]:
    """Sequences of byte ranges that match the UTF-8 of code points, without surrogates."""
    found: list[list[tuple[int, int]]] = []
    for low, high in intervals:
        for first, last in ((low, min(high, 0xD7FF)), (max(low, 0xE000), high)):
            start = first
            for limit in _LAST_OF_LENGTH:
                if start <= min(last, limit):
                    found += _of_one_length(start, min(last, limit))
                    start = limit + 1
    return found


def _of_one_length(low: int, high: int) -> list[list[tuple[int, int]]]:
    """Splits a range until the bytes that follow the first different ones may be any."""
    for rest in (6, 12, 18):
        size = 1 << rest
        if high >= 0x80 and low // size != high // size:
            if low % size:
                middle = low - low % size + size
                return _of_one_length(low, middle - 1) + _of_one_length(middle, high)
            if high % size != size - 1:
                middle = high - high % size
                return _of_one_length(low, middle - 1) + _of_one_length(middle, high)
    return [list(zip(chr(low).encode(), chr(high).encode(), strict=True))]


def _deterministic(parts: _Parts, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Subset construction."""
    closures: dict[int, frozenset[int]] = {}
    work = 0

    def closure(state: int) -> frozenset[int]:
        nonlocal work
        if state not in closures:
            seen, waiting = {state}, [state]
            while waiting:
                new = [other for other in parts.jumps[waiting.pop()] if other not in seen]
                seen.update(new)
                waiting += new
            work += len(seen)
            # Only states that matter afterwards, so that equal sets are found.
            closures[state] = frozenset(s for s in seen if parts.edges[s] or s == end)
        return closures[state]

    numbers = {closure(0): 0}
    waiting, rows, ends = [closure(0)], list[np.ndarray](), list[bool]()
    while waiting:
        members = waiting.pop(0)
        row = np.full(256, -1, np.int32)
        targets: dict[int, set[int]] = defaultdict(set)
        edges = {edge for state in members for edge in parts.edges[state]}
        bounds = sorted({bound for low, high, _ in edges for bound in (low, high + 1)})
        place = {bound: n for n, bound in enumerate(bounds)}
        for low, high, target in edges:
            for n in range(place[low], place[high + 1]):
                targets[n].add(target)
        work += len(members) + sum(map(len, targets.values()))
        for n, following in targets.items():
            whole = frozenset().union(*map(closure, following))
            if whole not in numbers:
                numbers[whole] = len(numbers)
                waiting.append(whole)
            row[bounds[n] : bounds[n + 1]] = numbers[whole]
        rows.append(row)
        ends.append(end in members)
        if len(numbers) > 4 * MAX_STATES or work > _MAX_WORK:
            raise ValueError(f"needs more than {MAX_STATES} states, the limit; simplify it")
    return np.stack(rows), np.array(ends)


def _minimal(table: np.ndarray, ends: np.ndarray) -> ByteAutomaton:
    """Drops states that lead to no end, and merges those that match the same texts."""
    different, column_of = np.unique(table, axis=1, return_inverse=True)
    before = _before(different)
    waiting = np.flatnonzero(ends).tolist()
    useful = set(waiting)
    while waiting:
        new = {state for _, state in before[waiting.pop()]} - useful
        useful |= new
        waiting += new
    if 0 not in useful:
        raise ValueError("matches no text; correct it")
    block_of = _blocks(before, useful, ends)
    # Numbered from the one of state 0 on, and represented by their first states.
    chosen: dict[int, int] = {}
    for state in sorted(useful):
        chosen.setdefault(block_of[state], state)
    if len(chosen) > MAX_STATES:
        raise ValueError(f"needs {len(chosen)} states, more than the limit of {MAX_STATES}; simplify it")
    number = {block: n for n, block in enumerate(chosen)}
    numbers = np.full(len(ends) + 1, -1, np.int32)  # the last for -1
    for state in useful:
        numbers[state] = number[block_of[state]]
    states = list(chosen.values())
    return ByteAutomaton(numbers[different[states]][:, column_of.reshape(-1)], ends[states])


def _before(table: np.ndarray) -> list[list[tuple[int, int]]]:
    """(column, state) of all edges to each state."""
    before: list[list[tuple[int, int]]] = [[] for _ in table]
    for state, column in np.argwhere(table >= 0).tolist():
        before[table[state, column]].append((column, state))
    return before


def _blocks(before: list[list[tuple[int, int]]], useful: set[int], ends: np.ndarray) -> dict[int, int]:
    """Hopcroft's algorithm: the block of each useful state; those of a block match the same texts."""
    blocks = [whole for end in (False, True) if (whole := {s for s in useful if ends[s] == end})]
    block_of = {state: n for n, members in enumerate(blocks) for state in members}
    waiting = set(range(len(blocks)))
    while waiting:
        leading = defaultdict[int, set[int]](set)  # by column, the states that lead into this block
        for target in blocks[waiting.pop()]:
            for column, state in before[target]:
                if state in useful:
                    leading[column].add(state)
        for states in leading.values():
            parts = defaultdict[int, set[int]](set)
            for state in states:
                parts[block_of[state]].add(state)
            for block, part in parts.items():
                if len(part) == len(blocks[block]):
                    continue
                blocks[block] -= part
                blocks.append(part)
                new = len(blocks) - 1
                for state in part:
                    block_of[state] = new
                smaller = block if len(blocks[block]) < len(part) else new
                waiting.add(new if block in waiting else smaller)
    return block_of
