"""What `transcribe` shows of its recordings while they are transcribed: their segments, or how far they are."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from whisper_nnx.audio.loading import FRAMES_PER_SECOND
from whisper_nnx.output.colors import colored
from whisper_nnx.output.progress import AudioProgress, Bar, clock, stated_duration_s, unwrapped
from whisper_nnx.output.results import Segment
from whisper_nnx.output.subtitles import text_with_speaker
from whisper_nnx.output.writers import format_timestamp
from whisper_nnx.text.languages import LANGUAGES

if TYPE_CHECKING:
    from whisper_nnx.transcription.opening import Opened
    from whisper_nnx.transcription.options import TranscribeOptions

Source = tuple[Any, "TranscribeOptions"]  # a recording and its options


class Report:
    """Prints segments (verbose=True), moves a bar (False), calls `progress` back. A context.

    sources: the recordings and their options. Where there are several, each line names its recording.
    """

    def __init__(
        self,
        sources: Sequence[Source | Exception],
        verbose: bool | None = None,
        print_colors: bool = False,
        progress: Callable[[float, float], None] | None = None,
    ):
        self.verbose, self._colors, self._callback = verbose, print_colors, progress
        self._sources = sources
        self._language_shown: set[int] = set()
        counted = verbose is False or progress is not None
        self._progress = AudioProgress([*map(_planned_s, sources)]) if counted else None
        self._now = self._progress.now() if self._progress else (0.0, 0.0)
        self._bar = Bar(self._now[1], clock, _speed, shown=verbose is False)

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def detecting(self, options: TranscribeOptions) -> None:
        if self.verbose and options.language_detection_segments == 1 and not options.vad_filter:
            print("Detecting language using up to the first 30 seconds. Use `--language` to specify the language")

    def opened(self, opened: Opened) -> None:
        """Names the language that was detected."""
        if self.verbose is not None and opened.language_probs and opened.number not in self._language_shown:
            self._language_shown.add(opened.number)
            name = LANGUAGES.get(opened.language, opened.language).title()
            self._bar.write(f"{self._label(opened.number)}Detected language: {name}")

    def window(self, opened: Opened, segments: list[Segment]) -> None:
        self.opened(opened)
        self._advance(opened.number, *opened.progress)
        for segment in segments if self.verbose else []:
            if segment["text"]:
                start, end = format_timestamp(segment["start"]), format_timestamp(segment["end"])
                print(f"{self._label(opened.number)}[{start} --> {end}] {self._shown(segment)}", flush=True)

    def done(self, opened: Opened) -> None:
        """Says why, where there is no text."""
        self.opened(opened)
        self._advance(opened.number, *opened.progress)
        if self.verbose and (reason := opened.why_empty()):
            warnings.warn(f"{self.name(opened.number)}: no text: {reason}", stacklevel=4)

    def failed(self, number: int) -> None:
        if self._progress is not None:
            whole_s = self._progress.length_s(number)
            self._advance(number, whole_s, whole_s)

    def name(self, number: int) -> str:
        source = self._file(number)
        if isinstance(source, str | os.PathLike):
            return "standard input" if source == "-" else os.fspath(source)
        return f"recording {number}" if len(self._sources) > 1 else "the recording"

    def _label(self, number: int) -> str:
        if len(self._sources) == 1:
            return ""
        source = self._file(number)
        return f"{os.fspath(source) if isinstance(source, str | os.PathLike) else number}: "

    def _file(self, number: int) -> Any:
        source = self._sources[number]
        return None if isinstance(source, Exception) else unwrapped(source[0])[0]

    def _advance(self, number: int, done_s: float, whole_s: float) -> None:
        if self._progress is None:
            return
        self._progress.set(number, done_s, whole_s)
        now = self._progress.now()
        self._bar.update(*now)
        if self._callback is not None and now != self._now:
            self._callback(*now)
        self._now = now

    def _shown(self, segment: Segment) -> str:
        text = segment["text"]
        if not self._colors:
            return text[: len(text) - len(text.lstrip())] + text_with_speaker(segment)
        words = [(word["word"], word["probability"]) for word in segment.get("words", [])]
        words = words or [(text, math.exp(segment["avg_logprob"]))]
        return text_with_speaker({**segment, "text": "".join(colored(*word) for word in words)})


def _speed(rate: float) -> str:
    return f"{rate:.1f}x real time"


def _planned_s(recording: Source | Exception) -> float | None:
    """How much of a recording is to be transcribed; None where that is not known before it is opened."""
    if isinstance(recording, Exception):
        return 0.0
    source, options = recording
    try:
        whole_s = stated_duration_s(source, options.sampling_rate, options.audio_track)
    except Exception:  # of an array, say: opening it says what is wrong
        return None
    if whole_s is None:
        return None
    clips = options.longform.clips(int(whole_s * FRAMES_PER_SECOND))
    return sum(end - start for start, end in clips) / FRAMES_PER_SECOND
