"""What a transcription is: plain dictionaries, with the keys of openai-whisper."""

from __future__ import annotations

from typing import NotRequired, TypedDict


class Word(TypedDict):
    """A word with the space before it, its start and end in s, and its probability."""

    word: str
    start: float
    end: float
    probability: float


class Segment(TypedDict):
    """A stretch of speech. seek: the 10 ms frame where its window began; start, end: s from the recording's begin.

    avg_logprob, compression_ratio, no_speech_prob and temperature are those of the whole window.
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


class Transcript(TypedDict):
    """The whole text, its segments, and the code of the spoken language."""

    text: str
    segments: list[Segment]
    language: str
