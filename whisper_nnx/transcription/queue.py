"""Which chain of windows gets the next free row of a batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from whisper_nnx.transcription.rows import Live


class Queue(Protocol):
    """The chains that wait for a row. A chain that has one is not in the queue."""

    def put(self, live: Live) -> None:
        """Adds a chain that has not begun."""

    def put_back(self, lives: Sequence[Live]) -> None:
        """Adds chains that have begun, in their order."""

    def get(self, *, started: bool) -> Live | None:
        """Removes and returns the next chain; `started`: only one that goes before the windows encoded in advance."""

    def discard(self, number: int) -> None:
        """Removes all chains of a recording."""

    def __len__(self) -> int:
        """How many chains wait; at least 1 where their number is not known yet."""


class InOrder:
    """Chains that have begun are finished first; the others follow in their order, those of `source` last."""

    def __init__(self) -> None:
        self.source: Iterator[Live] | None = None  # until it is exhausted
        self._started: deque[Live] = deque()
        self._new: deque[Live] = deque()
        self._discarded: set[int] = set()  # numbers of recordings whose other chains may still come from the source

    def put(self, live: Live) -> None:
        self._new.append(live)

    def put_back(self, lives: Sequence[Live]) -> None:
        self._started.extend(lives)

    def get(self, *, started: bool) -> Live | None:
        if started:
            return self._started.popleft() if self._started else None
        if self._new:
            return self._new.popleft()
        for live in self.source or ():
            if live.number not in self._discarded:
                return live
        self.source = None
        self._discarded.clear()
        return None

    def discard(self, number: int) -> None:
        if self.source is not None:
            self._discarded.add(number)
        self._started = _without(self._started, number)
        self._new = _without(self._new, number)

    def __len__(self) -> int:
        return len(self._started) + len(self._new) + (self.source is not None)


class RoundRobin:
    """Recordings take turns, however many chains each has: one with many pieces delays no other.

    `add` takes a recording unopened; it is opened when its first turn comes. The caller calls `start_round` before each
    step of the batch: recordings that came during the last step precede those that had a row in it.
    """

    def __init__(self) -> None:
        self._open: dict[int, Callable[[], Sequence[Live]]] = {}
        self._chains: dict[int, deque[Live]] = {}
        self._turns: deque[int] = deque()
        self._next_round: deque[int] = deque()

    def add(self, number: int, open: Callable[[], Sequence[Live]]) -> None:
        """A recording; `open` returns its chains, none if it fails or has nothing to decode."""
        self._open[number] = open
        self._turns.append(number)

    def start_round(self) -> None:
        self._turns += self._next_round
        self._next_round.clear()

    def put(self, live: Live) -> None:
        self._chain_of(live.number, self._turns).append(live)

    def put_back(self, lives: Sequence[Live]) -> None:
        for live in lives:
            self._chain_of(live.number, self._next_round).append(live)

    def _chain_of(self, number: int, turns: deque[int]) -> deque[Live]:
        if number not in self._chains:
            self._chains[number] = deque()
            turns.append(number)
        return self._chains[number]

    def get(self, *, started: bool) -> Live | None:
        while self._turns or self._next_round:
            number = (self._turns or self._next_round).popleft()
            if number in self._open:
                try:
                    self._chains[number] = deque(self._open[number]())
                except Exception:  # of the device: opened again later
                    self._turns.appendleft(number)
                    raise
                self._open.pop(number, None)
            chains = self._chains.pop(number, deque())
            if chains:
                live = chains.popleft()
                if chains:
                    self._chains[number] = chains
                    self._next_round.append(number)
                return live
        return None

    def discard(self, number: int) -> None:
        self._open.pop(number, None)
        self._chains.pop(number, None)
        for turns in (self._turns, self._next_round):
            if number in turns:
                turns.remove(number)

    def __len__(self) -> int:
        return len(self._open) + sum(map(len, self._chains.values()))


def _without(lives: deque[Live], number: int) -> deque[Live]:
    return deque(live for live in lives if live.number != number)
