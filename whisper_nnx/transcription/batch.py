"""Steps recordings together: each row of a batch holds the next window of one of them. One recording is a batch of one.

Rows do not depend on each other, so that a transcript is the same in any company.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import jax

from whisper_nnx import ops
from whisper_nnx.model.sharding import mesh_of
from whisper_nnx.model.whisper import Whisper
from whisper_nnx.output.results import Segment
from whisper_nnx.runtime.allocator import close_gaps
from whisper_nnx.runtime.devices import fetch, rounded_up
from whisper_nnx.timing.words import WordTiming
from whisper_nnx.transcription.attempts import Attempt, DecodingResult, row_seed
from whisper_nnx.transcription.encoding import Encode, encode_rows, is_known
from whisper_nnx.transcription.queue import InOrder, Queue
from whisper_nnx.transcription.recording import Draft
from whisper_nnx.transcription.row_decoder import NO_LIMIT, RowDecoder
from whisper_nnx.transcription.row_times import UNTIMED, RowTimes
from whisper_nnx.transcription.rows import Live, Prepared, Row
from whisper_nnx.transcription.windows import FlatWhisper, encode_windows, most_probable, named_probs, tokenizer_of

T = TypeVar("T")
AHEAD = 4  # windows that one CPU prepares while others decode; each holds its keys and values in memory
MakeDecoder = Callable[..., RowDecoder]  # with RowDecoder's arguments


# A recording and the segments of its next window; None: it is done; an exception: it failed.
Event = tuple[Live, list[Segment] | Exception | None]


class Batch:
    """`size` rows; each gets the next window of any recording as soon as it is free.

    `run` steps all recordings of an iterator. Or the caller steps them: `submit` recordings at any time between two
    steps, and call `step` while there is something to do (`busy`). Not for several threads at once.

    Args:
      model: a model with a tokenizer.
      size: how many windows are decoded together; on a mesh, rounded up to a multiple of its axis `data`.
      sizes: the numbers of rows that may be used: each step takes the least that suffices; default: `size` alone.
      queue: decides which chain gets the next row; default: `InOrder`.
      ahead: the most windows that are encoded while others are decoded; default: as many as rows, on a CPU few.
      most_steps: the most tokens of each row in a step; default: until some rows are done.
      encode: replaces `encode_windows`.
      make_decoder: replaces `RowDecoder`.

    Attributes:
      retries: how often windows were tried again, by the threshold that they failed.
    """

    def __init__(
        self,
        model: Whisper,
        size: int = 1,
        *,
        sizes: Sequence[int] = (),
        queue: Queue | None = None,
        ahead: int | None = None,
        most_steps: int = NO_LIMIT,
        encode: Encode = encode_windows,
        make_decoder: MakeDecoder = RowDecoder,
    ):
        self._model: Any = FlatWhisper(model)
        self._encode_windows = encode
        self._make_decoder = partial(make_decoder, self._model, most_steps=most_steps)
        self._mesh = mesh_of(model)
        self._all_sizes = self._sizes = sorted({rounded_up(n, self._mesh) for n in (*sizes, size)})
        self._rows: list[Row | None] = [None] * self._sizes[0]
        self._decoder = self._make_decoder(len(self._rows))
        self._queue = InOrder() if queue is None else queue
        self._prepared: deque[Prepared] = deque()
        self._finished: deque[Live] = deque()
        self._failed: deque[tuple[Live, Exception]] = deque()
        if ahead is None:
            ahead = AHEAD if ops.current().window_by_window else self._sizes[-1]
        self._most_ahead = self._ahead = ahead
        self.retries: Counter[str] = Counter()
        if size > 1:
            close_gaps()  # the keys and values of many windows are the largest arrays there are

    def run(self, recordings: Iterator[Live]) -> Iterator[Event]:
        """Steps recordings until all are done, those that were submitted included.

        `recordings` are opened as rows become free. An iterator that raises for lack of device memory is asked again.
        """
        if not isinstance(self._queue, InOrder):
            raise ValueError("run needs a Batch with the default queue; submit recordings to others and call step")
        self._queue.source = recordings
        while self.busy:
            yield from self.step()

    def submit(self, live: Live) -> None:
        """Adds a recording, or a piece of one; it begins when a row is free."""
        self._queue.put(live)

    def step(self) -> list[Event]:
        """Gives windows to free rows and decodes all rows until some are done.

        Only rows that failed a threshold are tried again, beside the first attempts of others. A recording that fails
        ends its other chains too. Where memory does not suffice, half the rows do the work until all is done.

        Returns:
          What was decoded in the rows that are done (perhaps none: they may be tried again, or `most_steps` were not
          enough), and each recording that ended.
        """
        accepted: list[Event] = []
        try:
            self._resize()
            self._fill()
            if any(self._rows):
                accepted = self._decode_rows()
        except jax.errors.JaxRuntimeError as error:
            self._halve(error)
        events: list[Event] = [*accepted, *((live, None) for live in self._finished), *self._failed]
        self._finished.clear()
        self._failed.clear()
        if not self.busy:
            self._sizes, self._ahead = self._all_sizes, self._most_ahead  # memory may suffice again
        return events

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""
        return bool(any(self._rows) or self._prepared or self._finished or self._failed or len(self._queue))

    @property
    def rows_in_use(self) -> int:
        return sum(row is not None for row in self._rows)

    @property
    def may_halve(self) -> bool:
        """Whether less memory would do, for fewer rows at a time."""
        return len(self._rows) > rounded_up(1, self._mesh) or bool(self._prepared)

    def cancel(self, recording: Live | int) -> None:
        """Ends all chains of a recording, which is given by one of them or by its number. No event follows."""
        number = recording.number if isinstance(recording, Live) else recording
        self._queue.discard(number)
        self._rows[:] = [None if row and row.live.number == number else row for row in self._rows]
        self._prepared = deque(ready for ready in self._prepared if ready.row.live.number != number)

    def _fail(self, live: Live, error: Exception) -> None:
        """An exception fails the recording that raised it, unless fewer rows may avoid it."""
        if is_out_of_memory(error) and self.may_halve:
            raise error
        self.cancel(live)
        self._failed.append((live, error))

    def _has_failed(self, row: Row) -> bool:
        """Whether its recording failed in this step, in another piece."""
        return any(live.number == row.live.number for live, _ in self._failed)

    def _resize(self) -> None:
        """Takes the least number of rows that suffices, and keeps the windows that are to be tried again."""
        if self._sizes == [len(self._rows)]:
            return
        kept = [i for i, row in enumerate(self._rows) if row]
        wanted = len(kept) + len(self._prepared) + len(self._queue)
        size = next((size for size in self._sizes if size >= wanted), self._sizes[-1])
        if size == len(self._rows):
            return
        self._decoder = self._decoder.resized(kept, size)
        self._rows = [*(self._rows[i] for i in kept), *[None] * (size - len(kept))]

    def _fill(self) -> None:
        """Gives free rows windows, first of recordings that have begun, then of new ones."""
        free = [i for i, row in enumerate(self._rows) if row is None]
        if not free:
            return
        # In the order of their turns: those that have begun, those that were encoded in advance, and the others.
        waiting, self._prepared = self._prepared, deque()
        try:
            self._prepare(len(free), started=True)
        finally:
            self._prepared += waiting
        self._prepare(len(free), started=False)
        ready = [self._prepared.popleft() for _ in free[: len(self._prepared)]]
        self._place(dict(zip(free, ready, strict=False)))

    def _prepare(self, most: int, *, started: bool) -> None:
        """Encodes the next windows of the queue, in groups, until `most` are prepared. Waits for nothing."""
        rows: list[Row] = []
        try:
            while len(rows) + len(self._prepared) < most and (live := self._queue.get(started=started)) is not None:
                if (row := self._next_row(live)) is not None:
                    rows.append(row)
        except BaseException:  # of opening the next recording
            self._queue.put_back([row.live for row in rows])
            raise
        order = {id(row): n for n, row in enumerate(rows)}
        known, others = [row for row in rows if is_known(row)], [row for row in rows if not is_known(row)]
        alone: list[list[Row | None]] = [[row] for row in known]
        self._encode([*alone, *self._decoder.groups.split(others)])
        self._prepared = deque(sorted(self._prepared, key=lambda ready: order.get(id(ready.row), -1)))

    def _next_row(self, live: Live) -> Row | None:
        """The next window of a recording; None if it is done."""
        try:
            window = live.recording.next_window()
        except Exception as error:
            self._fail(live, error)
            return None
        if window is None:
            self._finished.append(live)
            return None
        return Row(live, window)

    def _encode(self, groups: list[list[Row | None]]) -> None:
        """Encodes windows and adds them to those that are prepared; one that fails ends its recording."""
        waiting = deque(groups)
        while waiting:
            group = waiting.popleft()
            try:
                self._prepared += encode_rows(self._model, group, self._encode_windows)
            except Exception as error:
                own = [row for row in group if row is not None]
                if is_out_of_memory(error) and self.may_halve:
                    self._queue.put_back([row.live for rest in (group, *waiting) for row in rest if row is not None])
                    raise
                if len(own) == 1:
                    self._fail(own[0].live, error)
                else:
                    waiting.extendleft([row] for row in reversed(own))
        self._prepared = deque(ready for ready in self._prepared if not self._has_failed(ready.row))

    def _place(self, ready: dict[int, Prepared]) -> None:
        """Puts windows into rows; one for which that fails ends its recording."""
        try:
            self._assign(ready)
        except Exception as error:
            if is_out_of_memory(error) and self.may_halve:
                self._queue.put_back([one.row.live for i, one in ready.items() if self._rows[i] is not one.row])
                raise
            if len(ready) == 1:
                [one] = ready.values()
                self._fail(one.row.live, error)
            else:
                for i, one in ready.items():
                    if not self._has_failed(one.row):
                        self._place({i: one})

    def _assign(self, ready: dict[int, Prepared]) -> None:
        """Reads the languages that were detected in windows, and puts these into rows."""
        detected = dict(zip(ready, fetch([one.languages for one in ready.values()]), strict=True))
        groups, early = defaultdict[int, dict[int, int]](dict), list[Live]()
        for i, one in ready.items():
            live = one.row.live
            if detected[i] is not None:
                [probs] = named_probs(self._model, detected[i][one.at : one.at + 1])
                if live.on_language is not None:
                    live.on_language(probs)
                one.row.language = choose_language(probs, live.allowed_languages)
            if not live.recording.options.multilingual:
                one.row.language = live.recording.language
            if one.row.language is None:  # its recording's first piece is still to come
                early.append(live)
            else:
                self._rows[i] = one.row
                groups[id(one.encoded)][one.at] = i
        for one in {id(one.encoded): one for one in ready.values()}.values():
            if places := groups[id(one.encoded)]:
                self._decoder.put([places.get(at) for at in range(one.encoded.windows)], one.encoded)
        self._queue.put_back(early)

    def _halve(self, error: Exception) -> None:
        """Uses fewer rows after the device ran out of memory; windows in progress begin again, with the same result."""
        if not (is_out_of_memory(error) and self.may_halve):
            raise error
        size = len(self._rows)
        half = rounded_up(max(1, size // 2), self._mesh)
        self._sizes = [*(smaller for smaller in self._sizes if smaller < half), half]
        if size == half:  # prepared windows took the memory
            self._ahead = 0
        warnings.warn(f"out of memory with batch_size={size}: going on with {half}", stacklevel=2)
        begun = [row for row in [*self._rows, *(ready.row for ready in self._prepared)] if row]
        self._queue.put_back([row.live for row in begun])
        self._rows, self._decoder = [None] * half, self._make_decoder(half)
        self._prepared.clear()

    def _decode_rows(self) -> list[Event]:
        """Decodes all rows until some are done -> their segments; they are then free.

        Nothing changes before all that may fail for lack of memory is done.
        """
        results = self._each(self._decode, {i: row for i, row in enumerate(self._rows) if row})
        rows = {i: row for i, row in enumerate(self._rows) if row and i in results}
        done, again = dict[int, Row](), list[tuple[Row, str]]()
        for i, row in rows.items():
            fallback = row.live.fallback
            if row.tries + 1 < len(fallback.temperatures) and (failed := fallback.failed_threshold(results[i])):
                again.append((row, failed))
            else:
                done[i] = row
        spoken = {i: row for i, row in done.items() if not row.live.fallback.is_silence(results[i])}
        drafts = self._each(
            lambda rows: {i: row.live.recording.draft(row.window, results[i]) for i, row in rows.items()}, spoken
        )
        drafted = {i: row for i, row in spoken.items() if i in drafts}
        timer = RowTimes(self._model, self._decoder)
        times = self._each(lambda rows: timer.tokens({i: (row, drafts[i]) for i, row in rows.items()}), drafted)
        words = self._each(
            lambda rows: timer.words({i: (row, drafts[i], times.get(i, UNTIMED)) for i, row in rows.items()}), drafted
        )
        for row, failed in again:
            row.tries, row.attempt = row.tries + 1, None
            self.retries[failed] += 1
            row.live.retries[failed] += 1

        def accept(rows: dict[int, Row]) -> dict[int, list[Segment]]:
            return {
                i: self._accept(i, row, drafts.get(i), words.get(i), times.get(i, UNTIMED)[0])
                for i, row in rows.items()
            }

        accepted = [(row.live, self._each(accept, {i: row})) for i, row in done.items()]  # one by one: not repeatable
        return [(live, segments) for live, parts in accepted for segments in parts.values()]

    def _each(self, work: Callable[[dict[int, Row]], dict[int, T]], rows: dict[int, Row]) -> dict[int, T]:
        """`work` of the rows that are still in the batch; where it fails, of one at a time, to find which one fails."""
        rows = {i: row for i, row in rows.items() if self._rows[i] is row}
        if not rows:
            return {}
        try:
            return work(rows)
        except Exception as error:
            [(_, row), *others] = rows.items()
            if others and not (is_out_of_memory(error) and self.may_halve):
                parts = [self._each(work, {i: row}) for i, row in rows.items()]
                return {i: result for part in parts for i, result in part.items()}
            self._fail(row.live, error)
            return {}

    def _decode(self, rows: dict[int, Row]) -> dict[int, DecodingResult]:
        for row in rows.values():
            if row.attempt is None:
                row.attempt = self._attempt(row)
        wanted = {i: row.attempt for i, row in rows.items() if row.attempt}
        return self._decoder.decode(wanted, self._prepare_ahead)

    def _prepare_ahead(self) -> None:
        self._prepare(min(self._ahead, len(self._rows)), started=False)

    def _attempt(self, row: Row) -> Attempt:
        """Its seed depends on the window's audio too: samples of unrelated recordings are independent, in any batch."""
        live = row.live
        temperature = live.fallback.temperatures[row.tries]
        fingerprint = live.mel.fingerprint(*row.window.place) if temperature > 0 else 0
        seed = row_seed(live.seed, row.window.start_frame, row.tries, fingerprint)
        options = replace(live.options, prompt=row.window.prompt, language=row.language)
        return Attempt.of(
            self._model.config, tokenizer_of(self._model), live.fallback.options_at(temperature, options), seed
        )

    def _accept(
        self, i: int, row: Row, draft: Draft | None, words: list[WordTiming] | None, begins_s: list[float]
    ) -> list[Segment]:
        """Gives a result to its recording and frees the row."""
        recording = row.live.recording
        self._rows[i] = None
        segments: list[Segment] = []
        if draft is None:
            recording.skip(row.window)
        else:
            begins = begins_s if recording.options.token_timestamps else None
            segments = recording.accept(row.window, draft, words, begins)
        # A finished recording is reported at once, before the next one's first window.
        if recording.next_window():
            self._queue.put_back([row.live])
        else:
            self._finished.append(row.live)
        return segments


def choose_language(probs: Mapping[str, float], allowed: Sequence[str] = ()) -> str:
    """The most probable of the allowed languages, or of all."""
    return most_probable({code: probs[code] for code in allowed or probs})


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device ran out of memory."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
