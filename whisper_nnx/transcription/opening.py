"""From audio and options to recordings ready to be decoded: their language, and the pieces that they are cut into."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from whisper_nnx import ops
from whisper_nnx.audio.features import HOP_LENGTH, RecordingMel
from whisper_nnx.audio.loading import FRAMES_PER_SECOND, load_audio
from whisper_nnx.audio.vad import VadOptions, pack_spans, speech_spans
from whisper_nnx.model.config import WhisperConfig
from whisper_nnx.model.whisper import Whisper, warn_of_precision
from whisper_nnx.output.results import Segment, Transcript
from whisper_nnx.timing.alignment_heads import alignment_heads
from whisper_nnx.timing.word_times import word_heads
from whisper_nnx.transcription.attempts import check_window, initial_ids, prompt_room
from whisper_nnx.transcription.batch import choose_language
from whisper_nnx.transcription.calm import VAD, Calm
from whisper_nnx.transcription.grammars import least_tokens
from whisper_nnx.transcription.language_models import with_lm
from whisper_nnx.transcription.options import TranscribeOptions
from whisper_nnx.transcription.recording import Recording
from whisper_nnx.transcription.row_decoder import LARGEST_GROUP
from whisper_nnx.transcription.rows import Live, Place
from whisper_nnx.transcription.windows import EncodedWindows, detect_languages, encode_windows, tokenizer_of


class Opened:
    """A recording of one call: `lives` are its chains of windows, one for the whole or one for each piece.

    `add` takes the results of their windows; `segments` and `transcript` are in the order of the pieces.
    """

    def __init__(
        self,
        lives: list[Live],
        options: TranscribeOptions,
        *,
        number: int,
        language: str | None,
        duration_s: float,
        channels: np.ndarray | None = None,
        language_probs: Mapping[str, float] | None = None,
    ):
        self.number, self.duration_s, self.lives = number, duration_s, lives
        self._language = language
        self.language_probs = language_probs or {}  # where the language was detected
        self._options = options
        content_frames = round(duration_s * FRAMES_PER_SECOND)
        self._asked_frames = sum(end - start for start, end in options.longform.clips(content_frames))
        self._place = {id(live): place for place, live in enumerate(lives)}
        self._done_frames = [live.recording.progress[0] for live in lives]
        self._done, self._whole = sum(self._done_frames), sum(live.recording.progress[1] for live in lives)
        self.segments: list[Segment] = []
        self._channels = channels
        self._held: list[list[Segment]] = [[] for _ in lives]  # of pieces after the first unfinished one
        self._finished = [False for _ in lives]
        self._current = 0  # the first piece that is not done

    @property
    def language(self) -> str:
        """Its code; "" until it is detected in the first window, if that was not done at once."""
        return self._language or ""

    def detect(self, probs: dict[str, float]) -> None:
        """Takes the languages' probabilities in the first window."""
        self.language_probs = probs
        self._language = choose_language(probs, tuple(self._options.allowed_languages or ()))
        for live in self.lives:
            live.recording.language, live.on_language = self._language, None

    @property
    def done(self) -> bool:
        return self._current == len(self.lives)

    @property
    def progress(self) -> tuple[float, float]:
        """Seconds that are done, and all that are asked for; what holds no speech is done with the rest."""
        asked_s = self._asked_frames / FRAMES_PER_SECOND
        return (asked_s if self.done or not self._whole else asked_s * self._done / self._whole), asked_s

    def add(self, live: Live, segments: list[Segment] | None) -> list[Segment]:
        """Takes the segments of a window, or None when its chain is done -> those whose turn it is now, numbered."""
        piece = self._place[id(live)]
        done = live.recording.progress[0]
        self._done += done - self._done_frames[piece]
        self._done_frames[piece] = done
        self._held[piece] += segments or []
        self._finished[piece] |= segments is None
        ready: list[Segment] = []
        while not self.done:
            ready += self._held[self._current]
            self._held[self._current] = []
            if not self._finished[self._current]:
                break
            self._current += 1
        for segment in ready:
            segment["id"] = len(self.segments)
            self.segments.append(segment)
        if self._channels is not None:
            self._label_speakers(self._channels, ready)
        return ready

    def _label_speakers(self, channels: np.ndarray, segments: list[Segment]) -> None:
        from whisper_nnx.audio.channels import speakers

        spans = [(segment["start"], segment["end"]) for segment in segments]
        for segment, speaker in zip(segments, speakers(channels, spans), strict=True):
            segment["speaker"] = speaker

    def transcript(self) -> Transcript:
        """What there is so far, also of pieces that have an unfinished one before them."""
        parts = [live.recording.transcript() for live in self.lives]
        text = "".join(part["text"] for part in parts)
        segments = self.segments
        if held := [segment for piece in self._held[self._current :] for segment in piece]:
            held = [{**segment, "id": number} for number, segment in enumerate(held, start=len(segments))]
            if self._channels is not None:
                self._label_speakers(self._channels, held)
            segments = [*segments, *held]
        whole: Transcript = {"text": text, "segments": segments, "language": self.language, "duration": self.duration_s}
        if self.language_probs:
            whole["language_probability"] = self.language_probs[self.language]
        if retries := sum((live.retries for live in self.lives), Counter[str]()):
            whole["retries"] = dict(sorted(retries.items()))
        alternatives = [window for part in parts for window in part.get("alternatives", [])]
        if alternatives:
            whole["alternatives"] = alternatives
        return whole

    def why_empty(self) -> str | None:
        """Why there is no text, and what to change; None where there is some."""
        if any(segment["text"].strip() for segment in self.segments):
            return None
        if not self.duration_s:
            return "the recording is empty"
        if not self._asked_frames:
            return f"what is to be transcribed is beyond the recording's end, at {self.duration_s:.2f} s"
        if not self.lives:
            return "the voice detector finds no speech (a lower vad threshold, or no vad_filter, may find some)"
        skipped = sum(live.recording.skipped_windows for live in self.lives)
        if self._options.hallucination:
            return f"there is no speech, or only what hallucination={self._options.hallucination!r} takes for invented"
        if skipped:
            threshold = self._options.fallback.no_speech_threshold
            return f"the model finds no speech (no_speech_threshold={threshold}; None writes whatever it decodes)"
        return "the model decoded no words"


class Samples(NamedTuple):
    """A recording as numpy, before anything is computed with JAX; as in `RecordingAudio`."""

    samples: np.ndarray
    pieces: list[Place] | None
    channels: np.ndarray | None
    calm: Calm | None = None


@dataclass
class RecordingAudio:
    """A recording that was read.

    Attributes:
      mel: its log-mel spectrogram, and its samples.
      pieces: first and last frame of each stretch that becomes a chain of windows of its own; None: the whole is one.
      channels: samples of each channel [channels, N], to tell speakers apart.
      calm: where speech is, if text without speech is to be discarded.
    """

    mel: RecordingMel
    pieces: list[Place] | None = None
    channels: np.ndarray | None = None
    calm: Calm | None = None


def open_recording(
    model: Whisper, source: Any, options: TranscribeOptions, number: int = 0, *, at_once: bool = True
) -> Opened:
    """Reads audio, finds its speech and its language, where these are wanted; `number`: among those of one call.

    at_once: as in `open_audio`. Raises AudioError or OSError for what cannot be read, ValueError for options that the
    model cannot meet.
    """
    return open_audio(model, read_recording(model.config, source, options), options, number, at_once=at_once)


def read_recording(config: WhisperConfig, source: Any, options: TranscribeOptions) -> RecordingAudio:
    """The part of `open_recording` that needs no model; any thread may do it. Raises AudioError or OSError."""
    return prepare_audio(config, read_samples(source, options))


def read_samples(source: Any, options: TranscribeOptions) -> Samples:
    """The part of `read_recording` that needs no JAX: reads audio and finds its speech, where that is wanted."""
    samples, channels = _read(source, options)
    is_translated = options.decoding.task == "translate"
    calm = Calm(speech_spans(samples, VAD), is_translated) if options.hallucination else None
    return Samples(samples, _pieces(samples, len(samples) // HOP_LENGTH, options), channels, calm)


def prepare_audio(config: WhisperConfig, read: Samples) -> RecordingAudio:
    """The part of `read_recording` that follows `read_samples`."""
    together = 1 if ops.current().window_by_window else LARGEST_GROUP
    mel = RecordingMel(read.samples, config.num_mel_bins, 2 * config.max_source_positions, together)
    return RecordingAudio(mel, read.pieces, read.channels, read.calm)


def open_audio(
    model: Whisper,
    audio: RecordingAudio,
    options: TranscribeOptions,
    number: int = 0,
    encode: Callable[[Whisper, jax.Array], EncodedWindows] = encode_windows,
    *,
    at_once: bool = True,
) -> Opened:
    """The part of `open_recording` that needs the model.

    encode: as `encode_windows`. at_once: detect the language here, not in the first window that is decoded.
    """
    mel, pieces, config = audio.mel, audio.pieces, model.config
    frames = 2 * config.max_source_positions
    options = with_lm(tokenizer_of(model), _fit_model(model, options))
    warn_of_precision(model, options.decoding.fp16)
    decoding, language = options.window_options, options.decoding.language
    check_window(tokenizer_of(model), config, decoding)
    known = replace(decoding, language=language or "en")  # any language has as many ids
    initial = initial_ids(known, tokenizer_of(model), config.max_target_positions)
    least = least_tokens(tokenizer_of(model), config.vocab_size, decoding)
    room = prompt_room(initial.ids, config.max_target_positions, least)
    longform = options.longform
    if longform.condition_on_previous_text is None:
        longform = replace(longform, condition_on_previous_text=config.condition_on_prev_tokens)
    refined, chosen = longform.refine_word_times, longform.alignment_heads
    heads = alignment_heads(config, None if refined else chosen) if longform.timed else ()
    window: dict[str, Any] = {"window_frames": frames, "positions": config.max_source_positions, "calm": audio.calm}
    window |= {"context": config.max_target_positions, "prompt_room": room}
    lives = [
        Live(
            Recording(tokenizer_of(model), language, mel.content_frames, longform, **window, piece=piece),
            mel,
            decoding,
            fallback=options.fallback,
            seed=options.seed,
            number=number,
            heads=heads,
            word_heads=word_heads(config, chosen) if refined else None,
            allowed_languages=tuple(options.allowed_languages or ()),
        )
        for piece in (pieces if pieces is not None else [None])
    ]
    about: dict[str, Any] = {"number": number, "language": language, "channels": audio.channels}
    opened = Opened(lives, options, **about, duration_s=mel.content_frames / FRAMES_PER_SECOND)
    if language is None:
        places = _detection_places(mel.content_frames, frames, pieces if options.vad_filter else None, audio.calm)
        first = lives[0].recording.next_window() if lives else None
        if at_once or options.language_detection_segments > 1 or first is None or first.place != places[0]:
            probs, encoded = _detect_language(model, mel, places, options, encode)
            opened.detect(probs)
            if lives:
                lives[0].encoded = encoded
        else:
            lives[0].on_language = opened.detect
    return opened


def _read(source: Any, options: TranscribeOptions) -> tuple[np.ndarray, np.ndarray | None]:
    """Samples [N] and, to distinguish speakers, those of each channel."""
    reading: dict[str, Any] = {
        "stream": options.audio_track,
        "follow_timestamps": options.follow_timestamps,
        "max_hours": options.max_hours,
    }
    if options.diarize:
        from whisper_nnx.audio.channels import load_stereo

        return load_stereo(source, options.sampling_rate, **reading)
    return load_audio(source, options.sampling_rate, **reading), None


def _fit_model(model: Whisper, options: TranscribeOptions) -> TranscribeOptions:
    """What an English-only model makes of the options; ValueError for languages that the model does not know."""
    tokenizer = tokenizer_of(model)
    if tokenizer.is_multilingual:
        known = dict(tokenizer.special.languages)
        if unknown := [code for code in options.allowed_languages or () if code not in known]:
            raise ValueError(f"allowed_languages: this model does not know {unknown[0]!r}; drop it")
        return options
    if options.longform.multilingual or options.allowed_languages or options.language_detection_segments > 1:
        raise ValueError("this model is English-only and cannot detect languages; use a multilingual checkpoint")
    asked = options.decoding.language
    if asked not in (None, "en"):
        warnings.warn(f"this model is English-only, but language={asked!r} was asked for; using English", stacklevel=5)
    return replace(options, decoding=replace(options.decoding, language="en"))


def _pieces(samples: np.ndarray, content_frames: int, options: TranscribeOptions) -> list[Place] | None:
    """First and last frame of each stretch that becomes a recording of its own; None: the whole is one."""
    if options.longform.independent_clips:
        return [clip for clip in options.longform.clips(content_frames) if clip[0] < clip[1]]
    if not options.vad_filter:
        return None
    spans = speech_spans(samples, VadOptions.of(options.vad_parameters))
    pieces: list[Place] = []
    for start, end in options.longform.clips(content_frames):
        start_s, end_s = start / FRAMES_PER_SECOND, end / FRAMES_PER_SECOND
        inside = [(max(a, start_s), min(b, end_s)) for a, b in spans if a < end_s and b > start_s]
        for a, b in pack_spans(inside):
            piece = round(a * FRAMES_PER_SECOND), min(round(b * FRAMES_PER_SECOND), content_frames)
            if piece[0] < piece[1]:
                pieces.append(piece)
    return pieces


def _detection_places(
    content_frames: int, frames: int, pieces: list[Place] | None, calm: Calm | None = None
) -> list[Place]:
    """The windows in which a language may be detected, from the start of the recording or in pieces of it.

    A recording shorter than a window ends in zeros, as in the windows that are decoded, so that one is encoded once.
    calm: names those in which somebody speaks.
    """
    stretches = pieces or [(0, content_frames or frames)]
    places = [(at, min(frames, end - at)) for start, end in stretches for at in range(start, end, frames)]
    spoken = [
        (at, n) for at, n in places if calm and calm.has_speech(at / FRAMES_PER_SECOND, (at + n) / FRAMES_PER_SECOND)
    ]
    return spoken or places


def _detect_language(
    model: Whisper,
    mel: RecordingMel,
    places: list[Place],
    options: TranscribeOptions,
    encode: Callable[[Whisper, jax.Array], EncodedWindows],
) -> tuple[dict[str, float], dict[Place, EncodedWindows]]:
    """Each language's probability, and the first window encoded for it.

    Of several windows the first that is surer than the threshold decides; else all of them, by the sum of their
    probabilities.
    """
    most, surely = options.language_detection_segments, options.language_detection_threshold
    totals: dict[str, float] = {}
    first: dict[Place, EncodedWindows] = {}
    allowed = tuple(options.allowed_languages or ())
    for place in places[:most]:
        encoded = encode(model, mel.window(*place)[None])
        first = first or {place: encoded}
        [probs] = detect_languages(model, encoded)
        best = choose_language(probs, allowed)
        if most > 1 and probs[best] >= (0.5 if surely is None else surely):
            return probs, first
        totals = {code: totals.get(code, 0.0) + p for code, p in probs.items()}
    return {code: p / len(places[:most]) for code, p in totals.items()}, first
