"""The command `python -m whisper_nnx.evaluate`: manifests in, a table and reports out."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whisper_nnx.cli.options import KINDS, OPTIONS, TRANSCRIBE_FLAGS, add_option, as_flags
from whisper_nnx.cli.parser import Help, Parser, parse_spelled
from whisper_nnx.cli.transcribe import check, check_options, load_named_model, transcribe_options
from whisper_nnx.evaluation.normalizers import NORMALIZERS, require_normalizers
from whisper_nnx.evaluation.page import to_html
from whisper_nnx.evaluation.results import Evaluation
from whisper_nnx.evaluation.run import error_lines, evaluate
from whisper_nnx.evaluation.tables import to_table
from whisper_nnx.output.writers import make_output_folder, write_whole
from whisper_nnx.runtime.console import interrupts_wait, one_line, run_command, say
from whisper_nnx.runtime.startup import start
from whisper_nnx.text.languages import language_or_none

if TYPE_CHECKING:
    from whisper_nnx.data.manifest import Row


AUTO = "auto"


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m whisper_nnx.evaluate",
        usage="%(prog)s --model MODEL --manifest MANIFEST [MANIFEST ...] [options]",
        description="Transcribe the recordings of manifests and count the errors.",
        epilog="Rows keep their own language and task. Exit status 1: some, which are named, could not be evaluated.",
        formatter_class=Help,
        add_help=False,
    )
    group = parser.add_argument_group("evaluation")
    text = "JSON lines, .csv or .tsv: audio, text, language ...; or the folder of a dataset (Hugging Face)"
    group.add_argument("--manifest", nargs="+", required=True, metavar="MANIFEST", help=text)
    text = "of both texts; auto: english for English, basic for the others; none leaves them as they are"
    group.add_argument("--normalizer", choices=NORMALIZERS, default="auto", help=text)
    text = "detect the language instead of using the row's, and count how often it is right"
    group.add_argument("--detect_language", **KINDS["flag"], default=False, help=text)
    language = {**KINDS["language"], "type": _language_or_auto(KINDS["language"]["type"])}
    text = "of rows that name none: de, German; auto detects it"
    group.add_argument("--default_language", **language, default=None, help=text)
    group.add_argument("--task", **KINDS["task"], default=None, help="of all rows, instead of their own")
    text = "where to write report.json and report.html; created if missing (default: they are not written)"
    group.add_argument("--output_dir", "-o", **KINDS["folder"], default=None, help=text)
    group.add_argument("--worst", **KINDS["count"], default=20, help="files to list, the worst first")
    text = "print the text as it is decoded, or (False) show a progress bar; None: neither"
    group.add_argument("--verbose", **KINDS["flag or none"], default=False, help=text)
    own = {action.dest for action in parser._actions}
    unused: dict[str, Any] = {"audio": []}
    for title, flags in OPTIONS.items():
        here = [flag for flag in flags if flag.option.evaluate and flag.dest not in own]
        unused |= {flag.dest: flag.default for flag in flags if not flag.option.evaluate and flag.dest not in own}
        group = parser.add_argument_group(title) if here else group
        for flag in here:
            if flag.dest == "language":
                text = "of all rows, instead of their own: de, German; auto: --detect_language True"
                flag = flag._replace(kind=language, help=text)
            add_option(group, flag)
    parser.set_defaults(**unused)
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
    return run_command(argv, build_parser(), parse_spelled, _run, as_flags)


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    check(parser, args)
    if args.language == AUTO:
        args.language, args.detect_language = None, True
    if args.detect_language and args.language is not None:
        parser.error(f"--detect_language True and --language {args.language} exclude each other; drop one of the two")
    for flag in TRANSCRIBE_FLAGS:
        if flag.option.detection and getattr(args, flag.dest) != flag.default and not args.detect_language:
            parser.error(f"{flag.name} is about detecting the language; it requires --detect_language True")
    require_normalizers()


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    _check(parser, args)
    if args.output_dir is not None:
        make_output_folder(args.output_dir)
    options = {name: value for name, value in transcribe_options(args).items() if name != "task"}
    check_options(parser, args, options)
    rows, problems = _read(args)
    evaluation = _evaluate(args, rows, {**options, "task": args.task}, _about(parser, args, problems))
    for line in error_lines(rows, evaluation):
        say(as_flags(line))
    print(to_table(evaluation, args.worst), end="")
    if args.output_dir is not None:
        report = json.dumps(evaluation.to_dict(), ensure_ascii=False, indent=1, allow_nan=False) + "\n"
        contents = {"report.json": report, "report.html": to_html(evaluation, args.worst)}
        with interrupts_wait():
            for name, content in contents.items():  # JSON may name half a character, which no file can hold
                write_whole(Path(args.output_dir) / name, content.encode("utf-8", "replace").decode())
    return 1 if problems or evaluation.failed else 0


def _read(args: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """The rows of all manifests, and what is wrong with the others, summarized on stderr.

    Raises ValueError where no row is left.
    """
    from whisper_nnx.data.manifest import problem_lines, read_manifest

    language = args.language or args.default_language
    needs_language = language != AUTO and not args.detect_language
    rows: list[Row] = []
    problems: list[str] = []
    for path in dict.fromkeys(args.manifest):
        manifest = read_manifest(path, language=language_or_none(language), needs_language=needs_language)
        rows += manifest.rows
        problems += [f"{path}:{problem.line}: {problem.reason}" for problem in manifest.problems]
        for line in problem_lines(path, manifest.problems):
            say(one_line(line))
    if problems:
        of = len(rows) + len(problems)
        say(f"{len(problems)} of {of} rows cannot be used and are left out")
    if not rows:
        raise ValueError(f"{', '.join(args.manifest)}: no row can be used")
    return rows, problems


def _about(parser: argparse.ArgumentParser, args: argparse.Namespace, problems: list[str]) -> dict[str, Any]:
    """What a report says of its making: all options that were set, but no secrets."""
    set_ = {name: value for name, value in vars(args).items() if value != parser.get_default(name) and name != "token"}
    return {"model": args.model, **set_, **({"rows_left_out": problems} if problems else {})}


def _evaluate(args: argparse.Namespace, rows: list[Row], options: dict[str, Any], about: dict[str, Any]) -> Evaluation:
    device = start(args.threads, args.compilation_cache, args.device)
    import jax

    with jax.default_device(device):
        model = load_named_model(args.model, args, device)
        own = {"normalizer": args.normalizer, "detect_language": args.detect_language, "about": about}
        return evaluate(model, rows, **own, **options)
