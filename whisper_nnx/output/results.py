"""Transcription results: plain dictionaries with openai-whisper's keys, plus optional ones."""

from __future__ import annotations

from typing import NotRequired, TypedDict


class Word(TypedDict):
    """A word with its leading space, its start and end in s, and its probability."""

    word: str
    start: float
    end: float
    probability: float


class TokenDetails(TypedDict):
    """A token, its log-probability after the logit rules, start and end in s (a timestamp's are its value)."""

    id: int
    text: str
    logprob: float
    start: float
    end: float


class Segment(TypedDict):
    """Timed text. seek: first 10 ms frame of its window; start, end: s from the start of the recording.

    avg_logprob, compression_ratio, no_speech_prob and temperature are those of the whole window. Optional keys: words
    with word_timestamps; token_details, one per token, with token_timestamps; language with multilingual; speaker, "0"
    (left channel), "1" (right) or "?", with diarize; speaker_turn, if the speaker changes after it, with tinydiarize.
    """

    id: int
    seek: int
    start: float
    end: float
    text: str
    tokens: list[int]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float
    words: NotRequired[list[Word]]
    token_details: NotRequired[list[TokenDetails]]
    language: NotRequired[str]
    speaker: NotRequired[str]
    speaker_turn: NotRequired[bool]


class Candidate(TypedDict):
    """One candidate text of a window."""

    text: str
    tokens: list[int]
    avg_logprob: float


class WindowAlternatives(TypedDict):
    """The n best candidates of the window that starts at frame `seek`, the chosen one first."""

    seek: int
    candidates: list[Candidate]


class Transcript(TypedDict):
    """The whole text, its segments and the language code.

    Optional keys: duration of the recording, in s; language_probability, if the language was detected; retries, how
    often windows were decoded again, by the threshold that they failed; alternatives with n_best.
    """

    text: str
    segments: list[Segment]
    language: str
    duration: NotRequired[float]
    language_probability: NotRequired[float]
    retries: NotRequired[dict[str, int]]
    alternatives: NotRequired[list[WindowAlternatives]]
