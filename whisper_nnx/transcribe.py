"""`transcribe`: recordings of any length to text. `python -m whisper_nnx.transcribe` is the command line."""

from __future__ import annotations

import sys

if __name__ == "__main__":  # before all else: the command sets XLA up before JAX is imported, and --help needs neither
    from whisper_nnx.cli import main

    sys.exit(main())

import difflib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, overload

from whisper_nnx.audio import FRAMES_PER_SECOND, load_audio
from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.driver import Batch, Live, open_recording
from whisper_nnx.fallback import FallbackOptions
from whisper_nnx.languages import LANGUAGES, to_language_code
from whisper_nnx.longform import LongformOptions
from whisper_nnx.results import Segment, Transcript
from whisper_nnx.windows import tokenizer_of
from whisper_nnx.writers import format_timestamp

if TYPE_CHECKING:
    import numpy as np

    from whisper_nnx.model import Whisper

Progress = Callable[[float, float], None]


@dataclass(frozen=True)
class TranscribeOptions:
    """What may be asked of a recording: how windows follow each other, when they are tried again, how each is decoded.

    All fields of the three kinds are keyword arguments of `transcribe`. `temperature`, one or several to try in turn,
    beam_size, patience and best_of are those of the ladder.
    """

    longform: LongformOptions
    fallback: FallbackOptions
    decoding: DecodingOptions
    seed: int = 0
    sampling_rate: int | None = None

    @classmethod
    def of(cls, *, seed: int = 0, sampling_rate: int | None = None, **options: Any) -> TranscribeOptions:
        """Sorts keyword arguments. TypeError for an unknown one, ValueError for what cannot be met."""
        for name, instead in {"prompt": "initial_prompt", "fp16": "load_model(..., dtype=jnp.float16)"}.items():
            if name in options:
                raise ValueError(f"{name}={options[name]!r} is no option of a whole recording; use {instead}")
        if "temperature" in options:
            given = options.pop("temperature")
            options["temperatures"] = (given,) if isinstance(given, int | float) else tuple(map(float, given))
        if options.get("language") is not None:
            options["language"] = to_language_code(options["language"])

        kinds: dict[Any, dict[str, Any]] = {LongformOptions: {}, FallbackOptions: {}, DecodingOptions: {}}
        for name, value in options.items():
            kind = next((kind for kind in kinds if name in kind.__dataclass_fields__), None)
            if kind is None:
                known = [name for kind in kinds for name in kind.__dataclass_fields__]
                near = "".join(f"; do you mean {n}?" for n in difflib.get_close_matches(name, known, 1))
                raise TypeError(f"transcribe() has no option {name!r}{near}")
            kinds[kind][name] = value
        longform, fallback, decoding = (kind(**values) for kind, values in kinds.items())
        made = cls(longform, fallback, decoding, seed, sampling_rate)
        if made.decoding.task == "lang_id":
            raise ValueError("task='lang_id' is for windows; of a recording leave language=None and read the result's")
        if made.longform.word_timestamps and made.decoding.task == "translate":
            warnings.warn("word times of a translation may not be reliable", stacklevel=3)
        return made

    def open(self, model: Whisper, samples: np.ndarray, number: int = 0) -> Live:
        """Makes samples [N] ready to be decoded; `number` tells the recordings of one call apart."""
        decoding = self.decoding
        if not tokenizer_of(model).is_multilingual and decoding.language not in (None, "en"):
            asked = f"language={decoding.language!r}"
            warnings.warn(f"this model is English-only, but {asked} was asked for; using English", stacklevel=4)
            decoding = replace(decoding, language="en")
        return open_recording(model, samples, decoding, self.longform, self.seed, number)


@overload
def transcribe(
    model: Whisper, audio: list[Any] | tuple[Any, ...], *, batch_size: int = ..., **options: Any
) -> list[Transcript | Exception]: ...
@overload
def transcribe(model: Whisper, audio: Any, *, batch_size: int = ..., **options: Any) -> Transcript: ...
def transcribe(
    model: Whisper,
    audio: Any,
    *,
    batch_size: int = 1,
    verbose: bool | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Transcript | list[Transcript | Exception]:
    """Transcribes a recording of any length, or a list of them; options and result are openai-whisper's.

    audio: a path, bytes, a file object, "-" (standard input), or samples (with `sampling_rate`, by default 16,000 Hz);
      or a list of these, of which `batch_size` are decoded together: the transcripts, in the same order, are those that
      each would have alone, and one that cannot be read is an exception in its place.
    verbose: True prints the segments as they come, False shows a progress bar, None is silent.
    progress: called after each window with the seconds that are done and those of the whole (of all opened so far).

    Further options, by what they decide:
    - the next try of a window: temperature (one, or several to try in turn when a threshold is failed), beam_size and
      patience (for temperature 0), best_of (above 0), compression_ratio_threshold, logprob_threshold,
      no_speech_threshold: see FallbackOptions;
    - the next window: condition_on_previous_text, initial_prompt, carry_initial_prompt, clip_timestamps,
      word_timestamps, prepend_punctuations, append_punctuations, hallucination_silence_threshold: see LongformOptions;
    - each window: language, task, length_penalty, prefix, suppress_tokens, suppress_blank, without_timestamps,
      max_initial_timestamp, sample_len: see DecodingOptions;
    - seed: the same one gives the same samples.

    Raises ValueError for options that cannot be met, AudioError (a ValueError) or OSError for unreadable audio.
    """
    chosen = TranscribeOptions.of(**options)
    if not isinstance(audio, list | tuple):
        stream = SegmentStream(model, audio, chosen, verbose, progress)
        for _ in stream:
            pass
        return stream.transcript
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    results: list[Transcript | Exception | None] = [None] * len(audio)

    def opened() -> Iterator[Live]:
        for number, source in enumerate(audio):
            try:
                samples = load_audio(source, chosen.sampling_rate)
            except (ValueError, OSError) as error:
                results[number] = error
            else:
                yield chosen.open(model, samples, number)

    with _Report(verbose, progress) as report:
        for live, segments in Batch(model, chosen.fallback, batch_size).run(opened()):
            if segments is None:
                results[live.number] = live.recording.transcript()
            else:
                report.window(live, segments)
    return [result for result in results if result is not None]


def iter_segments(
    model: Whisper, audio: Any, *, verbose: bool | None = None, progress: Progress | None = None, **options: Any
) -> SegmentStream:
    """As `transcribe` of one recording, but its segments come one by one, as soon as their window is decoded."""
    return SegmentStream(model, audio, TranscribeOptions.of(**options), verbose, progress)


class SegmentStream(Iterator[Segment]):
    """Segments of a recording, in order, decoded as they are asked for; `language` is known at once.

    After the last one `transcript` is the whole; before, what there is so far.
    """

    def __init__(
        self,
        model: Whisper,
        audio: Any,
        options: TranscribeOptions,
        verbose: bool | None = None,
        progress: Progress | None = None,
    ):
        detect = options.decoding.language is None and tokenizer_of(model).is_multilingual
        if verbose and detect:
            print("Detecting language using up to the first 30 seconds. Use `--language` to specify the language")
        self._live = options.open(model, load_audio(audio, options.sampling_rate))
        self.language = self._live.recording.language
        self.duration_s = self._live.recording.content_frames / FRAMES_PER_SECOND
        if verbose is not None and detect:
            print(f"Detected language: {LANGUAGES.get(self.language, self.language).title()}")
        self._segments = self._run(Batch(model, options.fallback), _Report(verbose, progress))

    @property
    def transcript(self) -> Transcript:
        return self._live.recording.transcript()

    def __next__(self) -> Segment:
        return next(self._segments)

    def _run(self, batch: Batch, report: _Report) -> Iterator[Segment]:
        with report:
            for live, segments in batch.run(iter([self._live])):
                if segments is not None:
                    report.window(live, segments)
                    yield from segments


class _Report:
    """Tells how far the recordings are: prints segments, moves a bar, calls back."""

    def __init__(self, verbose: bool | None, progress: Progress | None):
        from tqdm import tqdm

        self._verbose, self._progress = verbose, progress
        self._frames: dict[int, tuple[int, int]] = {}  # done and whole, by recording
        self._bar = tqdm(total=0, unit="frames", disable=verbose is not False)

    def __enter__(self) -> _Report:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def window(self, live: Live, segments: list[Segment]) -> None:
        recording = live.recording
        self._frames[live.number] = (min(recording.seek, recording.content_frames), recording.content_frames)
        done, whole = map(sum, zip(*self._frames.values(), strict=True))
        self._bar.total = whole
        self._bar.update(max(0, done - self._bar.n))
        if self._progress is not None:
            self._progress(done / FRAMES_PER_SECOND, whole / FRAMES_PER_SECOND)
        for segment in segments if self._verbose else []:
            if segment["text"]:
                start, end = format_timestamp(segment["start"]), format_timestamp(segment["end"])
                print(f"[{start} --> {end}] {segment['text']}", flush=True)
