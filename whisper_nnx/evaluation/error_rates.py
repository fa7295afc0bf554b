"""Word and character error rates, by jiwer, of normalized texts; and which word stands for which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

from whisper_nnx.evaluation.normalizers import require_normalizers, split
from whisper_nnx.text.tokenizer import UNSPACED

if TYPE_CHECKING:
    from jiwer import AlignmentChunk, CharacterOutput, WordOutput


@dataclass(frozen=True)
class Counts:
    """What it takes to make the hypothesis of the reference. Add them to get those of several texts."""

    hits: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.hits + other.hits,
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
        )

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def length(self) -> int:
        """Of the reference."""
        return self.hits + self.substitutions + self.deletions

    @property
    def rate(self) -> float | None:
        """Errors per word (or letter) of the reference; None where that has none."""
        return self.errors / self.length if self.length else None

    @classmethod
    def of(cls, result: WordOutput | CharacterOutput) -> Counts:
        return cls(result.hits, result.substitutions, result.deletions, result.insertions)


@dataclass(frozen=True)
class ErrorRates:
    """Of words and of characters. The sum is that of all texts together, long ones weighing more: a corpus's rate."""

    words: Counts = field(default_factory=Counts)
    characters: Counts = field(default_factory=Counts)

    def __add__(self, other: ErrorRates) -> ErrorRates:
        return ErrorRates(self.words + other.words, self.characters + other.characters)

    @property
    def wer(self) -> float | None:
        return self.words.rate

    @property
    def cer(self) -> float | None:
        return self.characters.rate


class Pair(NamedTuple):
    """A word of the reference and the one in its place; kind: equal, substitute, delete or insert (one is "")."""

    kind: str
    reference: str
    hypothesis: str


def compare(
    reference: str, hypothesis: str, language: str | None, normalizer: str = "auto"
) -> tuple[ErrorRates, tuple[Pair, ...]]:
    """Two texts in `language` -> their error rates, and their normalized words side by side.

    In languages written without spaces a word is a letter. Characters include the spaces between words elsewhere.
    Raises ImportError where jiwer or whisper-normalizer is missing, ValueError for an unknown normalizer.
    """
    require_normalizers()
    import jiwer

    spoken, written = split(reference, language, normalizer), split(hypothesis, language, normalizer)
    by_word = jiwer.process_words(" ".join(spoken), " ".join(written))
    between = "" if language in UNSPACED else " "
    by_character = jiwer.process_characters(between.join(spoken), between.join(written))
    pairs = tuple(pair for chunk in by_word.alignments[0] for pair in _pairs(chunk, spoken, written))
    return ErrorRates(Counts.of(by_word), Counts.of(by_character)), pairs


def _pairs(chunk: AlignmentChunk, spoken: list[str], written: list[str]) -> list[Pair]:
    both = spoken[chunk.ref_start_idx : chunk.ref_end_idx], written[chunk.hyp_start_idx : chunk.hyp_end_idx]
    return [Pair(chunk.type, *words) for words in zip_longest(*both, fillvalue="")]


def align(reference: Sequence[str], hypothesis: Sequence[str]) -> list[tuple[int, int]]:
    """Words without spaces -> the indices, in both, of those that an alignment of the fewest errors finds equal."""
    require_normalizers()
    import jiwer

    [chunks] = jiwer.process_words(" ".join(reference), " ".join(hypothesis)).alignments
    return [
        (chunk.ref_start_idx + i, chunk.hyp_start_idx + i)
        for chunk in chunks
        if chunk.type == "equal"
        for i in range(chunk.ref_end_idx - chunk.ref_start_idx)
    ]


def error_rates(
    references: Sequence[str],
    hypotheses: Sequence[str],
    languages: Sequence[str | None] | str | None = None,
    normalizer: str = "auto",
) -> ErrorRates:
    """Of all texts together; languages: a code for each, or one for all, which choose the normalizer (`normalize`).

    An empty reference is a recording without speech: all that is written there is inserted.
    Raises ValueError where the lengths differ.
    """
    if languages is None or isinstance(languages, str):
        languages = [languages] * len(references)
    if not len(references) == len(hypotheses) == len(languages):
        raise ValueError(
            f"{len(references)} references, {len(hypotheses)} hypotheses and {len(languages)} languages do not match; "
            "give one of each for each text"
        )
    rows = zip(references, hypotheses, languages, strict=True)
    return sum((compare(*row, normalizer)[0] for row in rows), ErrorRates())
