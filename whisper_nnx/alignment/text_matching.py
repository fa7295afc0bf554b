"""Two texts, word by word: which words of a given text are among the recognized ones, and which were never spoken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from whisper_nnx.text.words import normalized, split_tail

SIMILAR = 0.6  # from here on two words are taken for spellings of one; 1 is equal
_GAP = 10  # cost of a word that the other text lacks, and of two words that have nothing in common

# Evidence required to decide that words were not spoken, as log-likelihoods: for each word that was not recognized, for
# each that was, and for any gap. Set on the digits checkpoint, which mistakes one word in ten, so that almost none of
# its mistakes counts as a word left out.
SKIPPED_WORD, SKIPPED_RECOGNIZED_WORD, GAP = 3.0, 16.0, 8.0


def spelled_as(word: str, recognized: str) -> str:
    """A word spelled as the one recognized in its place: its punctuation, and the case of its first letter.

    A model's attention follows the audio better where the text is as the model would write it.
    """
    if normalized(word) == normalized(recognized):
        return recognized
    letters, (core, tail) = split_tail(word)[0].strip(), split_tail(recognized)
    space = core[: len(core) - len(core.lstrip())]
    first = core.strip()[:1]
    return space + (letters[:1].upper() if first.isupper() else letters[:1].lower()) + letters[1:] + tail


class Match(NamedTuple):
    """For each word of a text: the index of the one recognized in its place, or -1; whether these are the same word."""

    at: np.ndarray
    same: np.ndarray


def match(text: Sequence[str], recognized: Sequence[str]) -> Match:
    """The cheapest way to edit a text into the recognized one: words [N] and [M] -> their correspondence.

    A table of N rows, each made at once; N M bytes are held.
    """
    kinds_a, a = np.unique([normalized(word) for word in text], return_inverse=True)
    kinds_b, b = np.unique([normalized(word) for word in recognized], return_inverse=True)
    alike = similarity(kinds_a.tolist(), kinds_b.tolist())
    costs = np.rint(_GAP * (1 - alike)).astype(np.int32)

    n, m = len(text), len(recognized)
    along = _GAP * np.arange(m + 1, dtype=np.int32)
    # step 0: the two correspond; 1: text lacks it; 2: not recognized
    above, steps = along, np.zeros((n, m + 1), np.int8)
    for i in range(n):
        both = np.concatenate([[2**30], above[:-1] + costs[a[i], b]])
        unmatched = above + _GAP
        best = np.minimum(both, unmatched)
        row = np.minimum.accumulate(best - along) + along
        steps[i] = np.where(row == both, 0, np.where(row == unmatched, 2, 1))
        above = row
    at, i, j = np.full(n, -1), n, m
    while i:
        step = steps[i - 1, j]
        i, j = i - (step != 1), j - (step != 2)
        if step == 0:
            at[i] = j
    same = np.array([k >= 0 and alike[a[i], b[k]] >= SIMILAR for i, k in enumerate(at)], bool)
    return Match(at, same)


def similarity(a: Sequence[str], b: Sequence[str]) -> np.ndarray:
    """Of words [N] and [M] -> [N,M]: Dice's coefficient of their pairs of letters, ends included; 1 is equal."""
    pairs = [[f"{x}{y}" for x, y in zip(f" {word}", f"{word} ", strict=True)] for word in (*a, *b)]
    column = {pair: i for i, pair in enumerate(sorted({pair for word in pairs for pair in word}))}
    counts = np.zeros((len(pairs), len(column)), np.float32)
    for row, word in zip(counts, pairs, strict=True):
        for pair in word:
            row[column[pair]] += 1
    counts = np.minimum(counts, 1)
    sizes = counts.sum(axis=1)
    return 2 * (counts[: len(a)] @ counts[len(a) :].T) / np.maximum(sizes[: len(a), None] + sizes[len(a) :], 1)


def spoken_words(
    first: np.ndarray, rest: np.ndarray, end: np.ndarray, recognized: np.ndarray, before: int = 0, after: int = 0
) -> np.ndarray:
    """The likeliest way to read a text in a window, with gaps -> log-probability of each word [N], -inf in the gaps.

    first [N+1,N]: log-probability of word j's first token after the first i words; rest [N]: of its other tokens; end
    [N+1]: that the window ends after the first i. recognized [N]: which words were. The first `before` words and the
    last `after` may be a neighboring window's: to leave these out costs nothing.
    """
    n = len(rest)
    skipped = np.concatenate([[0.0], np.cumsum(np.where(recognized, SKIPPED_RECOGNIZED_WORD, SKIPPED_WORD))])

    def gap(i: np.ndarray | int, j: np.ndarray | int) -> np.ndarray:
        return np.where(np.less(i, j), skipped[j] - skipped[i] + GAP, 0.0)

    best, came_from = np.full(n + 1, -np.inf), np.zeros(n + 1, int)
    best[0] = 0.0  # best[i]: the last spoken word so far is i - 1; 0: none
    for j in range(n):
        ways = best[: j + 1] + first[: j + 1, j] - gap(np.arange(j + 1), j)
        ways[0] = first[0, j] - gap(before, j)
        came_from[j + 1] = ways.argmax()
        best[j + 1] = ways.max() + rest[j]
    begins = np.arange(n + 1)
    begins[0] = before
    i = int((best + end - gap(begins, max(n - after, 0))).argmax())
    read = np.full(n, -np.inf)
    while i:
        read[i - 1] = first[came_from[i], i - 1] + rest[i - 1]
        i = came_from[i]
    return read
