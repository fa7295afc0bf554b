"""Steps recordings together: each row of a batch holds the next window of one of them. One recording is a batch of one.

Rows do not depend on each other, so that a transcript is the same in any company.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.fallback import FallbackOptions
from whisper_nnx.features import RecordingMel
from whisper_nnx.longform import Draft, LongformOptions, Recording, Window
from whisper_nnx.model import Whisper
from whisper_nnx.results import Segment
from whisper_nnx.timing import align_tokens
from whisper_nnx.windows import (
    DecodingResult,
    EncodedWindows,
    decode_windows,
    detect_languages,
    encode_windows,
    most_probable,
    row_seed,
    tokenizer_of,
)
from whisper_nnx.words import WordTiming, words_from_tokens


@dataclass
class Live:
    """A recording under way, with its sound and the options of its windows."""

    recording: Recording
    mel: RecordingMel
    options: DecodingOptions
    seed: int
    number: int = 0  # among the recordings of one call
    first_window: EncodedWindows | None = None  # its first 30 s, where its language was detected from them

    def encode(self, model: Whisper, window: Window) -> EncodedWindows:
        first, self.first_window = self.first_window, None
        if first is not None and (window.start_frame, window.n_frames) == (0, self.recording.window_frames):
            return first
        return encode_windows(model, self.mel.window(window.start_frame, window.n_frames)[None])


def open_recording(
    model: Whisper,
    waveform: np.ndarray,
    options: DecodingOptions,
    longform: LongformOptions,
    seed: int,
    number: int = 0,
) -> Live:
    """Makes samples [N] ready to be stepped; detects the language from the first 30 s unless it is given."""
    config, tokenizer = model.config, tokenizer_of(model)
    frames = 2 * config.max_source_positions
    mel = RecordingMel(waveform, config.num_mel_bins, frames)
    language, first_window = options.language, None
    if language is None and tokenizer.is_multilingual:
        first_window = encode_windows(model, mel.window(0, frames)[None])
        language = most_probable(detect_languages(model, first_window)[0])
    recording = Recording(
        tokenizer,
        language or "en",
        mel.content_frames,
        longform,
        frames,
        config.max_source_positions,
        config.max_target_positions,
    )
    return Live(recording, mel, replace(options, language=recording.language), seed, number, first_window)


@dataclass
class _Row:
    """What a row of the batch works on: a window, at one of the temperatures."""

    live: Live
    window: Window
    attempt: int = 0


class Batch:
    """`size` rows; each gets the next window of any recording as soon as it is free."""

    def __init__(self, model: Whisper, fallback: FallbackOptions, size: int = 1):
        self._model = model
        self._fallback = fallback
        self._rows: list[_Row | None] = [None] * size
        self._encoded: EncodedWindows | None = None

    def run(self, recordings: Iterator[Live]) -> Iterator[tuple[Live, list[Segment] | None]]:
        """(a recording, the segments of its next window), as they come; (it, None) when it is done.

        `recordings` are opened as rows become free. Only rows that failed a threshold are tried again, beside the
        others' first tries.
        """
        waiting: deque[Live] = deque()
        while True:
            for row in (row for row, busy in enumerate(self._rows) if busy is None):
                while (live := waiting.popleft() if waiting else next(recordings, None)) is not None:
                    window = live.recording.next_window()
                    if window is not None:
                        self._place(row, live, window)
                        break
                    yield live, None
            if not any(self._rows):
                return
            for live, segments in self._step():
                waiting.append(live)
                yield live, segments

    def _place(self, row: int, live: Live, window: Window) -> None:
        self._rows[row] = _Row(live, window)
        encoded = live.encode(self._model, window)
        if len(self._rows) == 1:
            self._encoded = encoded
            return
        if self._encoded is None:
            self._encoded = jax.tree.map(lambda x: jnp.zeros((len(self._rows), *x.shape[1:]), x.dtype), encoded)
        self._encoded = _put(self._encoded, encoded, np.int32(row))

    def _step(self) -> list[tuple[Live, list[Segment]]]:
        """Decodes all rows once -> what was said in those that are done, which are then free."""
        assert self._encoded is not None
        options = [self._options(row) if row else None for row in self._rows]
        seeds = [row_seed(row.live.seed, row.window.start_frame, row.attempt) if row else 0 for row in self._rows]
        results = decode_windows(self._model, self._encoded, options, seeds)

        done: list[tuple[int, _Row, DecodingResult]] = []
        for i, (row, result) in enumerate(zip(self._rows, results, strict=True)):
            if row is None or result is None:
                continue
            if row.attempt + 1 < len(self._fallback.temperatures) and self._fallback.needs_another_try(result):
                row.attempt += 1
            else:
                done.append((i, row, result))
                self._rows[i] = None
        return self._accept(done)

    def _options(self, row: _Row) -> DecodingOptions:
        temperature = self._fallback.temperatures[row.attempt]
        return self._fallback.options_at(temperature, replace(row.live.options, prompt=row.window.prompt))

    def _accept(self, done: Sequence[tuple[int, _Row, DecodingResult]]) -> list[tuple[Live, list[Segment]]]:
        """Hands the results back to their recordings, with word times where these are wanted."""
        drafts: dict[int, Draft] = {}
        for i, row, result in done:
            if not self._fallback.is_silence(result):
                drafts[i] = row.live.recording.draft(row.window, result)
        timed = {
            i: (row, drafts[i]) for i, row, _ in done if i in drafts and row.live.recording.options.word_timestamps
        }
        words = self._align(timed)
        accepted: list[tuple[Live, list[Segment]]] = []
        for i, row, _ in done:
            recording, segments = row.live.recording, []
            if i in drafts:
                segments = recording.accept(row.window, drafts[i], words.get(i))
            else:
                recording.skip(row.window)
            accepted.append((row.live, segments))
        return accepted

    def _align(self, timed: dict[int, tuple[_Row, Draft]]) -> dict[int, list[WordTiming]]:
        """The words of some rows, on the encoder output that they were decoded from."""
        spoken = {i: (row, draft) for i, (row, draft) in timed.items() if draft.text_tokens}
        words: dict[int, list[WordTiming]] = {i: [] for i in timed}
        if not spoken:
            return words
        assert self._encoded is not None
        config, tokenizer = self._model.config, tokenizer_of(self._model)
        any_row = next(iter(spoken.values()))
        starts, texts, positions = [], [], []
        for i in range(len(self._rows)):
            row, draft = spoken.get(i, any_row)
            language, task = row.live.recording.language, row.live.options.task
            starts.append(tokenizer.sot_sequence(language, task, timestamps=False))
            texts.append(draft.text_tokens)
            positions.append(
                max(1, row.window.n_frames * config.max_source_positions // row.live.recording.window_frames)
            )
        aligned = align_tokens(
            self._model.decoder, self._encoded.cross, config, starts, texts, tokenizer.special.eot, positions
        )
        for i, (row, draft) in spoken.items():
            words[i] = words_from_tokens(tokenizer, draft.text_tokens, *aligned[i], row.live.recording.language)
        return words


@partial(jax.jit, donate_argnums=0)
def _put(encoded: EncodedWindows, one: EncodedWindows, row: jax.Array) -> EncodedWindows:
    """Replaces one of the windows, in place."""
    return jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, row, axis=0), encoded, one)
