"""What a transcription is: plain dictionaries, with the keys of openai-whisper; others are there when asked for."""

from __future__ import annotations

from typing import NotRequired, TypedDict


class Word(TypedDict):
    """A word with the space before it, its start and end in s, and its probability: how confident the model is."""

    word: str
    start: float
    end: float
    probability: float


class TokenDetails(TypedDict):
    """A token, its log-probability after the filters, start and end in s; a timestamp's are the time it names."""

    id: int
    text: str
    logprob: float
    start: float
    end: float


class Segment(TypedDict):
    """A stretch of speech. seek: the 10 ms frame where its window began; start, end: s from the recording's begin.

    avg_logprob, compression_ratio, no_speech_prob and temperature are those of the whole window.
    words: with word_timestamps; token_details, one for each of tokens: with token_timestamps; language: with
    multilingual; speaker, "0" (left channel), "1" (right) or "?": with diarize; speaker_turn: with tinydiarize, where
    somebody else speaks after it.
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
    """One way to hear a window."""

    text: str
    tokens: list[int]
    avg_logprob: float


class WindowAlternatives(TypedDict):
    """The n best candidates of the window that begins at frame `seek`, the chosen one first."""

    seek: int
    candidates: list[Candidate]


class Transcript(TypedDict):
    """The whole text, its segments, and the code of the spoken language; alternatives: with n_best."""

    text: str
    segments: list[Segment]
    language: str
    alternatives: NotRequired[list[WindowAlternatives]]
