"""The driver of long recordings: takes the next window of each, decodes them as one batch, hands the results back.

`python -m whisper_nnx.transcribe` is the command line.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from whisper_nnx.audio import load_audio
from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.fallback import FallbackOptions, decode_with_fallback
from whisper_nnx.features import RecordingMel
from whisper_nnx.languages import LANGUAGES, to_language_code
from whisper_nnx.longform import Draft, LongformOptions, Recording, Window
from whisper_nnx.results import Segment, Transcript
from whisper_nnx.segments import FRAMES_PER_SECOND
from whisper_nnx.timing import align_tokens
from whisper_nnx.windows import (
    EncodedWindows,
    detect_languages,
    encode_windows,
    most_probable,
    row_seed,
    tokenizer_of,
)
from whisper_nnx.words import APPENDED, PREPENDED, WordTiming, words_from_tokens
from whisper_nnx.writers import format_timestamp

if TYPE_CHECKING:
    from whisper_nnx.model import Whisper

Progress = Callable[[float, float], None]


def transcribe(
    model: Whisper,
    audio: Any,
    *,
    verbose: bool | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Transcript:
    """Transcribes a recording of any length; options and result are openai-whisper's.

    audio: a path, bytes, a file object, "-" (standard input), or samples (with `sampling_rate`, by default 16,000 Hz).
    verbose: True prints the segments as they come, False shows a progress bar, None is silent.
    progress: called after each window with the seconds that are done and those of the whole.
    options: those of `iter_segments`.
    """
    stream = iter_segments(model, audio, verbose=verbose, progress=progress, **options)
    for _ in stream:
        pass
    return stream.transcript


def iter_segments(
    model: Whisper,
    audio: Any,
    *,
    verbose: bool | None = None,
    progress: Progress | None = None,
    sampling_rate: int | None = None,
    temperature: float | Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
    compression_ratio_threshold: float | None = 2.4,
    logprob_threshold: float | None = -1.0,
    no_speech_threshold: float | None = 0.6,
    condition_on_previous_text: bool = True,
    initial_prompt: str | None = None,
    carry_initial_prompt: bool = False,
    clip_timestamps: str | Sequence[float] = "0",
    word_timestamps: bool = False,
    prepend_punctuations: str = PREPENDED,
    append_punctuations: str = APPENDED,
    hallucination_silence_threshold: float | None = None,
    beam_size: int | None = None,
    patience: float | None = None,
    best_of: int | None = None,
    seed: int = 0,
    **decode_options: Any,
) -> SegmentStream:
    """As `transcribe`, but the segments come one by one, as soon as their window is decoded.

    temperature: one, or several to try in turn when a threshold is failed: compression_ratio_threshold (the text
    repeats itself), logprob_threshold (it is improbable), unless no_speech_threshold says that nobody speaks. beam_size
    and patience hold for temperature 0, best_of for those above. condition_on_previous_text to
    hallucination_silence_threshold: see LongformOptions. decode_options: language, task and the other fields of
    DecodingOptions. seed: of the sampling; the same seed gives the same samples.

    Raises ValueError for options that cannot be met, AudioError (a ValueError) or OSError for unreadable audio.
    """
    for name, instead in {"prompt": "initial_prompt", "fp16": "load_model(..., dtype=jnp.float16)"}.items():
        if name in decode_options:
            raise ValueError(f"{name}={decode_options[name]!r} is no option of a whole recording; use {instead}")
    temperatures = (temperature,) if isinstance(temperature, int | float) else tuple(map(float, temperature))
    fallback = FallbackOptions(
        temperatures,
        beam_size,
        patience,
        best_of,
        compression_ratio_threshold,
        logprob_threshold,
        no_speech_threshold,
    )
    longform = LongformOptions(
        condition_on_previous_text,
        initial_prompt,
        carry_initial_prompt,
        clip_timestamps,
        word_timestamps,
        prepend_punctuations,
        append_punctuations,
        hallucination_silence_threshold,
    )
    if decode_options.get("language") is not None:
        decode_options["language"] = to_language_code(decode_options["language"])
    decoding = DecodingOptions(**decode_options)
    if decoding.task == "lang_id":
        raise ValueError(
            "task='lang_id' is for windows; for a recording leave language=None and read result['language']"
        )
    if word_timestamps and decoding.task == "translate":
        warnings.warn("word times of a translation may not be reliable", stacklevel=2)
    live = _open(model, load_audio(audio, sampling_rate), decoding, longform, verbose)
    return SegmentStream(model, live, fallback, seed, verbose, progress)


@dataclass
class _Live:
    """A recording under way, with its sound and the options of its windows."""

    recording: Recording
    mel: RecordingMel
    options: DecodingOptions
    encoded: dict[tuple[int, int], EncodedWindows] = field(default_factory=dict)  # the latest window


def _open(
    model: Whisper, waveform: np.ndarray, options: DecodingOptions, longform: LongformOptions, verbose: bool | None
) -> _Live:
    """Makes a recording ready to be stepped: its language is known."""
    config, tokenizer = model.config, tokenizer_of(model)
    frames = 2 * config.max_source_positions
    mel = RecordingMel(waveform, config.num_mel_bins, frames)
    encoded: dict[tuple[int, int], EncodedWindows] = {}
    language = options.language
    if not tokenizer.is_multilingual:
        if language not in (None, "en"):
            warnings.warn(
                f"this model is English-only, but language={language!r} was asked for; using English", stacklevel=4
            )
        language = "en"
    elif language is None:
        if verbose:
            print("Detecting language using up to the first 30 seconds. Use `--language` to specify the language")
        encoded[0, frames] = encode_windows(model, mel.window(0, frames)[None])
        language = most_probable(detect_languages(model, encoded[0, frames])[0])
        if verbose is not None:
            print(f"Detected language: {LANGUAGES.get(language, language).title()}")
    recording = Recording(
        tokenizer,
        language,
        mel.content_frames,
        longform,
        frames,
        config.max_source_positions,
        config.max_target_positions,
    )
    return _Live(recording, mel, replace(options, language=language), encoded)


def _step(model: Whisper, live: _Live, fallback: FallbackOptions, seed: int) -> list[Segment] | None:
    """Decodes the next window -> its new segments, or None when there is none left."""
    window = live.recording.next_window()
    if window is None:
        return None
    place = (window.start_frame, window.n_frames)
    if place not in live.encoded:
        live.encoded = {place: encode_windows(model, live.mel.window(*place)[None])}
    options = replace(live.options, prompt=window.prompt)
    seeds = [row_seed(seed, window.start_frame)]
    (result,) = decode_with_fallback(model, live.encoded[place], [options], fallback, seeds)
    if fallback.is_silence(result):
        live.recording.skip(window)
        return []
    draft = live.recording.draft(window, result)
    words = _align(model, live, window, draft) if live.recording.options.word_timestamps else None
    return live.recording.accept(window, draft, words)


def _align(model: Whisper, live: _Live, window: Window, draft: Draft) -> list[WordTiming]:
    """The words of a window, on the encoder output that it was decoded from."""
    if not draft.text_tokens:
        return []
    tokenizer, config, recording = tokenizer_of(model), model.config, live.recording
    start = tokenizer.sot_sequence(recording.language, live.options.task, timestamps=False)
    positions = max(1, window.n_frames * config.max_source_positions // recording.window_frames)
    cross = live.encoded[window.start_frame, window.n_frames].cross
    ((begins_s, probs),) = align_tokens(
        model.decoder, cross, config, start, [draft.text_tokens], tokenizer.special.eot, [positions]
    )
    return words_from_tokens(tokenizer, draft.text_tokens, begins_s, probs, recording.language)


class SegmentStream(Iterator[Segment]):
    """Segments of a recording, in order, decoded as they are asked for; `language` is known at once.

    After the last one `transcript` is the whole; before, what there is so far.
    """

    def __init__(
        self,
        model: Whisper,
        live: _Live,
        fallback: FallbackOptions,
        seed: int,
        verbose: bool | None,
        progress: Progress | None,
    ):
        self.language = live.recording.language
        self.duration_s = live.recording.content_frames / FRAMES_PER_SECOND
        self._live = live
        self._segments = self._run(model, fallback, seed, verbose, progress)

    @property
    def transcript(self) -> Transcript:
        return self._live.recording.transcript()

    def __next__(self) -> Segment:
        return next(self._segments)

    def _run(
        self,
        model: Whisper,
        fallback: FallbackOptions,
        seed: int,
        verbose: bool | None,
        progress: Progress | None,
    ) -> Iterator[Segment]:
        from tqdm import tqdm

        recording = self._live.recording
        with tqdm(total=recording.content_frames, unit="frames", disable=verbose is not False) as bar:
            while (segments := _step(model, self._live, fallback, seed)) is not None:
                done = min(recording.seek, recording.content_frames)
                bar.update(max(0, done - bar.n))
                if progress is not None:
                    progress(done / FRAMES_PER_SECOND, self.duration_s)
                for segment in segments:
                    if verbose and segment["text"]:
                        start, end = format_timestamp(segment["start"]), format_timestamp(segment["end"])
                        print(f"[{start} --> {end}] {segment['text']}", flush=True)
                    yield segment


if __name__ == "__main__":
    from whisper_nnx.cli import main

    sys.exit(main())
