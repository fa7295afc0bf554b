"""`transcribe`: recordings of any length to text. `python -m whisper_nnx.transcribe` is the command line."""

from __future__ import annotations

import sys

if __name__ == "__main__":  # before all else: the command sets XLA up before JAX is imported, and --help needs neither
    from whisper_nnx.cli import main

    sys.exit(main())

import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from whisper_nnx.audio import FRAMES_PER_SECOND
from whisper_nnx.audio_array import SOUND_KEYS, is_pair
from whisper_nnx.colors import colored
from whisper_nnx.driver import Batch, Live, is_out_of_memory
from whisper_nnx.languages import LANGUAGES
from whisper_nnx.opening import Opened, open_recording
from whisper_nnx.options import TranscribeOptions
from whisper_nnx.results import Segment, Transcript
from whisper_nnx.subtitles import spoken_text
from whisper_nnx.windows import tokenizer_of
from whisper_nnx.writers import format_timestamp

if TYPE_CHECKING:
    from whisper_nnx.model import Whisper

Progress = Callable[[float, float], None]


@overload
def transcribe(
    model: Whisper, audio: list[Any] | tuple[Any, ...], *, batch_size: int = ..., **options: Any
) -> list[Transcript | Exception]: ...
@overload
def transcribe(model: Whisper, audio: Any, *, batch_size: int = ..., **options: Any) -> Transcript: ...
def transcribe(model: Whisper, audio: Any, **options: Any) -> Transcript | list[Transcript | Exception]:
    """Transcribes a recording of any length, or a list of them; options and result are openai-whisper's.

    audio: a path, bytes, a file object, "-" (standard input), samples (with `sampling_rate`, by default 16,000 Hz), or
      what else `load_audio` takes; or a mapping {"audio": one of these, option: value, ...} with options of its own. Of
      a list of these the transcripts, in the same order, are those that each would have alone; where a recording
      fails, its exception takes the transcript's place.
    batch_size: how many windows are decoded together, each of another recording. The windows of one recording follow
      each other, unless vad_filter or independent_clips cut it into pieces, which are recordings of their own.
    verbose: True prints the segments as they come, False shows a progress bar, None is silent.
    print_colors: of what is printed, the less probable is redder.
    progress: called after each window with the seconds that are done and those of the whole (of all opened so far).

    Further options, by what they decide:
    - the next try of a window: temperature (one, or several to try in turn when a threshold is failed), beam_size and
      patience (for temperature 0), best_of (above 0), n_best, compression_ratio_threshold, logprob_threshold,
      no_speech_threshold: see FallbackOptions;
    - the next window: condition_on_previous_text, initial_prompt, carry_initial_prompt, hotwords, max_context,
      clip_timestamps, offset_s, duration_s, independent_clips, multilingual, word_timestamps, token_timestamps,
      alignment_heads, prepend_punctuations, append_punctuations, hallucination_silence_threshold: see LongformOptions;
    - each window: language, task, length_penalty, prefix, suppress_tokens, suppress_regex, suppress_blank,
      without_timestamps, max_initial_timestamp, sample_len, max_new_tokens, repetition_penalty, no_repeat_ngram_size,
      max_repeats, tinydiarize: see DecodingOptions;
    - the recording: vad_filter, vad_parameters, language_detection_segments, language_detection_threshold,
      allowed_languages, diarize, and seed: the same one gives the same samples. See TranscribeOptions.

    Raises ValueError for options that cannot be met, AudioError (a ValueError) or OSError for unreadable audio.
    """
    if not isinstance(audio, list | tuple) or is_pair(audio):
        stream = iter_segments(model, audio, **options)
        for _ in stream:
            pass
        return stream.transcript
    results: dict[int, Transcript | Exception] = dict(iter_transcripts(model, audio, **options))
    return [results[number] for number in range(len(audio))]


def iter_transcripts(
    model: Whisper,
    audio: Sequence[Any],
    *,
    batch_size: int = 1,
    verbose: bool | None = None,
    print_colors: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Iterator[tuple[int, Transcript | Exception]]:
    """As `transcribe` of a list, but each comes, with its place in the list, as soon as it is done."""
    report = _Report(verbose, print_colors, progress)
    if _checked(batch_size) > 1:  # lines of several recordings come in turn
        named = [one if isinstance(one, str | os.PathLike) else number for number, one in enumerate(audio)]
        report.labels = [f"{name}: " for name in named]
    batch = Batch(model, int(batch_size))
    return _run_all(batch, _Recordings(model, audio, options, batch), report)


def iter_segments(
    model: Whisper,
    audio: Any,
    *,
    batch_size: int = 1,
    verbose: bool | None = None,
    print_colors: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> SegmentStream:
    """As `transcribe` of one recording, but its segments come one by one, as soon as they are known."""
    source, chosen = _source(audio, options)
    if _checked(batch_size) > 1 and not (chosen.vad_filter or chosen.longform.independent_clips):
        warnings.warn(
            f"batch_size={batch_size} has no effect on one recording, whose windows follow each other; "
            "vad_filter=True makes each stretch of speech a recording of its own, independent_clips=True each clip",
            stacklevel=2,
        )
        batch_size = 1
    return SegmentStream(model, source, chosen, batch_size, _Report(verbose, print_colors, progress))


class SegmentStream(Iterator[Segment]):
    """Segments of a recording, in order, decoded as they are asked for; `language` is known at once.

    After the last one `transcript` is the whole; before, what there is so far.
    """

    def __init__(self, model: Whisper, source: Any, options: TranscribeOptions, batch_size: int, report: _Report):
        detect = options.decoding.language is None and tokenizer_of(model).is_multilingual
        if report.verbose and detect and options.language_detection_segments == 1 and not options.vad_filter:
            print("Detecting language using up to the first 30 seconds. Use `--language` to specify the language")
        self._opened = open_recording(model, source, options)
        self.language, self.duration_s = self._opened.language, self._opened.duration_s
        if report.verbose is not None and detect:
            print(f"Detected language: {LANGUAGES.get(self.language, self.language).title()}")
        self._segments = self._run(Batch(model, batch_size), report)

    @property
    def transcript(self) -> Transcript:
        return self._opened.transcript()

    def __next__(self) -> Segment:
        return next(self._segments)

    def _run(self, batch: Batch, report: _Report) -> Iterator[Segment]:
        with report:
            for live, window in batch.run(iter(self._opened.lives)):
                if isinstance(window, Exception):
                    raise window
                segments = self._opened.add(live, window)
                report.window(self._opened, segments)
                yield from segments


def _source(
    audio: Any, options: Mapping[str, Any], shared: TranscribeOptions | None = None
) -> tuple[Any, TranscribeOptions]:
    """A recording and its options, of which a mapping may have some of its own; `shared` are `options`, if made."""
    if not isinstance(audio, Mapping):
        return audio, shared or TranscribeOptions.of(**options)
    own = dict(audio)
    sound = {key: own.pop(key) for key in SOUND_KEYS if key in own}
    if not sound:
        raise ValueError(f"a recording given with {', '.join(map(repr, own)) or 'nothing'} lacks 'audio'; add it")
    return sound, TranscribeOptions.of(**{**options, **own})


def _checked(batch_size: int) -> int:
    if isinstance(batch_size, bool) or batch_size != int(batch_size) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be a whole number of at least 1")
    return int(batch_size)


class _Recordings(Iterator[Live]):
    """Opens recordings one after the other, as their chains of windows are asked for.

    `failed` are the exceptions of those that could not be transcribed, `opened` the others. Where opening one raises
    for want of the device's memory, the next call tries it again.
    """

    def __init__(self, model: Whisper, audio: Sequence[Any], options: Mapping[str, Any], batch: Batch):
        self._model, self._audio, self._options, self._batch = model, audio, options, batch
        self._shared = TranscribeOptions.of(**options)  # what is wrong for all is raised at once
        self._lives: deque[Live] = deque()
        self._next = 0
        self.opened: dict[int, Opened] = {}
        self.failed: dict[int, Exception] = {}

    def __next__(self) -> Live:
        while not self._lives:
            if self._next == len(self._audio):
                raise StopIteration
            try:
                opened = self._open(self._audio[self._next])
                self.opened[self._next] = opened
                self._lives.extend(opened.lives)
            except Exception as error:
                if is_out_of_memory(error) and self._batch.may_halve:
                    raise
                self.failed[self._next] = error
            self._next += 1
        return self._lives.popleft()

    def _open(self, audio: Any) -> Opened:
        source, options = _source(audio, self._options, self._shared)
        return open_recording(self._model, source, options, number=self._next)

    def fail(self, number: int, error: Exception) -> None:
        del self.opened[number]
        self.failed[number] = error

    def ended(self) -> Iterator[tuple[int, Transcript | Exception]]:
        """Those that are done, each told once."""
        for number in [number for number, opened in self.opened.items() if opened.done]:
            yield number, self.opened.pop(number).transcript()
        while self.failed:
            yield self.failed.popitem()


def _run_all(batch: Batch, recordings: _Recordings, report: _Report) -> Iterator[tuple[int, Transcript | Exception]]:
    with report:
        for live, window in batch.run(recordings):
            if (opened := recordings.opened.get(live.number)) is None:
                continue  # another of its pieces failed
            try:
                if isinstance(window, Exception):
                    raise window
                segments = opened.add(live, window)
            except Exception as error:
                batch.drop(live)
                recordings.fail(live.number, error)
            else:
                report.window(opened, segments)
            yield from recordings.ended()
        yield from recordings.ended()


class _Report:
    """Tells how far the recordings are: prints segments, moves a bar, calls back."""

    def __init__(self, verbose: bool | None, print_colors: bool, progress: Progress | None):
        from tqdm import tqdm

        self.verbose, self._colors, self._progress = verbose, print_colors, progress
        self._frames: dict[int, tuple[int, int]] = {}  # done and whole, by recording
        self._done = 0
        self.labels: Sequence[str] = ()  # what to print before the lines of each recording
        self._bar = tqdm(total=0, unit="frames", disable=verbose is not False)

    def __enter__(self) -> _Report:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def window(self, opened: Opened, segments: list[Segment]) -> None:
        self._frames[opened.number] = opened.progress
        done, whole = map(sum, zip(*self._frames.values(), strict=True))
        if done != self._done:
            self._bar.total = whole
            self._bar.update(max(0, done - self._bar.n))
            if self._progress is not None:
                self._progress(done / FRAMES_PER_SECOND, whole / FRAMES_PER_SECOND)
        self._done = done
        label = self.labels[opened.number] if self.labels else ""
        for segment in segments if self.verbose else []:
            if segment["text"]:
                start, end = format_timestamp(segment["start"]), format_timestamp(segment["end"])
                print(f"{label}[{start} --> {end}] {self._shown(segment)}", flush=True)

    def _shown(self, segment: Segment) -> str:
        text = segment["text"]
        if not self._colors:
            return text[: len(text) - len(text.lstrip())] + spoken_text(segment)
        words = [(word["word"], word["probability"]) for word in segment.get("words", [])]
        words = words or [(text, math.exp(segment["avg_logprob"]))]
        return spoken_text({**segment, "text": "".join(colored(*word) for word in words)})
