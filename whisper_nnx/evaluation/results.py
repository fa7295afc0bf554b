"""What an evaluation found: of each recording, of groups of them, and of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from whisper_nnx.evaluation.error_rates import ErrorRates, Pair
from whisper_nnx.evaluation.times import TimeErrors


@dataclass(frozen=True)
class Scores:
    """Of one recording or, added up, of several.

    audio_s: how long they are. silent: how many have no speech, invented: how many of these were given words all the
    same. guessed: of how many with a known language the model was left to find it out, guessed_right: and did.
    """

    recordings: int = 0
    audio_s: float = 0.0
    rates: ErrorRates = field(default_factory=ErrorRates)
    times: TimeErrors = field(default_factory=TimeErrors)
    silent: int = 0
    invented: int = 0
    guessed: int = 0
    guessed_right: int = 0

    def __add__(self, other: Scores) -> Scores:
        return Scores(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def to_dict(self) -> dict[str, Any]:
        """For JSON; what is not known is None."""
        words, times = self.rates.words, self.times
        return {
            "recordings": self.recordings,
            "audio_s": round(self.audio_s, 3),
            "wer": self.rates.wer,
            "cer": self.rates.cer,
            "words": words.length,
            "hits": words.hits,
            "substitutions": words.substitutions,
            "deletions": words.deletions,
            "insertions": words.insertions,
            "characters": self.rates.characters.length,
            "character_errors": self.rates.characters.errors,
            "timed_words": times.words,
            "start_error_s": times.spread("starts"),
            "end_error_s": times.spread("ends"),
            "no_speech": {"recordings": self.silent, "with_text": self.invented},
            "language": {"guessed": self.guessed, "right": self.guessed_right},
        }


@dataclass(frozen=True)
class RowResult:
    """A recording: reference and hypothesis, as they are and (pairs) normalized, side by side.

    language: the one that the row names, or None. transcript_language: the one that it was transcribed in. error: why
    there is no transcript; there are no scores then.
    """

    name: str
    language: str | None
    task: str
    source: str
    reference: str
    hypothesis: str = ""
    transcript_language: str | None = None
    pairs: tuple[Pair, ...] = ()
    scores: Scores = field(default_factory=Scores)
    error: str | None = None

    @property
    def language_label(self) -> str:
        """What the row is counted under among languages."""
        spoken = self.language or "(none)"
        return f"{spoken} to en" if self.task == "translate" else spoken

    @property
    def written_language(self) -> str | None:
        """That of the texts, which chooses the normalizer and what a word is."""
        return "en" if self.task == "translate" else self.language or self.transcript_language

    def to_dict(self) -> dict[str, Any]:
        who = {"name": self.name, "language": self.language, "task": self.task, "source": self.source or None}
        if self.error is not None:
            return {**who, "error": self.error}
        texts = {"reference": self.reference, "hypothesis": self.hypothesis}
        language = {"transcript_language": self.transcript_language}
        return {**who, **language, **texts, **self.scores.to_dict(), "aligned": [list(pair) for pair in self.pairs]}


@dataclass(frozen=True)
class Evaluation:
    """Rows in the order of the manifest. wall_s: what transcribing took, of which compile_s XLA's compilation."""

    rows: tuple[RowResult, ...]
    wall_s: float
    compile_s: float = 0.0
    about: dict[str, Any] = field(default_factory=dict)  # model, manifests, options: whatever the report should tell

    @property
    def done(self) -> list[RowResult]:
        return [row for row in self.rows if row.error is None]

    @property
    def failed(self) -> list[RowResult]:
        return [row for row in self.rows if row.error is not None]

    @property
    def total(self) -> Scores:
        return sum((row.scores for row in self.done), Scores())

    @property
    def wer(self) -> float | None:
        return self.total.rates.wer

    @property
    def cer(self) -> float | None:
        return self.total.rates.cer

    @property
    def speed(self) -> float:
        """Seconds of audio in a second, compilation apart: how many times faster than real time."""
        return self.total.audio_s / max(self.wall_s - self.compile_s, 1e-9)

    def by_language(self) -> dict[str, Scores]:
        return self._by(lambda row: row.language_label)

    def by_source(self) -> dict[str, Scores]:
        """Rows without a source are counted under ""."""
        return self._by(lambda row: row.source)

    def _by(self, label: Callable[[RowResult], str]) -> dict[str, Scores]:
        groups: dict[str, Scores] = {}
        for row in self.done:
            groups[label(row)] = groups.get(label(row), Scores()) + row.scores
        return dict(sorted(groups.items()))

    def ranked(self) -> list[RowResult]:
        """Worst first: invented text in recordings without speech, then by error rate, then by number of errors."""

        def badness(row: RowResult) -> tuple[bool, float, int]:
            words = row.scores.rates.words
            return words.rate is None and words.errors > 0, words.rate or 0.0, words.errors

        return sorted(self.done, key=badness, reverse=True)

    def worst(self, n: int | None = None) -> list[RowResult]:
        """The first n of `ranked` that have errors at all."""
        return [row for row in self.ranked() if row.scores.rates.words.errors][:n]

    def summary(self) -> dict[str, Any]:
        """The figures of all rows together."""
        speed = {"wall_s": self.wall_s, "compile_s": self.compile_s, "audio_per_wall_second": self.speed}
        return {**self.total.to_dict(), "failed": len(self.failed), **speed}

    def to_dict(self) -> dict[str, Any]:
        """All, for JSON: numbers, texts, None."""
        return {
            "about": self.about,
            "summary": self.summary(),
            "by_language": {label: scores.to_dict() for label, scores in self.by_language().items()},
            "by_source": {label: scores.to_dict() for label, scores in self.by_source().items()},
            "rows": [row.to_dict() for row in self.rows],
        }
