"""Times of known words in a window: from the text in short pieces, heads that follow these, and the audio's level.

The decoder writes most words as one token, whose attention covers the word and leads or lags it by much. Forced to read
the word in pieces of a few letters, it follows the audio more closely. Pauses between words are found by the audio's
level, since no token's attention shows where one starts or ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from whisper_nnx.audio.features import POSITIONS_PER_SECOND
from whisper_nnx.audio.loading import FRAMES_PER_SECOND, SAMPLE_RATE
from whisper_nnx.model.config import WhisperConfig, released_alignment_heads, released_short_piece_heads
from whisper_nnx.model.heads import Heads as Pairs
from whisper_nnx.runtime.devices import fetch
from whisper_nnx.text.tokenizer import Tokenizer
from whisper_nnx.text.words import normalized, split_tail
from whisper_nnx.timing.alignment_heads import alignment_heads
from whisper_nnx.timing.token_times import AlignedText, padded_ids, row_begins
from whisper_nnx.timing.words import WordTiming

LONGEST_PIECES = (3, 6, 12)  # letters of a piece; the first by which a window's text fits the context

# A pause is as similar to quiet as PAUSE + LEVEL, to speech as PAUSE - LEVEL; tokens have mean 0 and standard deviation
# 1. Quiet is QUIET_DB below the loudest, or a fifth of the way up from the noise to it. Tuned on the
# hand-labelled clips of docs/numbers/word-times.md (PAUSE and LEVEL on every other one).
PAUSE, LEVEL = 1.0, 2.0
QUIET_DB, ABOVE_NOISE, SLOPE_DB = 30.0, 0.2, 10.0
DISTANCE_COST = 0.5  # for each position between a row and where it is expected
_FAR = 1e6  # beyond any window


class Heads(NamedTuple):
    """(layer, head) pairs, and whether they follow short pieces, or else the tokens that the model writes."""

    pairs: Pairs
    short_pieces: bool


def word_heads(config: WhisperConfig, chosen: Pairs | Sequence[Sequence[int]] | int | None = None) -> Heads:
    """The heads by which words of a known text are timed.

    chosen: see `alignment_heads`; they are to follow short pieces, as those of `find_alignment_heads(...,
    short_pieces=True)`. None: those measured for the released size, or else the usual ones, which follow tokens.
    Raises ValueError for heads that do not exist.
    """
    if chosen is not None:
        return Heads(alignment_heads(config, chosen), True)
    own = config.alignment_heads
    measured = released_short_piece_heads(config)
    if measured and (own is None or set(own) == set(released_alignment_heads(config) or ())):
        return Heads(measured, True)
    return Heads(alignment_heads(config), False)


@lru_cache(maxsize=1 << 15)
def short_pieces(tokenizer: Tokenizer, text: str, longest: int) -> tuple[int, ...]:
    """Ids of a text, each of the longest token that has at most so many letters; a space before them does not count."""
    ids: list[int] = []
    at = 0
    while at < len(text):
        for n in range(min(longest + text[at].isspace(), len(text) - at), 0, -1):
            piece = tokenizer.encode(text[at : at + n])
            if len(piece) == 1 or n == 1:
                break
        ids += piece
        at += n
    return tuple(ids)


class SpelledWord(NamedTuple):
    """A word, with the punctuation after it, and the ids that the model writes it with."""

    text: str
    ids: Sequence[int]


def _ids_of(
    tokenizer: Tokenizer, words: Sequence[SpelledWord], short: bool, room: int
) -> list[tuple[Sequence[int], Sequence[int]]]:
    """For each word its ids and those of the punctuation after it; of the shortest pieces that `room` ids hold."""
    parts = [split_tail(word.text) for word in words]
    ids: list[tuple[Sequence[int], Sequence[int]]]
    for longest in LONGEST_PIECES if short else ():
        ids = [(short_pieces(tokenizer, core, longest), tokenizer.encode(tail)) for core, tail in parts]
        if sum(len(core) + len(tail) for core, tail in ids) <= room:
            return ids
    ids = [(tokenizer.encode(core), tokenizer.encode(tail)) for core, tail in parts]
    if sum(len(core) + len(tail) for core, tail in ids) <= room:
        return ids
    return [(word.ids, ()) for word in words]  # as they were decoded, they fit


class Layout(NamedTuple):
    """A window's words as ids, and which of these are placed along its audio: see `row_begins`.

    words: for each, its first row and the end of its rows, which exclude the punctuation after it.
    """

    ids: list[int]
    rows: np.ndarray
    within: np.ndarray
    words: list[tuple[int, int]]

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        start: Sequence[int],
        spelled: Sequence[SpelledWord],
        context: int,
        *,
        short: bool,
        spans: np.ndarray | None = None,
    ) -> Layout:
        """Words [n] after the ids `start`, with pauses between; context: positions of the decoder.

        spans [n,2]: where each is expected, in s from the window's beginning; NaN: not known.
        """
        spans = np.full((len(spelled), 2), np.nan) if spans is None else spans
        lows = np.fmax.accumulate(np.concatenate([[0.0], spans[:, 0]]))[1:]
        highs = np.fmin.accumulate(np.concatenate([spans[:, 1], [np.inf]])[::-1])[::-1][:-1]
        anywhere = (0.0, np.inf)
        ids, rows, within, words = list(start), [-1], [anywhere], []
        parts = _ids_of(tokenizer, spelled, short, context - len(ids) - 1)
        for (core, tail), low, high in zip(parts, lows, highs, strict=True):
            begin = len(rows)
            words.append((begin, begin + len(core)))
            rows += [*range(len(ids) - 1, len(ids) - 1 + len(core) + len(tail)), -1]
            within += [*[(low, high)] * len(core), *[(low, np.inf)] * len(tail), anywhere]
            ids += [*core, *tail]
        rows.append(len(ids) - 1)
        within.append(anywhere)
        limits = np.minimum(np.array(within) * POSITIONS_PER_SECOND, _FAR)
        return cls([*ids, tokenizer.special.eot], np.array(rows, np.int32), limits.astype(np.float32), words)


def pause_scores(samples: np.ndarray, first_sample: int, n: int) -> np.ndarray:
    """Samples [N] -> [n]: how well a pause fits each position of 20 ms from `first_sample` on."""
    size = SAMPLE_RATE // POSITIONS_PER_SECOND
    begin = first_sample - size // 2  # a position is the middle of its samples
    audio = np.asarray(samples[max(0, begin) : max(0, begin + n * size)], np.float64)
    audio = np.pad(audio, (max(0, -begin), n * size))[: n * size]
    level = 10 * np.log10(np.square(audio).reshape(n, size).mean(axis=1) + 1e-10)
    noise, loud = np.percentile(level, (5, 95))
    span = max(loud - noise, 1e-3)
    quiet = max(loud - QUIET_DB, noise + ABOVE_NOISE * span)
    return (PAUSE + LEVEL * np.clip((quiet - level) / min(SLOPE_DB, span / 4), -1, 1)).astype(np.float32)


def word_times(
    decoder: Any,
    cross: Any,
    config: WhisperConfig,
    *,
    eot: int,
    layouts: Sequence[Layout],
    pauses: Sequence[np.ndarray],
    heads: Heads,
) -> list[np.ndarray]:
    """Start and end of each window's words [n,2], in s from its beginning; pauses [T']: `pause_scores` of its audio."""
    ids, length = padded_ids([layout.ids for layout in layouts], config, eot)
    rows, within = (
        np.stack([_padded(getattr(layout, name), 2 * ids.shape[1]) for layout in layouts])
        for name in ("rows", "within")
    )
    text = AlignedText(
        ids,
        length,
        rows,
        n_rows=np.array([len(layout.rows) for layout in layouts], np.int32),
        positions=np.array([len(own) for own in pauses], np.int32),
    )
    level = np.stack([_padded(own, config.max_source_positions) for own in pauses])
    speech = 1 - np.clip((level - PAUSE) / LEVEL, 0, 1)  # otherwise some token always seems to attend to silence
    bounds = {"within": within, "distance_cost": DISTANCE_COST}
    begins = fetch(row_begins(decoder, cross, text, pauses=level, speech=speech, **bounds, heads=heads.pairs))
    return [
        own[np.array(layout.words, int).reshape(-1, 2)] / POSITIONS_PER_SECOND
        for own, layout in zip(begins, layouts, strict=True)
    ]


def _padded(x: np.ndarray, size: int) -> np.ndarray:
    return np.pad(x, [(0, size - len(x)), *[(0, 0)] * (x.ndim - 1)])


def spelled_words(words: Sequence[WordTiming]) -> tuple[list[SpelledWord], list[int]]:
    """A window's words -> those to be timed, with the punctuation beside them; which of these each word is in."""
    within = np.maximum(np.cumsum([bool(normalized(word.word)) for word in words]) - 1, 0).tolist()
    together = [[words[i] for i in own] for _, own in groupby(range(len(words)), within.__getitem__)]
    spelled = [
        SpelledWord("".join(word.word for word in own), [token for word in own for token in word.tokens])
        for own in together
    ]
    return spelled, within


def retime(words: Sequence[WordTiming], times: np.ndarray) -> None:
    """Gives words the times [n,2] of what `spelled_words` made of them; punctuation by itself takes no time."""
    started = -1
    for word, i in zip(words, spelled_words(words)[1], strict=True):
        start, end = times[i].tolist()
        if normalized(word.word):
            started = i
        else:
            start = end = end if i == started else start
        word.start, word.end = start, end


def first_sample(frame: int) -> int:
    """The sample at which a frame of 10 ms starts."""
    return frame * (SAMPLE_RATE // FRAMES_PER_SECOND)
