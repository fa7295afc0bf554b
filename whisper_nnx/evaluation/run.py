"""`evaluate`: how well a model transcribes the rows of manifests.

By default each row is transcribed in the language and task that it names; detect_language=True leaves the language for
the model to find out, and counts how often it does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whisper_nnx.evaluation.error_rates import compare
from whisper_nnx.evaluation.normalizers import NORMALIZERS, require_normalizers
from whisper_nnx.evaluation.results import Evaluation, RowResult, Scores
from whisper_nnx.evaluation.times import TimedWord, TimeErrors, time_errors
from whisper_nnx.runtime.console import one_line
from whisper_nnx.text.languages import language_or_none

if TYPE_CHECKING:
    from whisper_nnx.data.manifest import Row
    from whisper_nnx.model.whisper import Whisper
    from whisper_nnx.output.results import Transcript


def evaluate(
    model: Whisper,
    rows: Sequence[Row],
    *,
    normalizer: str = "auto",
    detect_language: bool = False,
    language: str | None = None,
    task: str | None = None,
    batch_size: int = 1,
    verbose: bool | None = None,
    about: dict[str, Any] | None = None,
    **options: Any,
) -> Evaluation:
    """Transcribes the rows of manifests and compares the result with their text.

    A row that cannot be read has an error and no scores.

    Args:
      model: a model with a tokenizer.
      rows: of `data.manifest.read_manifest`.
      normalizer: "auto", "english", "basic" or "none", see `normalizers.normalize`.
      detect_language: the model detects the language instead of using the row's; so with language="auto".
      language: of all rows, instead of their own.
      task: of all rows, instead of their own.
      batch_size: recordings to decode together.
      verbose: as in `transcribe`.
      about: stored for reports.
      options: of `transcribe`. Word times are compared where word_timestamps=True and the row has true ones.

    Raises:
      ValueError: options that cannot be met.
      ImportError: the packages of the extra `evaluate` are missing.
    """
    from whisper_nnx.transcription.stream import iter_transcripts

    require_normalizers()
    if language is not None and language_or_none(language) is None:
        detect_language, language = True, None
    if detect_language and language is not None:
        raise ValueError(f"detect_language=True and language={language!r} exclude each other; drop one of the two")
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer={normalizer!r} is unknown; choose {', '.join(NORMALIZERS)}")
    tokenizer = getattr(model, "tokenizer", None)
    if detect_language and tokenizer is not None and not tokenizer.is_multilingual:
        raise ValueError("detect_language=True needs a multilingual checkpoint, but this model is English-only")
    tasks = [task or row.task for row in rows]
    languages = [None if detect_language else language or row.language or None for row in rows]
    sources = [
        {"audio": row.audio, "task": task, "language": code}
        for row, task, code in zip(rows, tasks, languages, strict=True)
    ]
    started_s = time.perf_counter()
    with _CompilationClock() as compilation:
        transcripts = dict(iter_transcripts(model, sources, batch_size=batch_size, verbose=verbose, **options))
    wall_s = time.perf_counter() - started_s
    results = [
        _result(row, task, code is None, transcripts[number], normalizer)
        for number, (row, task, code) in enumerate(zip(rows, tasks, languages, strict=True))
    ]
    return Evaluation(tuple(results), wall_s, compilation.seconds, about or {})


def _result(row: Row, task: str, guessed: bool, transcript: Transcript | Exception, normalizer: str) -> RowResult:
    """guessed: the model detected the language."""
    result = RowResult(_name(row), row.language or None, task, row.source, row.text)
    try:
        if isinstance(transcript, Exception):
            raise transcript
        result = replace(result, hypothesis=transcript["text"].strip(), transcript_language=transcript["language"])
        rates, pairs = compare(row.text, transcript["text"], result.written_language, normalizer)
        times = _times(row, transcript) if task == "transcribe" else TimeErrors()
    except Exception as error:  # one row ends no evaluation; a normalizer, too, may fail on text that no one foresaw
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        return replace(result, error=kind + one_line(error))
    guessed = guessed and bool(row.language) and not row.no_speech
    scores = Scores(
        recordings=1,
        audio_s=row.duration,
        rates=rates,
        times=times,
        silent=int(row.no_speech),
        invented=int(row.no_speech and rates.words.insertions > 0),
        guessed=int(guessed),
        guessed_right=int(guessed and transcript["language"] == row.language),
    )
    return replace(result, pairs=pairs, scores=scores)


def _times(row: Row, transcript: Transcript) -> TimeErrors:
    words = [word for segment in transcript["segments"] for word in segment.get("words", ())]
    if not row.words or (transcript["segments"] and not words):
        return TimeErrors()
    true = [TimedWord(word.text, word.start, word.end) for word in row.words]
    found = [TimedWord(word["word"], word["start"], word["end"]) for word in words]
    return time_errors(true, found, row.language or transcript["language"])


def _name(row: Row) -> str:
    """What reports call it: its path, seen from the manifest's folder, or its place in the manifest."""
    if not isinstance(row.audio, Path):
        return f"{row.manifest}:{row.line}"
    folder = Path(row.manifest) if Path(row.manifest).is_dir() else Path(row.manifest).parent
    return str(row.audio.relative_to(folder) if row.audio.is_relative_to(folder) else row.audio)


class _CompilationClock:
    """Measures how long JAX traces and compiles while it is entered: spans that overlap count once."""

    def __init__(self) -> None:
        self._spans_s: list[tuple[float, float]] = []

    def __enter__(self) -> _CompilationClock:
        import jax

        self._from_s = time.perf_counter()
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: Any) -> None:
        import jax

        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            now_s = time.perf_counter()
            self._spans_s.append((max(self._from_s, now_s - duration_secs), now_s))

    @property
    def seconds(self) -> float:
        total_s = until_s = 0.0
        for start_s, end_s in sorted(self._spans_s):
            total_s += max(0.0, end_s - max(start_s, until_s))
            until_s = max(until_s, end_s)
        return total_s


def error_lines(rows: Sequence[Row], evaluation: Evaluation) -> list[str]:
    """What kept rows from being evaluated, a line for each kind of error and manifest."""
    from whisper_nnx.data.manifest import Problem, problem_lines

    found: dict[str, list[Problem]] = {}
    for row, result in zip(rows, evaluation.rows, strict=True):
        if result.error is not None:
            found.setdefault(row.manifest, []).append(Problem(row.line, result.error))
    return [line for manifest, problems in found.items() for line in problem_lines(manifest, problems)]
