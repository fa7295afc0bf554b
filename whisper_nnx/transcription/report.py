"""What `transcribe` shows of its recordings while they are transcribed: their segments, or how far they are."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from whisper_nnx.audio.loading import FRAMES_PER_SECOND
from whisper_nnx.output.colors import colored
from whisper_nnx.output.progress import AudioProgress, Bar, clock, stated_duration_s, unwrapped
from whisper_nnx.output.results import Segment
from whisper_nnx.output.subtitles import text_with_speaker
from whisper_nnx.output.writers import format_timestamp
from whisper_nnx.text.languages import LANGUAGES
from whisper_nnx.transcription.reading import Source

if TYPE_CHECKING:
    from whisper_nnx.transcription.opening import Opened
    from whisper_nnx.transcription.options import CallOptions, TranscribeOptions


class Report:
    """Prints segments (verbose=True), moves a bar (False), calls `progress` back. A context.

    Args:
      call: what is shown, and how.
      count: the number of recordings, None where it is not known: then the total of `progress` is infinite until
        `complete` is called. Where there are several, each line names its recording.
      known: the recordings and their options, where they are known in advance.
    """

    def __init__(self, call: CallOptions, count: int | None, known: Sequence[Source | Exception] | None = None):
        self.verbose, self._colors, self._callback = call.verbose, call.print_colors, call.progress
        self._special = call.print_special
        self._several = count != 1
        self._names: dict[int, str | None] = {}  # of the files in progress
        self._language_shown: set[int] = set()
        self._progress = None
        self._is_planned = known is not None
        if call.verbose is False or call.progress is not None:
            stated_s = None if count is None else [None] * count
            self._progress = AudioProgress(stated_s if known is None else [*map(_planned_s, known)])
        self._now = self._progress.now() if self._progress else (0.0, 0.0)
        self._bar = Bar(self._now[1], clock, _speed, shown=call.verbose is False)

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def add(self, number: int, source: Source | Exception) -> None:
        """A recording that is among the next ones."""
        audio = None if isinstance(source, Exception) else unwrapped(source[0])[0]
        self._names[number] = os.fspath(audio) if isinstance(audio, str | os.PathLike) else None
        if self._progress is not None and not self._is_planned:
            self._progress.add(number, _planned_s(source))

    def complete(self) -> None:
        """No other recording will be added."""
        if self._progress is not None:
            self._progress.is_complete = True

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
                print(f"{self._label(opened.number)}[{start} --> {end}] {self._shown(segment, opened)}", flush=True)

    def done(self, opened: Opened) -> None:
        """Says why, where there is no text."""
        self.opened(opened)
        self._advance(opened.number, *opened.progress)
        if self.verbose and (reason := opened.why_empty()):
            warnings.warn(f"{self.name(opened.number)}: no text: {reason}", stacklevel=4)
        self._forget(opened.number)

    def failed(self, number: int) -> None:
        if self._progress is not None:
            whole_s = self._progress.length_s(number)
            self._advance(number, whole_s, whole_s)
        self._forget(number)

    def _forget(self, number: int) -> None:
        """There may be any number of recordings."""
        self._names.pop(number, None)
        self._language_shown.discard(number)
        if self._progress is not None:
            self._progress.forget(number)

    def name(self, number: int) -> str:
        if (name := self._names.get(number)) is not None:
            return "standard input" if name == "-" else name
        return f"recording {number}" if self._several else "the recording"

    def _label(self, number: int) -> str:
        name = self._names.get(number)
        return f"{number if name is None else name}: " if self._several else ""

    def _advance(self, number: int, done_s: float, whole_s: float) -> None:
        if self._progress is None:
            return
        self._progress.set(number, done_s, whole_s)
        now = self._progress.now()
        self._bar.update(*now)
        if self._callback is not None and now != self._now:
            self._callback(*now)
        self._now = now

    def _shown(self, segment: Segment, opened: Opened) -> str:
        if self._special:
            return opened.lives[0].recording.tokenizer.decode_with_timestamps(segment["tokens"])
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
