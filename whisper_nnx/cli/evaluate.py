"""`evaluate`: how well a model transcribes the rows of manifests. `python -m whisper_nnx.evaluate` is the command.

By default each row is transcribed in the language and task that it names; detect_language=True leaves the language for
the model to find out, and counts how often it does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whisper_nnx import cli
from whisper_nnx.cli_options import COUNT, FLAG, FLAG_OR_NONE, FOLDER, OPTIONS, SUBTITLE_OPTIONS, TASK, as_flags
from whisper_nnx.console import exit_status, interrupts_wait, lasting_output, termination_interrupts
from whisper_nnx.evaluation import (
    NORMALIZERS,
    Evaluation,
    RowResult,
    Scores,
    TimedWord,
    TimeErrors,
    compare,
    require_packages,
    time_errors,
    to_html,
    to_table,
)
from whisper_nnx.languages import language_or_none
from whisper_nnx.writers import make_output_folder, write_whole

if TYPE_CHECKING:
    from whisper_nnx.model import Whisper
    from whisper_nnx.results import Transcript
    from whisper_nnx.training.manifest import Row

# Options of the other command that shape its files, change nothing that is counted, or leave out parts of a recording.
NOT_HERE = {
    *("output_dir", "output_format", "verbose", "print_colors", "task", "diarize", "tinydiarize", "n_best"),
    *("token_timestamps", "clip_timestamps", "offset_s", "duration_s", "independent_clips", *SUBTITLE_OPTIONS),
    *("recursive", "output_name", "skip_existing", "keep_partial", "detect_language"),
}
AUTO = "auto"
DETECTION_OPTIONS = (
    *("allowed_languages", "multilingual", "language_detection_segments", "language_detection_threshold"),
)


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
    """Transcribes the rows and compares what comes with what was said.

    rows: of `training.manifest.read_manifest`. normalizer: see `evaluation.normalize`. detect_language: the model is
    not told the rows' language; so with language="auto". language, task: of all rows, instead of their own. batch_size:
    recordings to decode together. about: is kept for reports. options: of `transcribe`; word times are compared where
    word_timestamps=True and the row has true ones.

    A row that cannot be read has an error and no scores. Raises ValueError for options that cannot be met, ImportError
    where the packages of the extra `evaluate` are missing.
    """
    from whisper_nnx.transcribe import iter_transcripts

    require_packages()
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
    told = [None if detect_language else language or row.language or None for row in rows]
    sources = [
        {"audio": row.audio, "task": task, "language": code} for row, task, code in zip(rows, tasks, told, strict=True)
    ]
    started_s = time.perf_counter()
    with _CompilationClock() as compilation:
        heard = dict(iter_transcripts(model, sources, batch_size=batch_size, verbose=verbose, **options))
    wall_s = time.perf_counter() - started_s
    results = [
        _result(row, task, code is None, heard[number], normalizer)
        for number, (row, task, code) in enumerate(zip(rows, tasks, told, strict=True))
    ]
    return Evaluation(tuple(results), wall_s, compilation.seconds, about or {})


def _result(row: Row, task: str, guessed: bool, heard: Transcript | Exception, normalizer: str) -> RowResult:
    """guessed: nobody told the model the language."""
    result = RowResult(_name(row), row.language or None, task, row.source, row.text)
    try:
        if isinstance(heard, Exception):
            raise heard
        result = replace(result, hypothesis=heard["text"].strip(), heard_language=heard["language"])
        rates, pairs = compare(row.text, heard["text"], result.written_language, normalizer)
        times = _times(row, heard) if task == "transcribe" else TimeErrors()
    except Exception as error:  # one row ends no evaluation; a normalizer, too, may fail on text that no one foresaw
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        return replace(result, error=kind + cli.one_line(error))
    guessed = guessed and bool(row.language) and not row.no_speech
    scores = Scores(
        recordings=1,
        audio_s=row.duration,
        rates=rates,
        times=times,
        silent=int(row.no_speech),
        invented=int(row.no_speech and rates.words.insertions > 0),
        guessed=int(guessed),
        guessed_right=int(guessed and heard["language"] == row.language),
    )
    return replace(result, pairs=pairs, scores=scores)


def _times(row: Row, heard: Transcript) -> TimeErrors:
    words = [word for segment in heard["segments"] for word in segment.get("words", ())]
    if not row.words or (heard["segments"] and not words):
        return TimeErrors()
    true = [TimedWord(word.text, word.start, word.end) for word in row.words]
    found = [TimedWord(word["word"], word["start"], word["end"]) for word in words]
    return time_errors(true, found, row.language or heard["language"])


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


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m whisper_nnx.evaluate",
        usage="%(prog)s --model MODEL --manifest MANIFEST [MANIFEST ...] [options]",
        description="Transcribe the recordings of manifests and count the errors.",
        epilog="Rows keep their own language and task. Exit status 1: some, which are named, could not be evaluated.",
        formatter_class=cli.Help,
        add_help=False,
    )
    group = parser.add_argument_group("evaluation")
    text = "JSON lines, .csv or .tsv: audio, text, language ...; or the folder of a dataset (Hugging Face)"
    group.add_argument("--manifest", nargs="+", required=True, metavar="MANIFEST", help=text)
    text = "of both texts; auto: english for English, basic for the others; none leaves them as they are"
    group.add_argument("--normalizer", choices=NORMALIZERS, default="auto", help=text)
    text = "let the model find the language out, and count how often it does, instead of telling it the row's"
    group.add_argument("--detect_language", **FLAG, default=False, help=text)
    language = next(kind for name, kind, *_ in OPTIONS["task"] if name == "--language")
    language = {**language, "type": _language_or_auto(language["type"])}
    text = "of rows that name none: de, German; auto: let the model find it out"
    group.add_argument("--default_language", **language, default=None, help=text)
    group.add_argument("--task", **TASK, default=None, help="of all rows, instead of their own")
    text = "where to write report.json and report.html; made if missing (default: they are not written)"
    group.add_argument("--output_dir", "-o", **FOLDER, default=None, help=text)
    group.add_argument("--worst", **COUNT, default=20, help="files to list, the worst first")
    text = "print the text as it comes, or (False) show a progress bar; None: neither"
    group.add_argument("--verbose", **FLAG_OR_NONE, default=False, help=text)
    unused = {}
    for title, options in OPTIONS.items():
        here = [option for option in options if option[0].removeprefix("--") not in NOT_HERE]
        group = parser.add_argument_group(title) if here else group
        for name, kind, default, text in options:
            if name.removeprefix("--") not in NOT_HERE:
                if name == "--language":
                    kind, text = language, "of all rows, instead of their own: de, German; auto: --detect_language True"
                group.add_argument(name, **kind, default=default, help=text)
            else:
                unused[name.removeprefix("--")] = default
    own = {action.dest for action in parser._actions}
    parser.set_defaults(audio=[], **{name: default for name, default in unused.items() if name not in own})
    group = parser.add_argument_group("help")
    group.add_argument("--traceback", action="store_true", help="show where in the program an error happened")
    group.add_argument("--help", "-h", action="help", help="show this and leave")
    return parser


def _language_or_auto(parse: Callable[[str], str | None]) -> Callable[[str], str | None]:
    """`parse`, for which "auto" is None: what is not given keeps the rows' own language, "auto" does not."""

    def parse_language(text: str) -> str | None:
        return parse(text) if language_or_none(text) else AUTO

    return parse_language


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command -> its exit status: 0; 1 if a row could not be evaluated. Wrong usage raises SystemExit(2)."""
    with lasting_output() as output:
        parser = build_parser()
        args = parser.parse_args(cli.spelled_out(sys.argv[1:] if argv is None else argv, parser))
        try:
            with cli.plain_warnings(as_flags), termination_interrupts():
                _check(parser, args)
                status = _run(parser, args)
        except KeyboardInterrupt as interrupt:
            cli.say("interrupted")
            status = exit_status(interrupt)
    return output.of(status)


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    cli.check(parser, args)
    if args.language == AUTO:
        args.language, args.detect_language = None, True
    if args.detect_language and args.language is not None:
        parser.error(f"--detect_language True and --language {args.language} exclude each other; drop one of the two")
    for name in DETECTION_OPTIONS:
        if getattr(args, name) != parser.get_default(name) and not args.detect_language:
            parser.error(f"--{name} is about finding the language out; it requires --detect_language True")
    try:
        require_packages()
    except ImportError as error:
        parser.error(str(error))


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    if args.threads:  # XLA counts them, and chooses what to complain about, when it starts
        os.environ["PJRT_NPROC"] = str(args.threads)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        if args.output_dir is not None:
            make_output_folder(args.output_dir)
        options = cli.transcribe_options(parser, args)
        options["temperature"] = cli.temperature_ladder(args.temperature, args.temperature_increment_on_fallback)
        del options["task"]
        cli.check_options(parser, args, options)
        rows, problems = _read(args)
        evaluation = _evaluate(args, rows, {**options, "task": args.task}, _about(parser, args, problems))
        for line in error_lines(rows, evaluation):
            print(f"{cli.NAME}: {as_flags(line)}", file=sys.stderr)
        print(to_table(evaluation, args.worst), end="")
        if args.output_dir is not None:
            report = json.dumps(evaluation.to_dict(), ensure_ascii=False, indent=1, allow_nan=False) + "\n"
            contents = {"report.json": report, "report.html": to_html(evaluation, args.worst)}
            with interrupts_wait():
                for name, content in contents.items():  # JSON may name half a character, which no file can hold
                    write_whole(Path(args.output_dir) / name, content.encode("utf-8", "replace").decode())
        return 1 if problems or evaluation.failed else 0
    except Exception as error:
        cli.report_error(error, "error", args.traceback, as_flags)
        return 1


def error_lines(rows: Sequence[Row], evaluation: Evaluation) -> list[str]:
    """What kept rows from being evaluated, a line for each kind of error and manifest."""
    from whisper_nnx.training.manifest import Problem, problem_lines

    found: dict[str, list[Problem]] = {}
    for row, result in zip(rows, evaluation.rows, strict=True):
        if result.error is not None:
            found.setdefault(row.manifest, []).append(Problem(row.line, result.error))
    return [line for manifest, problems in found.items() for line in problem_lines(manifest, problems)]


def _read(args: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """The rows of all manifests, and what is wrong with the others, summarized on stderr.

    Raises ValueError where no row is left.
    """
    from whisper_nnx.training.manifest import problem_lines, read_manifest

    language = args.language or args.default_language
    needs_language = language != AUTO and not args.detect_language
    rows: list[Row] = []
    problems: list[str] = []
    for path in dict.fromkeys(args.manifest):
        manifest = read_manifest(path, language=language_or_none(language), needs_language=needs_language)
        rows += manifest.rows
        problems += [f"{path}:{problem.line}: {problem.reason}" for problem in manifest.problems]
        for line in problem_lines(path, manifest.problems):
            print(f"{cli.NAME}: {cli.one_line(line)}", file=sys.stderr)
    if problems:
        of = len(rows) + len(problems)
        print(f"{cli.NAME}: {len(problems)} of {of} rows cannot be used and are left out", file=sys.stderr)
    if not rows:
        raise ValueError(f"{', '.join(args.manifest)}: no row can be used")
    return rows, problems


def _about(parser: argparse.ArgumentParser, args: argparse.Namespace, problems: list[str]) -> dict[str, Any]:
    """What a report says of its making: all options that were set, but no secrets."""
    set_ = {name: value for name, value in vars(args).items() if value != parser.get_default(name) and name != "token"}
    return {"model": args.model, **set_, **({"rows_left_out": problems} if problems else {})}


def _evaluate(args: argparse.Namespace, rows: list[Row], options: dict[str, Any], about: dict[str, Any]) -> Evaluation:
    import jax

    from whisper_nnx.compilation_cache import choose_compilation_cache

    choose_compilation_cache(args.compilation_cache)
    device = cli.find_device(args.device)
    with jax.default_device(device):
        model = cli.model_of(args, device)
        own = {"normalizer": args.normalizer, "detect_language": args.detect_language, "about": about}
        return evaluate(model, rows, **own, **options)


if __name__ == "__main__":
    sys.exit(main())
