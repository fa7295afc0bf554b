"""Steps recordings together: each row of a batch holds the next window of one of them. One recording is a batch of one.

Rows do not depend on each other, so that a transcript is the same in any company.
"""

from __future__ import annotations

import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import jax
import numpy as np

from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.model.sharding import mesh_of
from whisper_nnx.model.whisper import Whisper
from whisper_nnx.output.results import Segment
from whisper_nnx.runtime.allocator import close_gaps
from whisper_nnx.runtime.devices import divided, empty_rows, over_data, put_row, rounded_up
from whisper_nnx.timing.words import WordTiming
from whisper_nnx.transcription.queue import InOrder, Queue
from whisper_nnx.transcription.recording import Draft, Window
from whisper_nnx.transcription.row_times import UNTIMED, RowTimes
from whisper_nnx.transcription.rows import Live, Row
from whisper_nnx.transcription.windows import (
    DecodingResult,
    EncodedWindows,
    decode_windows,
    detect_languages,
    encode_windows,
    most_probable,
    row_seed,
)

T = TypeVar("T")
AHEAD = 4  # windows that are prepared while others decode; each holds its keys and values in memory

Encode = Callable[[Whisper, jax.Array], EncodedWindows]
Decode = Callable[..., list[DecodingResult | None]]


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
      ahead: the most windows that are encoded while others are decoded.
      encode: replaces `encode_windows`.
      decode: replaces `decode_windows`.

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
        ahead: int = AHEAD,
        encode: Encode = encode_windows,
        decode: Decode = decode_windows,
    ):
        self._model, self._encode_windows, self._decode_windows = model, encode, decode
        self._mesh = mesh_of(model)
        self._all_sizes = self._sizes = sorted({rounded_up(n, self._mesh) for n in (*sizes, size)})
        self._rows: list[Row | None] = [None] * self._sizes[0]
        self._encoded: EncodedWindows | None = None
        self._queue = InOrder() if queue is None else queue
        self._prepared: deque[tuple[Row, EncodedWindows]] = deque()
        self._finished: deque[Live] = deque()
        self._failed: deque[tuple[Live, Exception]] = deque()
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
        """Gives windows to free rows and decodes all rows once.

        Only rows that failed a threshold are tried again, beside the first attempts of others. A recording that fails
        ends its other chains too. Where memory does not suffice, half the rows do the work until all is done.

        Returns:
          What was decoded in the rows that are done (none where all are to be tried again), and each recording that
          ended.
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
        self._prepared = deque(ready for ready in self._prepared if ready[0].live.number != number)

    def _fail(self, live: Live, error: Exception) -> None:
        """An exception fails the recording that raised it, unless fewer rows may avoid it."""
        if is_out_of_memory(error) and self.may_halve:
            raise error
        self.cancel(live)
        self._failed.append((live, error))

    def _resize(self) -> None:
        """Takes the least number of rows that suffices, and keeps the windows that are to be tried again."""
        if self._sizes == [len(self._rows)]:
            return
        kept = [i for i, row in enumerate(self._rows) if row]
        wanted = len(kept) + len(self._prepared) + len(self._queue)
        size = next((size for size in self._sizes if size >= wanted), self._sizes[-1])
        if size == len(self._rows):
            return
        if kept and self._encoded is not None:
            rows = np.array([*kept, *[0] * (size - len(kept))], np.int32)
            self._encoded = _take(self._encoded, rows)
        else:
            self._encoded = None
        self._rows = [*(self._rows[i] for i in kept), *[None] * (size - len(kept))]

    def _fill(self) -> None:
        """Gives free rows windows, first of recordings that have begun, then of new ones."""
        for i, busy in enumerate(self._rows):
            if busy is not None:
                continue
            ready = self._next(started=True)
            if ready is None:
                ready = self._prepared.popleft() if self._prepared else self._next(started=False)
            if ready is None:
                return
            self._rows[i], encoded = ready
            self._put(i, encoded)

    def _next(self, *, started: bool) -> tuple[Row, EncodedWindows] | None:
        """The next window of the queue's next chain that has one."""
        while (live := self._queue.get(started=started)) is not None:
            if (ready := self._ready(live)) is not None:
                return ready
        return None

    def _ready(self, live: Live) -> tuple[Row, EncodedWindows] | None:
        """The next window of a recording, encoded; None if it is done."""
        try:
            window = live.recording.next_window()
            if window is None:
                self._finished.append(live)
                return None
            encoded = self._encode(live, window)
            language = live.recording.language
            if live.recording.options.multilingual:
                [probs] = detect_languages(self._model, encoded)
                language = choose_language(probs, live.allowed_languages)
        except Exception as error:
            if is_out_of_memory(error) and self.may_halve:
                self._queue.put_back([live])
            self._fail(live, error)
            return None
        nothing = encoded.features[:, :0]  # the encoder output takes memory and is not used here
        return Row(live, window, language), encoded._replace(features=nothing)

    def _encode(self, live: Live, window: Window) -> EncodedWindows:
        known, live.encoded = live.encoded, {}
        place = window.start_frame, window.n_frames
        return known[place] if place in known else self._encode_windows(self._model, live.mel.window(*place)[None])

    def _prepare(self) -> None:
        """Encodes the next windows while the device decodes, without waiting for it."""
        for _ in range(min(self._ahead, len(self._rows)) - len(self._prepared)):
            if (ready := self._next(started=False)) is None:
                return
            self._prepared.append(ready)

    def _put(self, row: int, encoded: EncodedWindows) -> None:
        if len(self._rows) == 1:
            self._encoded = encoded
            return
        if self._encoded is None:
            self._encoded = empty_rows(encoded, len(self._rows))
        self._encoded = _put(self._encoded, encoded, np.int32(row))

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
        begun = [row for row in [*self._rows, *(row for row, _ in self._prepared)] if row]
        self._queue.put_back([row.live for row in begun])
        self._rows, self._encoded = [None] * half, None
        self._prepared.clear()

    def _decode_rows(self) -> list[Event]:
        """Decodes all rows once -> the segments of those that are done, which are then free.

        Nothing changes before all that may fail for lack of memory is done.
        """
        results = self._each(self._decode, {i: row for i, row in enumerate(self._rows) if row})
        rows = {i: row for i, row in enumerate(self._rows) if row and i in results}
        done, again = dict[int, Row](), list[tuple[Row, str]]()
        for i, row in rows.items():
            fallback = row.live.fallback
            if row.attempt + 1 < len(fallback.temperatures) and (failed := fallback.failed_threshold(results[i])):
                again.append((row, failed))
            else:
                done[i] = row
        spoken = {i: row for i, row in done.items() if not row.live.fallback.is_silence(results[i])}
        drafts = self._each(
            lambda rows: {i: row.live.recording.draft(row.window, results[i]) for i, row in rows.items()}, spoken
        )
        drafted = {i: row for i, row in spoken.items() if i in drafts}
        timer = RowTimes(self._model, self._encoded, len(self._rows))
        times = self._each(lambda rows: timer.tokens({i: (row, drafts[i]) for i, row in rows.items()}), drafted)
        words = self._each(
            lambda rows: timer.words({i: (row, drafts[i], times.get(i, UNTIMED)) for i, row in rows.items()}), drafted
        )
        for row, failed in again:
            row.attempt += 1
            self.retries[failed] += 1

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
        assert self._encoded is not None
        every = [rows.get(i) for i in range(len(self._rows))]
        options = [self._options(row) if row else None for row in every]
        seeds = [self._seed(row) if row else 0 for row in every]
        results = self._decode_windows(self._model, self._encoded, options, seeds, meanwhile=self._prepare)
        return {i: result for i, result in enumerate(results) if result is not None}

    def _seed(self, row: Row) -> int:
        """Depends on the window's audio too: the samples of unrelated recordings are independent, in any batch."""
        place = row.window.start_frame, row.window.n_frames
        samples = row.live.fallback.temperatures[row.attempt] > 0
        fingerprint = row.live.mel.fingerprint(*place) if samples else 0
        return row_seed(row.live.seed, row.window.start_frame, row.attempt, fingerprint)

    def _options(self, row: Row) -> DecodingOptions:
        temperature = row.live.fallback.temperatures[row.attempt]
        options = replace(row.live.options, prompt=row.window.prompt, language=row.language)
        return row.live.fallback.options_at(temperature, options)

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


@partial(jax.jit, donate_argnums=0)
@partial(divided, rows=("encoded",))
def _put(encoded: EncodedWindows, one: EncodedWindows, row: jax.Array) -> EncodedWindows:
    """Replaces one of the windows, in place."""
    return jax.tree.map(lambda x, new: put_row(x, new, row), encoded, one)


@jax.jit
def _take(encoded: EncodedWindows, rows: jax.Array) -> EncodedWindows:
    return jax.tree.map(lambda x: over_data(x[rows]), encoded)


def compile_sizes(encoded: EncodedWindows, sizes: Sequence[int]) -> None:
    """Compiles what changes from one number of rows to another; encoded: any window."""
    for old in sizes:
        rows = empty_rows(encoded, old)
        for new in sizes:
            _take(rows, np.zeros(new, np.int32))


def choose_language(probs: Mapping[str, float], allowed: Sequence[str] = ()) -> str:
    """The most probable of the allowed languages, or of all."""
    return most_probable({code: probs[code] for code in allowed or probs})


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device ran out of memory."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
