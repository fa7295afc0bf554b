"""How far word times are from the true ones, at the words that were recognized."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

from whisper_nnx.evaluation.error_rates import align
from whisper_nnx.evaluation.normalizers import normalize, split
from whisper_nnx.text.tokenizer import UNSPACED


class Spread(TypedDict):
    """Of absolute errors, s."""

    median: float
    mean: float
    p90: float


class TimedWord(NamedTuple):
    """A word from start to end, s. The time of a boundary is None inside of a word that is compared by its letters."""

    text: str
    start: float | None
    end: float | None


@dataclass(frozen=True)
class TimeErrors:
    """Errors of boundaries in s, above 0 where they are late; words: how many had a true time. Add them at will."""

    starts: tuple[float, ...] = ()
    ends: tuple[float, ...] = ()
    words: int = 0

    def __add__(self, other: TimeErrors) -> TimeErrors:
        return TimeErrors(self.starts + other.starts, self.ends + other.ends, self.words + other.words)

    def spread(self, boundary: str) -> Spread | None:
        """Of "starts" or "ends"; None where no word was recognized."""
        import numpy as np

        errors = np.abs(getattr(self, boundary))
        if not len(errors):
            return None
        return {
            "median": float(np.median(errors)),
            "mean": float(errors.mean()),
            "p90": float(np.percentile(errors, 90)),
        }


def time_errors(truth: Iterable[TimedWord], transcribed: Iterable[TimedWord], language: str | None) -> TimeErrors:
    """Both in their order -> the errors at the words that an alignment of the fewest errors finds equal.

    Each word is normalized alone. In languages written without spaces letters are matched, and those boundaries
    compared that both texts have there. Where much is misheard, some words are matched with the same one elsewhere:
    the median stands that, the mean does not.
    """
    true_words = [word for word in truth if normalize(word.text, language)]
    units = [[unit for word in words for unit in _units(word, language)] for words in (true_words, transcribed)]
    starts, ends = [], []
    for i, j in align(*[[unit.text for unit in side] for side in units]):
        true, found = units[0][i], units[1][j]
        if true.start is not None and found.start is not None:
            starts.append(found.start - true.start)
        if true.end is not None and found.end is not None:
            ends.append(found.end - true.end)
    return TimeErrors(tuple(starts), tuple(ends), len(true_words))


def _units(word: TimedWord, language: str | None) -> list[TimedWord]:
    """A word as what is matched: itself, normalized, or its letters, of which the first and last have a time."""
    pieces = split(word.text, language)
    if language not in UNSPACED:
        pieces = ["_".join(pieces)] if pieces else []
    last = len(pieces) - 1
    return [
        TimedWord(piece, word.start if i == 0 else None, word.end if i == last else None)
        for i, piece in enumerate(pieces)
    ]
