"""`transcribe`, `iter_segments`, `iter_transcripts`: recordings of any length to text."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sized
from contextlib import closing
from typing import TYPE_CHECKING, Any, Unpack, overload

import jax
from flax import nnx

from whisper_nnx.audio.arrays import AUDIO_KEYS, is_pair
from whisper_nnx.model.audio_context import with_audio_ctx
from whisper_nnx.model.masked_heads import with_masked_heads
from whisper_nnx.model.sharding import mesh_of, on_devices
from whisper_nnx.output.results import Segment, Transcript
from whisper_nnx.runtime.cores import reader_processes
from whisper_nnx.runtime.devices import rounded_up
from whisper_nnx.transcription.batch import Batch, is_out_of_memory
from whisper_nnx.transcription.drafts import with_draft
from whisper_nnx.transcription.language_models import with_lm
from whisper_nnx.transcription.opening import Opened, open_audio, open_recording, prepare_audio, read_samples
from whisper_nnx.transcription.options import CallOptions, TranscribeOptions
from whisper_nnx.transcription.reading import ReadAhead, Reading, Source
from whisper_nnx.transcription.report import Report
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
    - `CallOptions`: this call (batch_size, devices, audio_ctx, masked_heads, draft, verbose, print_colors,
      print_special, progress).

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
    audio: Iterable[Any],
    options: TranscribeOptions | None = None,
    **changes: Unpack[TranscribeChanges],
) -> Transcripts:
    """Like `transcribe` of a list, but yields (position in the list, transcript or exception) as recordings finish.

    `audio` may be any iterable, also one that never ends: about twice as many recordings as there are rows in a batch
    are requested in advance. Without a length, `progress` is called with an infinite total until the iterable ends. An
    exception of the iterable is raised after the transcripts of the recordings before it.
    """
    _require_several(audio)
    tokenizer_of(model)
    call, changed = CallOptions.split(changes)
    model = _of_call(model, call)
    shared = TranscribeOptions.of(options, **changed)  # an error in the shared options is raised at once
    call.check(shared)
    with_lm(tokenizer_of(model), shared)
    sources = (_source_or_error(one, options, changed, shared) for one in audio)
    count = len(audio) if isinstance(audio, Sized) else None
    known = list(sources) if count == 1 or isinstance(audio, list | tuple) else None
    report = Report(call, count, known)
    batch_size = call.batch_size
    rows_ahead = rounded_up(batch_size, mesh_of(model))
    if known is not None and len(known) == 1:
        [only] = known
        rows_ahead = 0  # nothing else is to be done
        if not isinstance(only, Exception):
            batch_size = _useful(batch_size, model, only[1])
            _announce_detection(model, only[1], report)
    processes = _default_readers(model) if call.readers is None else call.readers
    return Transcripts(model, sources if known is None else iter(known), batch_size, report, rows_ahead, processes)


def _of_call(model: Whisper, call: CallOptions) -> Whisper:
    model = with_masked_heads(with_audio_ctx(model, call.audio_ctx), call.masked_heads)
    return with_draft(on_devices(model, call.devices), call.draft)


def _default_readers(model: Whisper) -> int:
    return reader_processes(next(iter(jax.tree.leaves(nnx.state(model.decoder))[0].devices())).platform)


def iter_segments(
    model: Whisper, audio: Any, options: TranscribeOptions | None = None, **changes: Unpack[TranscribeChanges]
) -> SegmentStream:
    """Like `transcribe` of one recording, but yields its segments as soon as they are known."""
    tokenizer_of(model)
    call, changed = CallOptions.split(changes)
    model = _of_call(model, call)
    source, chosen = _source(audio, options, changed)
    call.check(chosen)
    batch_size = _useful(call.batch_size, model, chosen)
    report = Report(call, 1, [(source, chosen)])
    report.add(0, (source, chosen))
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
    """Yields (position in the list, transcript or exception) of each recording when it is done.

    Recordings are read ahead by other threads or processes, which end with the last transcript, with `close`, or when
    nothing refers to this iterator any more.
    """

    def __init__(
        self,
        model: Whisper,
        sources: Iterator[Source | Exception],
        batch_size: int,
        report: Report,
        rows_ahead: int,
        processes: int = 0,
    ):
        self.empty: dict[int, str] = {}  # position -> why a finished recording has no text
        batch = Batch(model, batch_size)
        self._recordings = _Recordings(model, sources, batch, report, rows_ahead, processes)
        self._results = _transcripts(self._recordings, batch, report, self.empty)

    def __next__(self) -> tuple[int, Transcript | Exception]:
        return next(self._results)

    def close(self) -> None:
        """Ends the transcription; `unfinished` remains."""
        self._results.close()

    def unfinished(self) -> dict[int, Transcript]:
        """Partial transcripts of the recordings in progress, by position in the list; also after an interruption.

        The last complete transcript is included until the next one is requested.
        """
        parts = {number: opened.transcript() for number, opened in self._recordings.opened.items()}
        return {number: part for number, part in sorted(parts.items()) if part["segments"]}


def _transcripts(
    recordings: _Recordings, batch: Batch, report: Report, empty: dict[int, str]
) -> Generator[tuple[int, Transcript | Exception], None, None]:
    with report, closing(recordings):
        for live, window in batch.run(recordings):
            if (opened := recordings.opened.get(live.number)) is None:
                continue  # another of its pieces failed
            try:
                if isinstance(window, Exception):
                    raise window
                segments = opened.add(live, window)
            except Exception as error:
                batch.cancel(live)
                recordings.fail(live.number, error)
            else:
                report.window(opened, segments)
            yield from _ended(recordings, report, empty)
        yield from _ended(recordings, report, empty)
        if recordings.broken is not None:
            raise recordings.broken


def _ended(
    recordings: _Recordings, report: Report, empty: dict[int, str]
) -> Iterator[tuple[int, Transcript | Exception]]:
    for number, ended in recordings.ended():
        if isinstance(ended, Exception):
            report.failed(number)
            yield number, ended
            continue
        report.done(ended)
        if reason := ended.why_empty():
            empty[number] = reason
        yield number, ended.transcript()


def _require_several(audio: Any) -> None:
    """Refuses what would be iterated over by mistake, such as the letters of a path or the samples of an array."""
    one = isinstance(audio, str | bytes | bytearray | memoryview | os.PathLike | Mapping) or is_pair(audio)
    if one or any(hasattr(audio, name) for name in ("__array__", "read", "get_all_samples")):
        raise TypeError(f"audio is one recording ({type(audio).__name__}); give a list, or use transcribe")
    if not isinstance(audio, Iterable):
        raise TypeError(f"audio of type {type(audio).__name__} is not iterable; give a list of recordings")


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

    Attributes:
      opened: recordings in progress.
      failed: exceptions of those that could not be transcribed.
      broken: what the iterator of sources raised, after which there are no more.

    If opening one runs out of the device's memory, the next call tries it again.
    """

    def __init__(
        self,
        model: Whisper,
        sources: Iterator[Source | Exception],
        batch: Batch,
        report: Report,
        depth: int,
        processes: int,
    ):
        self._model, self._batch, self._report = model, batch, report
        self._lives: deque[Live] = deque()
        self._reading: Reading | None = None  # read, but not opened
        self._ahead = ReadAhead(self._draw(sources), read_samples, depth, processes=processes)
        self.opened: dict[int, Opened] = {}
        self.failed: dict[int, Exception] = {}
        self.broken: Exception | None = None

    def __next__(self) -> Live:
        while not self._lives:
            reading = self._reading = self._reading or next(self._ahead)
            try:
                opened = self._open(reading)
                self.opened[reading.number] = opened
                self._lives.extend(opened.lives)
            except Exception as error:
                if is_out_of_memory(error) and self._batch.may_halve:
                    raise
                self.failed[reading.number] = error
            self._reading = None
        return self._lives.popleft()

    def _open(self, reading: Reading) -> Opened:
        while reading.warnings:
            warnings.warn(reading.warnings.pop(0), stacklevel=2)
        if isinstance(reading.source, Exception):
            raise reading.source
        assert reading.result is not None
        if isinstance(reading.result, Exception):
            raise reading.result
        audio = prepare_audio(self._model.config, reading.result)
        return open_audio(self._model, audio, reading.source[1], reading.number, at_once=False)

    def _draw(self, sources: Iterator[Source | Exception]) -> Iterator[Source | Exception]:
        try:
            for number, source in enumerate(sources):
                self._report.add(number, source)
                yield source
        except Exception as error:
            self.broken = error
        self._report.complete()

    def close(self) -> None:
        self._ahead.close()

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
