"""`transcribe`, `iter_segments`, `iter_transcripts`: recordings of any length to text."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack, overload

from whisper_nnx.audio.arrays import AUDIO_KEYS, is_pair
from whisper_nnx.model.sharding import mesh_of, on_devices
from whisper_nnx.output.results import Segment, Transcript
from whisper_nnx.runtime.devices import rounded_up
from whisper_nnx.transcription.batch import Batch, is_out_of_memory
from whisper_nnx.transcription.opening import Opened, open_recording
from whisper_nnx.transcription.options import CallOptions, TranscribeOptions
from whisper_nnx.transcription.report import Report, Source
from whisper_nnx.transcription.rows import Live
from whisper_nnx.transcription.windows import tokenizer_of

if TYPE_CHECKING:
    from whisper_nnx.model.whisper import Whisper
    from whisper_nnx.transcription.changes import TranscribeChanges


@overload
def transcribe(
    model: Whisper,
    audio: list[Any] | tuple[Any, ...],
    options: TranscribeOptions | None = None,
    **changes: Unpack[TranscribeChanges],
) -> list[Transcript | Exception]: ...
@overload
def transcribe(
    model: Whisper, audio: Any, options: TranscribeOptions | None = None, **changes: Unpack[TranscribeChanges]
) -> Transcript: ...
def transcribe(
    model: Whisper, audio: Any, options: TranscribeOptions | None = None, **changes: Unpack[TranscribeChanges]
) -> Transcript | list[Transcript | Exception]:
    """Transcribes a recording of any length, or a list of them; options and result are openai-whisper's.

    Keyword arguments are the options of these classes, by what they decide:

    - `FallbackOptions`: retries of a window (temperature, beam_size, best_of, thresholds, n_best);
    - `LongformOptions`: how windows follow each other (prompts, clips, word_timestamps,
      hallucination_silence_threshold);
    - `DecodingOptions`: each window (language, task, suppression, limits, repetition);
    - `TranscribeOptions`: the recording (seed, audio_track, vad_filter, language detection, diarize);
    - `CallOptions`: this call (batch_size, devices, verbose, print_colors, progress).

    Args:
      model: a model with a tokenizer.
      audio: a path, bytes, a file object, "-" (standard input), samples (with `sampling_rate`, by default 16,000 Hz),
        or anything else that `load_audio` takes; or a mapping {"audio": one of these, option: value, ...} with options
        of its own.
      options: from `TranscribeOptions.of`.
      changes: single options, which replace those of `options`.

    Returns:
      The transcript. For a list, the transcripts in the same order, each equal to that of the recording alone; a
      recording that fails has its exception in the transcript's place.

    Raises:
      ValueError: invalid or contradictory options, or (as AudioError) unreadable audio.
      TypeError: an unknown option.
      OSError: a file that cannot be opened.
    """
    if not isinstance(audio, list | tuple) or is_pair(audio):
        stream = iter_segments(model, audio, options, **changes)
        for _ in stream:
            pass
        return stream.transcript
    results: dict[int, Transcript | Exception] = dict(iter_transcripts(model, audio, options, **changes))
    return [results[number] for number in range(len(audio))]


def iter_transcripts(
    model: Whisper,
    audio: Sequence[Any],
    options: TranscribeOptions | None = None,
    **changes: Unpack[TranscribeChanges],
) -> Transcripts:
    """Like `transcribe` of a list, but yields (position in the list, transcript or exception) as recordings finish."""
    tokenizer_of(model)
    call, changed = CallOptions.split(changes)
    model = on_devices(model, call.devices)
    shared = TranscribeOptions.of(options, **changed)  # an error in the shared options is raised at once
    sources = [_source_or_error(one, options, changed, shared) for one in audio]
    batch_size = call.batch_size
    if len(sources) == 1 and not isinstance(sources[0], Exception):
        batch_size = _useful(batch_size, model, sources[0][1])
    report = Report(sources, call.verbose, call.print_colors, call.progress)
    return Transcripts(model, sources, batch_size, report)


def iter_segments(
    model: Whisper, audio: Any, options: TranscribeOptions | None = None, **changes: Unpack[TranscribeChanges]
) -> SegmentStream:
    """Like `transcribe` of one recording, but yields its segments as soon as they are known."""
    tokenizer_of(model)
    call, changed = CallOptions.split(changes)
    model = on_devices(model, call.devices)
    source, chosen = _source(audio, options, changed)
    batch_size = _useful(call.batch_size, model, chosen)
    report = Report([(source, chosen)], call.verbose, call.print_colors, call.progress)
    return SegmentStream(model, source, chosen, batch_size, report)


class SegmentStream(Iterator[Segment]):
    """Segments of a recording, in order, decoded as they are requested; `language` is known at once.

    `transcript` has the segments so far, and is complete after the last one.
    """

    def __init__(self, model: Whisper, source: Any, options: TranscribeOptions, batch_size: int, report: Report):
        _announce_detection(model, options, report)
        self._opened = open_recording(model, source, options)
        self.language, self.duration_s = self._opened.language, self._opened.duration_s
        report.opened(self._opened)
        self._segments = self._run(Batch(model, batch_size), report)

    @property
    def transcript(self) -> Transcript:
        return self._opened.transcript()

    def __next__(self) -> Segment:
        return next(self._segments)

    def _run(self, batch: Batch, report: Report) -> Iterator[Segment]:
        with report:
            for live, window in batch.run(iter(self._opened.lives)):
                if isinstance(window, Exception):
                    raise window
                segments = self._opened.add(live, window)
                report.window(self._opened, segments)
                yield from segments
            report.done(self._opened)


class Transcripts(Iterator[tuple[int, "Transcript | Exception"]]):
    """Yields (position in the list, transcript or exception) of each recording when it is done."""

    def __init__(self, model: Whisper, sources: Sequence[Source | Exception], batch_size: int, report: Report):
        self.empty: dict[int, str] = {}  # position -> why a finished recording has no text
        batch = Batch(model, batch_size)
        self._recordings = _Recordings(model, sources, batch)
        if len(sources) == 1 and not isinstance(sources[0], Exception):
            _announce_detection(model, sources[0][1], report)
        self._results = self._run(batch, report)

    def __next__(self) -> tuple[int, Transcript | Exception]:
        return next(self._results)

    def unfinished(self) -> dict[int, Transcript]:
        """Partial transcripts of the recordings in progress, by position in the list; also after an interruption.

        The last complete transcript is included until the next one is requested.
        """
        parts = {number: opened.transcript() for number, opened in self._recordings.opened.items()}
        return {number: part for number, part in sorted(parts.items()) if part["segments"]}

    def _run(self, batch: Batch, report: Report) -> Iterator[tuple[int, Transcript | Exception]]:
        with report:
            for live, window in batch.run(self._recordings):
                if (opened := self._recordings.opened.get(live.number)) is None:
                    continue  # another of its pieces failed
                try:
                    if isinstance(window, Exception):
                        raise window
                    segments = opened.add(live, window)
                except Exception as error:
                    batch.cancel(live)
                    self._recordings.fail(live.number, error)
                else:
                    report.window(opened, segments)
                yield from self._ended(report)
            yield from self._ended(report)

    def _ended(self, report: Report) -> Iterator[tuple[int, Transcript | Exception]]:
        for number, ended in self._recordings.ended():
            if isinstance(ended, Exception):
                report.failed(number)
                yield number, ended
                continue
            report.done(ended)
            if reason := ended.why_empty():
                self.empty[number] = reason
            yield number, ended.transcript()


def _source(
    audio: Any,
    options: TranscribeOptions | None,
    changes: Mapping[str, Any],
    shared: TranscribeOptions | None = None,
) -> Source:
    """A recording and its options, which a mapping may change; `shared`: the options without those changes."""
    if not isinstance(audio, Mapping):
        return audio, shared or TranscribeOptions.of(options, **changes)
    own = dict(audio)
    source = {key: own.pop(key) for key in AUDIO_KEYS if key in own}
    if not source:
        raise ValueError(f"a recording given with {', '.join(map(repr, own)) or 'nothing'} lacks 'audio'; add it")
    return source, TranscribeOptions.of(options, **{**changes, **own})


def _source_or_error(
    audio: Any, options: TranscribeOptions | None, changes: Mapping[str, Any], shared: TranscribeOptions
) -> Source | Exception:
    try:
        return _source(audio, options, changes, shared)
    except Exception as error:  # an error in its own options: the others are transcribed
        return error


def _announce_detection(model: Whisper, options: TranscribeOptions, report: Report) -> None:
    if options.decoding.language is None and tokenizer_of(model).is_multilingual:
        report.detecting(options)


def _useful(batch_size: int, model: Whisper, options: TranscribeOptions) -> int:
    """Returns batch_size, or 1 with a warning for a recording whose windows cannot be decoded together."""
    rows = rounded_up(batch_size, mesh_of(model))
    if rows == 1 or options.vad_filter or options.longform.independent_clips:
        return batch_size
    what = f"batch_size={batch_size}" if batch_size > 1 else f"dividing rows among {rows} devices"
    warnings.warn(
        f"{what} has no effect on one recording, whose windows follow each other; "
        "vad_filter=True makes each stretch of speech a recording of its own, independent_clips=True each clip",
        stacklevel=3,
    )
    return 1


class _Recordings(Iterator[Live]):
    """Opens recordings one by one, as their chains of windows are requested.

    `opened`: recordings in progress; `failed`: exceptions of those that could not be transcribed. If opening one runs
    out of the device's memory, the next call tries it again.
    """

    def __init__(self, model: Whisper, sources: Sequence[Source | Exception], batch: Batch):
        self._model, self._sources, self._batch = model, sources, batch
        self._lives: deque[Live] = deque()
        self._next = 0
        self.opened: dict[int, Opened] = {}
        self.failed: dict[int, Exception] = {}

    def __next__(self) -> Live:
        while not self._lives:
            if self._next == len(self._sources):
                raise StopIteration
            try:
                source = self._sources[self._next]
                if isinstance(source, Exception):
                    raise source
                opened = open_recording(self._model, *source, number=self._next)
                self.opened[self._next] = opened
                self._lives.extend(opened.lives)
            except Exception as error:
                if is_out_of_memory(error) and self._batch.may_halve:
                    raise
                self.failed[self._next] = error
            self._next += 1
        return self._lives.popleft()

    def fail(self, number: int, error: Exception) -> None:
        del self.opened[number]
        self.failed[number] = error

    def ended(self) -> Iterator[tuple[int, Opened | Exception]]:
        """Yields each finished recording once. It stays in `opened` until the next one is requested."""
        for number in [number for number, opened in self.opened.items() if opened.done]:
            yield number, self.opened[number]
            del self.opened[number]
        while self.failed:
            yield self.failed.popitem()
