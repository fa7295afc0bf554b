"""Steps recordings together: each row of a batch holds the next window of one of them. One recording is a batch of one.

Rows do not depend on each other, so that a transcript is the same in any company.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from whisper_nnx.audio.features import RecordingMel
from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.model.whisper import Whisper
from whisper_nnx.output.results import Segment
from whisper_nnx.runtime.allocator import close_gaps
from whisper_nnx.timing import word_times
from whisper_nnx.timing.alignment_heads import Heads
from whisper_nnx.timing.token_times import align_tokens, text_ids
from whisper_nnx.timing.word_times import Layout
from whisper_nnx.timing.words import WordTiming, words_from_tokens
from whisper_nnx.transcription.fallback import FallbackOptions
from whisper_nnx.transcription.recording import Draft, Recording, Window
from whisper_nnx.transcription.windows import (
    DecodingResult,
    EncodedWindows,
    decode_windows,
    detect_languages,
    encode_windows,
    most_probable,
    row_seed,
    tokenizer_of,
)

T = TypeVar("T")
AHEAD = 4  # windows that are prepared while others decode; each holds its keys and values in memory

Place = tuple[int, int]  # a window's first frame, and how many
Timed = tuple[list[float], list[float]]  # begin of each text token and of what follows, probability of each
_UNTIMED: Timed = ([0.0], [])


@dataclass
class Live:
    """A chain of windows under way: a recording or a piece of one, with its sound and what is asked of its windows."""

    recording: Recording
    mel: RecordingMel
    options: DecodingOptions
    fallback: FallbackOptions = field(default_factory=FallbackOptions)
    seed: int = 0
    number: int = 0  # of the recording among those of one call
    heads: Heads = ()  # that time words and tokens
    word_heads: word_times.Heads | None = None  # that refine the times of words
    allowed_languages: tuple[str, ...] = ()  # to choose from for each window; all where there are none
    encoded: dict[Place, EncodedWindows] = field(default_factory=dict)  # known already, from detecting its language

    def encode(self, model: Whisper, window: Window) -> EncodedWindows:
        known, self.encoded = self.encoded, {}
        place = window.start_frame, window.n_frames
        return known[place] if place in known else encode_windows(model, self.mel.window(*place)[None])


@dataclass
class _Row:
    """What a row of the batch works on: a window, at one of the temperatures."""

    live: Live
    window: Window
    language: str
    attempt: int = 0


class Batch:
    """`size` rows; each gets the next window of any recording as soon as it is free."""

    def __init__(self, model: Whisper, size: int = 1):
        self._model = model
        self._rows: list[_Row | None] = [None] * size
        self._encoded: EncodedWindows | None = None
        self._waiting: deque[Live] = deque()  # begun, and between two windows
        self._prepared: deque[tuple[_Row, EncodedWindows]] = deque()
        self._finished: deque[Live] = deque()
        self._failed: deque[tuple[Live, Exception]] = deque()
        self._ahead = AHEAD
        self._dropped: set[int] = set()  # numbers of the recordings whose other chains are not begun
        if size > 1:
            close_gaps()  # the keys and values of many windows are the largest arrays there are

    def run(self, recordings: Iterator[Live]) -> Iterator[tuple[Live, list[Segment] | Exception | None]]:
        """(a recording, the segments of its next window), as they come; (it, None) when it is done.

        (it, an exception) when it failed, which ends its other chains too.

        `recordings` are opened as rows become free. Only rows that failed a threshold are tried again, beside the
        others' first tries. Where memory does not suffice, half the rows do the work; an iterator that raised for want
        of memory is asked again.
        """
        self._recordings = recordings
        while True:
            accepted: list[tuple[Live, list[Segment]]] = []
            going_on = True
            try:
                self._fill()
                if going_on := any(self._rows):
                    accepted = self._step()
            except jax.errors.JaxRuntimeError as error:
                self._halve(error)
            yield from accepted
            while self._finished:
                yield self._finished.popleft(), None
            going_on = going_on or bool(self._failed)
            while self._failed:
                yield self._failed.popleft()
            if not going_on:
                return

    @property
    def may_halve(self) -> bool:
        """Whether less memory would do, for fewer rows at a time."""
        return len(self._rows) > 1 or bool(self._prepared)

    def drop(self, live: Live) -> None:
        """Ends all chains of a recording."""
        self._dropped.add(number := live.number)
        self._rows[:] = [None if row and row.live.number == number else row for row in self._rows]
        self._waiting = deque(other for other in self._waiting if other.number != number)
        self._prepared = deque(ready for ready in self._prepared if ready[0].live.number != number)

    def _fail(self, live: Live, error: Exception) -> None:
        """What one recording raises is its own error, unless fewer rows may mend it."""
        if is_out_of_memory(error) and self.may_halve:
            raise error
        self.drop(live)
        self._failed.append((live, error))

    def _fill(self) -> None:
        """Free rows get windows: first of those recordings that are under way, then of new ones."""
        for i, busy in enumerate(self._rows):
            if busy is not None:
                continue
            ready = None
            while self._waiting and ready is None:
                ready = self._ready(self._waiting.popleft())
            if ready is None:
                ready = self._prepared.popleft() if self._prepared else self._begin()
            if ready is None:
                return
            self._rows[i], encoded = ready
            self._put(i, encoded)

    def _begin(self) -> tuple[_Row, EncodedWindows] | None:
        """The first window of a recording that is not under way yet."""
        for live in self._recordings:
            if live.number not in self._dropped and (ready := self._ready(live)) is not None:
                return ready
        return None

    def _ready(self, live: Live) -> tuple[_Row, EncodedWindows] | None:
        """The next window of a recording, encoded; None if it is done."""
        try:
            window = live.recording.next_window()
            if window is None:
                self._finished.append(live)
                return None
            encoded = live.encode(self._model, window)
            language = live.recording.language
            if live.recording.options.multilingual:
                [probs] = detect_languages(self._model, encoded)
                language = choose_language(probs, live.allowed_languages)
        except Exception as error:
            if is_out_of_memory(error) and self.may_halve:
                self._waiting.appendleft(live)
            self._fail(live, error)
            return None
        nothing = encoded.features[:, :0]  # of the encoder's output, which nobody asks for here: it takes memory
        return _Row(live, window, language), encoded._replace(features=nothing)

    def _prepare(self) -> None:
        """Encodes what comes next while the device is busy with the rows: nothing here waits for it."""
        while len(self._prepared) < min(self._ahead, len(self._rows)) and (ready := self._begin()) is not None:
            self._prepared.append(ready)

    def _put(self, row: int, encoded: EncodedWindows) -> None:
        if len(self._rows) == 1:
            self._encoded = encoded
            return
        if self._encoded is None:
            self._encoded = jax.tree.map(lambda x: jnp.zeros((len(self._rows), *x.shape[1:]), x.dtype), encoded)
        self._encoded = _put(self._encoded, encoded, np.int32(row))

    def _halve(self, error: Exception) -> None:
        """Fewer rows after the device ran out of memory; the windows under way are begun again, with the same end."""
        if not (is_out_of_memory(error) and self.may_halve):
            raise error
        size = len(self._rows)
        half = max(1, size // 2)
        if size == 1:  # what was prepared took the memory
            self._ahead = 0
        warnings.warn(f"out of memory with batch_size={size}: going on with {half}", stacklevel=2)
        under_way = [row for row in [*self._rows, *(row for row, _ in self._prepared)] if row]
        self._waiting.extendleft(row.live for row in reversed(under_way))
        self._rows, self._encoded = [None] * half, None
        self._prepared.clear()

    def _step(self) -> list[tuple[Live, list[Segment]]]:
        """Decodes all rows once -> what was said in those that are done, which are then free.

        Nothing changes before all that may fail for want of memory is done.
        """
        results = self._each(self._decode, {i: row for i, row in enumerate(self._rows) if row})
        rows = {i: row for i, row in enumerate(self._rows) if row and i in results}
        done, again = dict[int, _Row](), list[_Row]()
        for i, row in rows.items():
            fallback = row.live.fallback
            if row.attempt + 1 < len(fallback.temperatures) and fallback.needs_another_try(results[i]):
                again.append(row)
            else:
                done[i] = row
        spoken = {i: row for i, row in done.items() if not row.live.fallback.is_silence(results[i])}
        drafts = self._each(
            lambda rows: {i: row.live.recording.draft(row.window, results[i]) for i, row in rows.items()}, spoken
        )
        drafted = {i: row for i, row in spoken.items() if i in drafts}
        times = self._each(lambda rows: self._align({i: (row, drafts[i]) for i, row in rows.items()}), drafted)
        words = self._each(
            lambda rows: self._words({i: (row, drafts[i], times.get(i, _UNTIMED)) for i, row in rows.items()}), drafted
        )
        for row in again:
            row.attempt += 1

        def accept(rows: dict[int, _Row]) -> dict[int, list[Segment]]:
            return {
                i: self._accept(i, row, drafts.get(i), words.get(i), times.get(i, _UNTIMED)[0])
                for i, row in rows.items()
            }

        accepted = [(row.live, self._each(accept, {i: row})) for i, row in done.items()]  # which cannot be done twice
        return [(live, segments) for live, parts in accepted for segments in parts.values()]

    def _each(self, work: Callable[[dict[int, _Row]], dict[int, T]], rows: dict[int, _Row]) -> dict[int, T]:
        """`work` of those rows whose recordings go on; where it fails, of one row at a time, to find which one does."""
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

    def _decode(self, rows: dict[int, _Row]) -> dict[int, DecodingResult]:
        assert self._encoded is not None
        every = [rows.get(i) for i in range(len(self._rows))]
        options = [self._options(row) if row else None for row in every]
        seeds = [self._seed(row) if row else 0 for row in every]
        results = decode_windows(self._model, self._encoded, options, seeds, meanwhile=self._prepare)
        return {i: result for i, result in enumerate(results) if result is not None}

    def _seed(self, row: _Row) -> int:
        """Of the window's sound too: the samples of unrelated recordings are independent, in any batch."""
        place = row.window.start_frame, row.window.n_frames
        samples = row.live.fallback.temperatures[row.attempt] > 0
        sound = row.live.mel.fingerprint(*place) if samples else 0
        return row_seed(row.live.seed, row.window.start_frame, row.attempt, sound)

    def _options(self, row: _Row) -> DecodingOptions:
        temperature = row.live.fallback.temperatures[row.attempt]
        options = replace(row.live.options, prompt=row.window.prompt, language=row.language)
        return row.live.fallback.options_at(temperature, options)

    def _accept(
        self, i: int, row: _Row, draft: Draft | None, words: list[WordTiming] | None, begins_s: list[float]
    ) -> list[Segment]:
        """Hands a result back to its recording, and frees the row."""
        recording = row.live.recording
        self._rows[i] = None
        segments: list[Segment] = []
        if draft is None:
            recording.skip(row.window)
        else:
            begins = begins_s if recording.options.token_timestamps else None
            segments = recording.accept(row.window, draft, words, begins)
        # What is finished comes out at once, not behind the next recording's first window.
        (self._waiting if recording.next_window() else self._finished).append(row.live)
        return segments

    def _align(self, drafts: dict[int, tuple[_Row, Draft]]) -> dict[int, Timed]:
        """Times of the text tokens of those rows that want any, on the encoder output that they were decoded from."""
        wanted = {i: x for i, x in drafts.items() if x[0].live.recording.options.timed and x[1].text_tokens}
        times: dict[int, Timed] = {}
        for heads in {row.live.heads for row, _ in wanted.values()}:
            times |= self._align_rows({i: x for i, x in wanted.items() if x[0].live.heads == heads}, heads)
        return times

    def _align_rows(self, spoken: dict[int, tuple[_Row, Draft]], heads: Heads) -> dict[int, Timed]:
        assert self._encoded is not None
        config, tokenizer = self._model.config, tokenizer_of(self._model)
        any_row = next(iter(spoken.values()))  # the others are aligned with its text, for nothing
        rows = [spoken.get(i, any_row) for i in range(len(self._rows))]
        starts = [self._start(row) for row, _ in rows]
        texts = [draft.text_tokens for _, draft in rows]
        positions = [self._positions(row) for row, _ in rows]
        decoder, cross, eot = self._model.decoder, self._encoded.cross, tokenizer.special.eot
        is_text = text_ids(tokenizer)
        aligned = align_tokens(decoder, cross, config, starts, texts, eot, positions, heads=heads, is_text=is_text)
        return {i: aligned[i] for i in spoken}

    def _words(self, spoken: dict[int, tuple[_Row, Draft, Timed]]) -> dict[int, list[WordTiming] | None]:
        """The words of those rows' windows; None where none are wanted."""
        words: dict[int, list[WordTiming] | None] = {}
        for i, (row, draft, timed) in spoken.items():
            recording, wanted = row.live.recording, row.live.recording.options.word_timestamps
            text = draft.text_tokens
            words[i] = words_from_tokens(recording.tokenizer, text, *timed, row.language) if wanted else None
        refined = {i: (row, own) for i, (row, _, _) in spoken.items() if row.live.word_heads and (own := words[i])}
        self._refine(refined)
        return words

    def _refine(self, spoken: dict[int, tuple[_Row, list[WordTiming]]]) -> None:
        """Gives words the times of a second pass, over the text in short pieces."""
        assert self._encoded is not None
        config, tokenizer = self._model.config, tokenizer_of(self._model)
        for heads in {row.live.word_heads for row, _ in spoken.values()}:
            assert heads is not None
            own = {i: x for i, x in spoken.items() if x[0].live.word_heads == heads}
            any_row = next(iter(own.values()))
            layouts, pauses = [], []
            for i in range(len(self._rows)):
                row, words = own.get(i, any_row)
                spelled, _ = word_times.spelled_words(words)
                room = config.max_target_positions
                layouts.append(Layout.of(tokenizer, self._start(row), spelled, room, short=heads.short_pieces))
                first = word_times.first_sample(row.window.start_frame)
                pauses.append(word_times.pause_likeness(row.live.mel.waveform, first, self._positions(row)))
            decoder, cross, eot = self._model.decoder, self._encoded.cross, tokenizer.special.eot
            times = word_times.word_times(decoder, cross, config, eot, layouts, pauses, heads)
            for i, (_, words) in own.items():
                word_times.retime(words, times[i])

    def _start(self, row: _Row) -> tuple[int, ...]:
        return tokenizer_of(self._model).sot_sequence(row.language, row.live.options.task, timestamps=False)

    def _positions(self, row: _Row) -> int:
        frames = row.live.recording.window_frames
        return max(1, row.window.n_frames * self._model.config.max_source_positions // frames)


@partial(jax.jit, donate_argnums=0)
def _put(encoded: EncodedWindows, one: EncodedWindows, row: jax.Array) -> EncodedWindows:
    """Replaces one of the windows, in place."""
    return jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, row, axis=0), encoded, one)


def choose_language(probs: Mapping[str, float], allowed: Sequence[str] = ()) -> str:
    """The most probable of the allowed languages, or of all."""
    return most_probable({code: probs[code] for code in allowed or probs})


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device ran out of memory."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
