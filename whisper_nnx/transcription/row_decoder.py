"""Decodes the windows in the rows of a batch: each begins when its row is free, and ends by itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from whisper_nnx import ops
from whisper_nnx.decoding.loop import PREFILL_CHUNK, Generated, Rows, advance, begin, idle_rows, move_up
from whisper_nnx.decoding.rules import Rule
from whisper_nnx.model.cache import KeysValues
from whisper_nnx.model.sharding import mesh_of
from whisper_nnx.model.whisper import Whisper
from whisper_nnx.runtime.devices import (
    divided,
    divides_heads,
    empty_rows,
    fetch,
    over_data,
    put_rows_of,
    rounded_up,
)
from whisper_nnx.transcription.attempts import Attempt, DecodingResult, loop_inputs
from whisper_nnx.transcription.windows import (
    NO_FEATURES,
    EncodedWindows,
    generate_windows,
    results_of,
    takes_draft,
    tokenizer_of,
)

LARGEST_GROUP = 16  # windows that are encoded, begun or timed together, on each device
NO_LIMIT = 1 << 30
Stored = tuple[tuple[KeysValues, ...], tuple[KeysValues, ...]]  # audio keys and values, and those of a draft model


class Groups(NamedTuple):
    """The numbers of windows that programs are compiled for, largest first, beside those of all rows."""

    sizes: tuple[int, ...]

    @classmethod
    def of(cls, model: Whisper, rows: int) -> Groups:
        """One CPU takes windows one by one; others 16, 4 or 1 at a time on each device, and at most all rows."""
        mesh = mesh_of(model)
        if ops.current().window_by_window and mesh is None:
            return cls((1,))
        sizes = {min(rows, rounded_up(1, mesh) * n) for n in (1, 4, LARGEST_GROUP)}
        return cls(tuple(sorted(sizes, reverse=True)))

    def split(self, items: Sequence[Any]) -> Iterator[list[Any]]:
        """The items in groups of these sizes, as few as possible; None fills up the last one."""
        rest = list(items)
        while rest:
            size = next((size for size in self.sizes if size <= len(rest)), self.sizes[-1])
            yield rest[:size] + [None] * (size - len(rest))
            rest = rest[size:]


class RowDecoder:
    """The token loop over `size` rows, left when some are done, so that others begin in their place.

    Windows that need another program than those in the loop (beams or samples, other suppressed tokens), and those with
    a draft, are decoded apart, from beginning to end, in small groups. So is the window of a single row, which nothing
    else waits for.

    Args:
      model: a model with a tokenizer.
      size: how many rows there are.
      most_steps: the most tokens of each row after which the loop is left.
    """

    def __init__(self, model: Whisper, size: int, most_steps: int = NO_LIMIT):
        self._model, self.size, self._most_steps = model, size, most_steps
        self.groups = Groups.of(model, size)
        parts = rounded_up(1, mesh_of(model))
        # Initial ids are fed to more windows at once than a CPU encodes.
        self._prompt_groups = Groups(
            tuple(sorted({min(size, LARGEST_GROUP * parts), *self.groups.sizes}, reverse=True))
        )
        # As many ends as a group can replace, but not so many that most rows wait for the last of them.
        largest, smallest = self.groups.sizes[0], self.groups.sizes[-1]
        self._leave_at = max(smallest, min(largest, size // 4)) // parts
        self._stored: Stored | None = None
        self._rows: Rows | None = None
        self._program: tuple[Any, ...] = ()
        self._begun: dict[int, Attempt] = {}
        self._is_sparse = False

    def put(self, places: Sequence[int | None], encoded: EncodedWindows) -> None:
        """Places windows in rows; None: not this one."""
        new = encoded.cross, encoded.draft
        if self.size == 1:
            self._stored = new
            return
        if self._stored is None:
            self._stored = empty_rows(new, self.size)
        self._stored = _put(self._stored, new, _numbers(places))

    def windows(self, rows: Sequence[int | None]) -> EncodedWindows:
        """The windows in these rows, without the encoder output; None: any."""
        assert self._stored is not None
        stored = self._stored
        if list(rows) != list(range(self.size)):
            stored = _take(stored, np.array([row or 0 for row in rows], np.int32))
        return EncodedWindows(NO_FEATURES, *stored)

    def decode(
        self, wanted: dict[int, Attempt], meanwhile: Callable[[], None] = lambda: None
    ) -> dict[int, DecodingResult]:
        """Continues the rows that are wanted, of which some may be new; others are given up.

        Args:
          wanted: how each row is decoded; the same object as long as its window is.
          meanwhile: called while the device decodes.

        Returns:
          The results of those rows that are done.
        """
        try:
            apart = self._begin(wanted)
            generated: list[tuple[list[int | None], Any]] = []
            if self._begun:
                generated.append((self._in_loop, self._advance()))
            generated += [(rows, self.decode_apart(rows, wanted)) for rows in apart]
            meanwhile()
            return self._results(fetch([device for _, device in generated]), [rows for rows, _ in generated], wanted)
        except Exception:
            self._rows, self._begun = None, {}  # what was given to a program that failed may be gone
            raise

    @property
    def _in_loop(self) -> list[int | None]:
        return [row if row in self._begun else None for row in range(self.size)]

    def _begin(self, wanted: dict[int, Attempt]) -> list[list[int | None]]:
        """Begins new rows in the loop -> groups of those that are to be decoded apart."""
        if self.size == 1 and self._most_steps == NO_LIMIT:
            return [[row] for row in wanted]
        self._begun = {row: one for row, one in self._begun.items() if wanted.get(row) is one}
        new = {row: one for row, one in wanted.items() if row not in self._begun}
        others = defaultdict[Any, list[int]](list)
        for row, one in new.items():
            others[takes_draft(self._model, one), one.program].append(row)
        in_loop = {program: len(rows) for (drafted, program), rows in others.items() if not drafted}
        if not self._begun and in_loop:
            program = max(in_loop, key=in_loop.__getitem__)
            if program != self._program:
                self._program, self._rows = program, None
        for rows in self._prompt_groups.split(others.pop((False, self._program), [])):
            self._begin_group(rows, wanted)
        return [rows for own in others.values() for rows in self.groups.split(own)]

    def _begin_group(self, rows: list[int | None], wanted: dict[int, Attempt]) -> None:
        model, special, (strategy, *_) = self._model, tokenizer_of(self._model).special, self._program
        attempts = [None if row is None else wanted[row] for row in rows]
        batch = loop_inputs(model.config, tokenizer_of(model), attempts)
        if self._rows is None:
            size = batch.initial_ids.shape[1]
            assert self._stored is not None
            self._rows = idle_rows(model.decoder, self._stored[0], batch.rules, size, strategy, special, mesh_of(model))
            self._is_sparse = True  # moved now, so that it is not compiled in the middle of the work
        reads_written = ops.current().reads_written(model.decoder.dtype) and not divides_heads(mesh_of(model))
        if self._is_sparse and reads_written:
            least = np.int32(-(-int(batch.initial_length.max()) // PREFILL_CHUNK) * PREFILL_CHUNK)
            self._rows, self._is_sparse = move_up(self._rows, self._going, least), False
        self._rows = begin(
            model.decoder,
            self.windows(rows).cross,
            batch,
            _numbers(rows),
            self._rows,
            self._going,
            strategy,
            special,
        )
        self._begun |= {row: wanted[row] for row in rows if row is not None}

    @property
    def _going(self) -> np.ndarray:
        return np.isin(np.arange(self.size), list(self._begun))

    def _advance(self) -> tuple[Generated, jax.Array, jax.Array]:
        assert self._stored is not None
        model, (strategy, *_) = self._model, self._program
        limits = np.int32(self._leave_at), np.int32(self._most_steps)
        special = tokenizer_of(model).special
        self._rows, generated, done, is_sparse = advance(
            model.decoder, self._stored[0], self._rows, self._going, *limits, strategy, special
        )
        return generated, done, is_sparse

    def decode_apart(self, rows: Sequence[int | None], wanted: dict[int, Attempt]) -> tuple[Generated, None, None]:
        """Decodes the windows in these rows from beginning to end, on the device."""
        attempts = [None if row is None else wanted[row] for row in rows]
        return generate_windows(self._model, self.windows(rows), attempts), None, None

    def _results(
        self,
        fetched: list[tuple[Generated, np.ndarray | None, np.ndarray | None]],
        places: list[list[int | None]],
        wanted: dict[int, Attempt],
    ) -> dict[int, DecodingResult]:
        results: dict[int, DecodingResult] = {}
        for (generated, done, is_sparse), rows in zip(fetched, places, strict=True):
            self._is_sparse = bool(np.any(is_sparse)) if is_sparse is not None else self._is_sparse
            ended = [row if done is None or done[i] else None for i, row in enumerate(rows)]
            found = results_of(self._model, [None if row is None else wanted[row] for row in ended], generated)
            results |= {row: found[i] for i, row in enumerate(ended) if row is not None}
        self._begun = {row: one for row, one in self._begun.items() if row not in results}
        return results

    def resized(self, kept: Sequence[int], size: int) -> RowDecoder:
        """One with another number of rows, of which the first are the kept ones. On a mesh, these begin again."""
        other = type(self)(self._model, size, self._most_steps)
        rows = np.array([*kept, *[0] * (size - len(kept))], np.int32)
        if kept and self._stored is not None:
            other._stored = _take(self._stored, rows)
            if self._rows is not None and mesh_of(self._model) is None:
                other._program, other._rows = self._program, _take_rows(self._rows, rows)
                other._begun = {new: self._begun[old] for new, old in enumerate(kept) if old in self._begun}
        return other


def _numbers(rows: Sequence[int | None]) -> np.ndarray:
    return np.array([-1 if row is None else row for row in rows], np.int32)


@partial(jax.jit, donate_argnums=0)
@partial(divided, rows=("stored",))
def _put(stored: Stored, new: Stored, places: jax.Array) -> Stored:
    """Replaces some of the windows, in place."""
    return jax.tree.map(lambda x, new: put_rows_of(x, new, places), stored, new)


@jax.jit
def _take(stored: Stored, rows: jax.Array) -> Stored:
    return jax.tree.map(lambda x: over_data(x[rows]), stored)


@jax.jit
def _take_rows(rows: Rows, places: jax.Array) -> Rows:
    windows = len(rows.no_speech_prob)

    def take(x: Any) -> Any:
        if isinstance(x, Rule):
            return x.changed(take)
        return x.reshape(windows, -1, *x.shape[1:])[places].reshape(-1, *x.shape[1:])

    return jax.tree.map(take, rows, is_leaf=lambda x: isinstance(x, Rule))


def compile_sizes(model: Whisper, encoded: EncodedWindows, attempts: Sequence[Attempt], sizes: Sequence[int]) -> None:
    """Compiles what changes from one number of rows to another, and what is decoded apart; encoded: any window."""
    for attempt in attempts:
        for old in sizes:
            decoder = RowDecoder(model, old, most_steps=1)
            decoder.put([0], encoded)
            decoder.decode({0: attempt})
            for new in sizes:
                if new != old:
                    decoder.resized([0], new)
            if old > 1:
                for group in decoder.groups.sizes:
                    decoder.decode_apart([0] * group, {0: attempt})
