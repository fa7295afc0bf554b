"""From token times to word times: the heuristics that make them fit sentences, segments and pauses.

Source: the reference's timing.py, whose results these equal.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from whisper_nnx.output.results import Segment, TokenDetails, Word

if TYPE_CHECKING:
    from whisper_nnx.text.tokenizer import Tokenizer

PREPENDED = "\"'“¿([{-"
APPENDED = "\"'.。,，!！?？:：”)]}、"
SENTENCE_ENDS = ".。!！?？"
LONGEST_MEDIAN_S = 0.7


@dataclass
class WordTiming:
    """A word, its ids, its start and end in s from the window's beginning, its probability."""

    word: str
    tokens: list[int]
    start: float
    end: float
    probability: float


def words_from_tokens(
    tokenizer: Tokenizer, tokens: Sequence[int], begins_s: Sequence[float], probs: Sequence[float], language: str
) -> list[WordTiming]:
    """tokens [N] of a window, the start of each and the end of the last [N+1], probabilities [N] -> its words."""
    words, groups = tokenizer.split_to_word_tokens([*tokens, tokenizer.special.eot], language)
    ends = list(itertools.accumulate(len(group) for group in groups[:-1]))
    return [
        WordTiming(word, list(group), begins_s[a], begins_s[b], sum(probs[a:b]) / (b - a))
        for word, group, a, b in zip(words, groups, [0, *ends], ends, strict=False)
    ]


def token_details(
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    logprobs: Sequence[float],
    begins_s: Sequence[float],
    offset_s: float,
    step_s: float,
) -> list[TokenDetails]:
    """Text, log-probability and times of each of a segment's tokens [N].

    begins_s: of each of its text tokens, and of what follows them, in s from the window's start, which is at offset_s.
    """
    special, details, at = tokenizer.special, list[TokenDetails](), 0
    for token, logprob in zip(tokens, logprobs, strict=True):
        if special.timestamp_begin <= token <= special.timestamp_end:
            start_s = end_s = (token - special.timestamp_begin) * step_s
        else:
            is_text = len(tokenizer.text_tokens([token]))
            start_s, end_s = begins_s[at], begins_s[at + is_text]
            at += is_text
        start, end = round(offset_s + start_s, 2), round(offset_s + end_s, 2)
        text = tokenizer.decode_with_timestamps([token])
        details.append({"id": token, "text": text, "logprob": logprob, "start": start, "end": end})
    return details


def merge_punctuations(words: list[WordTiming], prepended: str = PREPENDED, appended: str = APPENDED) -> None:
    """Joins punctuation to the next or previous word, in place; the joined entry keeps its place with an empty word."""
    following = len(words) - 1
    for i in reversed(range(len(words) - 1)):
        mark, word = words[i], words[following]
        if mark.word.startswith(" ") and mark.word.strip() in prepended:
            word.word, word.tokens = mark.word + word.word, mark.tokens + word.tokens
            mark.word, mark.tokens = "", []
        else:
            following = i
    previous = 0
    for i in range(1, len(words)):
        word, mark = words[previous], words[i]
        if not word.word.endswith(" ") and mark.word in appended:
            word.word, word.tokens = word.word + mark.word, word.tokens + mark.tokens
            mark.word, mark.tokens = "", []
        else:
            previous = i


def add_words(
    segments: list[Segment],
    words: list[WordTiming],
    tokens_per_segment: Sequence[Sequence[int]],
    *,
    offset_s: float,
    last_speech_s: float,
    prepended: str = PREPENDED,
    appended: str = APPENDED,
    refined: bool = False,
) -> None:
    """Gives each segment of a window its words, and the start and end that follow from them.

    Args:
      segments: changed in place.
      words: of the whole window.
      tokens_per_segment: the text of each segment.
      offset_s: start of the window.
      last_speech_s: where speech ended before it.
      prepended: punctuation that belongs to the following word.
      appended: punctuation that belongs to the preceding word.
      refined: the times of the words exclude pauses already, and are kept.
    """
    durations = [d for word in words if (d := word.end - word.start)]
    typical_s = min(LONGEST_MEDIAN_S, median(durations)) if durations else 0.0
    if durations and not refined:
        _shorten_at_sentence_ends(words, 2 * typical_s)
    merge_punctuations(words, prepended, appended)

    rest = iter(words)
    for segment, tokens in zip(segments, tokens_per_segment, strict=True):
        own: list[Word] = []
        taken = 0
        while taken < len(tokens) and (word := next(rest, None)) is not None:
            taken += len(word.tokens)
            if word.word:
                start, end = round(offset_s + word.start, 2), round(offset_s + word.end, 2)
                own.append({"word": word.word, "start": start, "end": end, "probability": word.probability})
        if own:
            if refined:
                segment["start"], segment["end"] = own[0]["start"], own[-1]["end"]
            else:
                _shorten_after_pause(own, last_speech_s, typical_s)
                _fit_segment(segment, own, typical_s)
            last_speech_s = segment["end"]
        segment["words"] = own


def _shorten_at_sentence_ends(words: list[WordTiming], longest_s: float) -> None:
    """A pause after a sentence belongs to no word."""
    for before, word in itertools.pairwise(words):
        if word.end - word.start > longest_s:
            if word.word in SENTENCE_ENDS:
                word.end = word.start + longest_s
            elif before.word in SENTENCE_ENDS:
                word.start = word.end - longest_s


def _shorten_after_pause(words: list[Word], last_speech_s: float, typical_s: float) -> None:
    """The first words after a pause are not longer than twice the typical one: the pause is not theirs."""
    first, longest_s = words[0], 2 * typical_s
    second = words[1] if len(words) > 1 else None
    too_long = first["end"] - first["start"] > longest_s or (
        second is not None and second["end"] - first["start"] > 2 * longest_s
    )
    if first["end"] - last_speech_s > 4 * typical_s and too_long:
        if second is not None and second["end"] - second["start"] > longest_s:
            boundary = max(second["end"] / 2, second["end"] - longest_s)
            first["end"] = second["start"] = boundary
        first["start"] = max(0, first["end"] - longest_s)


def _fit_segment(segment: Segment, words: list[Word], typical_s: float) -> None:
    """Sets a segment's times to those of its words, unless its own timestamps cut an overlong first or last word."""
    first, last = words[0], words[-1]
    if segment["start"] < first["end"] and segment["start"] - 0.5 > first["start"]:
        first["start"] = max(0, min(first["end"] - typical_s, segment["start"]))
    else:
        segment["start"] = first["start"]
    if segment["end"] > last["start"] and segment["end"] + 0.5 < last["end"]:
        last["end"] = max(last["start"] + typical_s, segment["end"])
    else:
        segment["end"] = last["end"]
