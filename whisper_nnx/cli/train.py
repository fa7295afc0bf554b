"""`python -m whisper_nnx.train --config configs/finetune_small.toml --steps 500`: a training run as a command.

The run is described by whisper_nnx/training/config.py. If started again, it resumes where it stopped.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from whisper_nnx.cli.options import KINDS, RECORDING
from whisper_nnx.runtime.console import NAME, one_line, run_command, say
from whisper_nnx.runtime.options import options_of
from whisper_nnx.runtime.packages import require_packages
from whisper_nnx.runtime.startup import start
from whisper_nnx.training.config import TrainConfig, describe
from whisper_nnx.training.config_file import load_config

if TYPE_CHECKING:
    from whisper_nnx.model.whisper import Whisper
    from whisper_nnx.training.run import Evaluate

EXIT_STATUS = {"SIGINT": 130, "SIGTERM": 143}  # 128 + the signal's number, as shells have it
_NAME_WIDTH = 30  # of the first column of the help


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{NAME}: error: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m whisper_nnx.train",
        usage="%(prog)s [--config FILE] [--NAME VALUE ...]",
        description="Train a Whisper: from nothing, further, with LoRA, or as a smaller student of a larger one.",
        epilog=f"NAME is any of the names below, as in a TOML file; VALUE is one value or several:\n{_names()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="a run as TOML; see configs/")
    parser.add_argument("--restart", action="store_true", help="refuse an output that holds a run already")
    parser.add_argument("--threads", **KINDS["count or none"], default=0, help="of the CPU; 0: one per core")
    parser.add_argument("--compilation_cache", **KINDS["cache"], default=True, help="True, False, or in this folder")
    parser.add_argument("--traceback", action="store_true", help="show where in the program an error happened")
    return parser


def _names() -> str:
    """Every name of a configuration with its description, in the groups of TOML's tables."""
    width = min(max(shutil.get_terminal_size().columns, 60), 120) - 2
    indent = " " * _NAME_WIDTH
    lines: list[str] = []
    for title, keys in describe():
        lines += ["", f"{title}:"]
        for name, text in keys:
            start = f"  --{name}"
            lines += [start] if len(start) + 2 > _NAME_WIDTH else []
            first = indent if len(start) + 2 > _NAME_WIDTH else start.ljust(_NAME_WIDTH)
            lines += textwrap.wrap(text, width, initial_indent=first, subsequent_indent=indent)
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command -> its exit status. Wrong usage raises SystemExit(2)."""
    return run_command(argv, build_parser(), _parse, _run)


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    args, overrides = parser.parse_known_args(arguments)
    args.overrides = overrides
    return args


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    try:
        config = load_config(args.config, args.overrides)
        if args.restart:
            _refuse_used(Path(config.output))
    except (ValueError, OSError) as error:
        parser.error(one_line(error))
    with _plain_log():
        return _train(config, args)


class _Lines(logging.Handler):
    """What is logged, as one line each, above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


@contextmanager
def _plain_log() -> Iterator[None]:
    logger, lines = logging.getLogger("whisper_nnx"), _Lines()
    logger.addHandler(lines)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(lines)
        logger.propagate = True


def _refuse_used(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--restart needs an empty output, but {output} holds something; remove it or give --output")


def _train(config: TrainConfig, args: argparse.Namespace) -> int:
    require_packages("training", "train", "grain", "optax", "orbax", "soxr", "tensorboardX")
    start(args.threads, args.compilation_cache)
    from weight_loader import save_pretrained
    from whisper_nnx.training.run import train

    model, teacher = load_models(config)
    result = train(config, model, save_pretrained, teacher, make_evaluate(config, model))
    wer = "" if result.best_wer is None else f", best word error rate {result.best_wer:.2%}"
    if result.stopped:
        say(f"{result.stopped}: {config.output} is saved at step {result.step}{wer}")
        return EXIT_STATUS[result.stopped]
    say(f"{config.output}/export holds the model after {result.step} steps{wer}")
    return 0


def load_models(config: TrainConfig) -> tuple[Whisper, Whisper | None]:
    """The model to train, and the teacher if there is one. Raises ValueError or OSError where they cannot be had."""
    from flax import nnx

    from weight_loader import load_model
    from whisper_nnx.text.tokenizer import Tokenizer
    from whisper_nnx.training.step import new_model

    dtype, masters = config.model.dtype, {"weights": "float32"}
    tokenizer = config.model.tokenizer or None
    teacher = load_model(config.distill.teacher, dtype=dtype, **masters) if config.distill.teacher else None
    if config.model.init:
        return load_model(config.model.init, dtype=dtype, tokenizer=tokenizer, **masters), teacher
    if teacher is not None:
        from whisper_nnx.training.distill import make_student

        return make_student(teacher, config.distill), teacher
    return new_model(config.model, Tokenizer.from_folder(config.model.tokenizer), nnx.Rngs(config.seed)), None


def make_evaluate(config: TrainConfig, model: Whisper) -> Evaluate | None:
    """What transcribes the rows of evaluate.manifest and counts errors; None where there is no manifest.

    Raises ValueError for unknown options and where no row can be used.
    """
    if not config.evaluate.manifest:
        return None
    from whisper_nnx.data.manifest import limits_of, problem_lines, read_manifest
    from whisper_nnx.evaluation.run import error_lines, evaluate
    from whisper_nnx.transcription.options import TranscribeOptions
    from whisper_nnx.transcription.windows import tokenizer_of

    options: dict[str, Any] = config.evaluate.options
    try:
        evaluates = inspect.signature(evaluate).parameters.keys() - options_of(*RECORDING)
        TranscribeOptions.of(**{name: value for name, value in options.items() if name not in evaluates})
        evaluate(model, [], **options)  # what it refuses is known before training, not after
    except (TypeError, ValueError) as error:
        raise ValueError(f"evaluate.options: {error}") from None
    rows = []
    for path in dict.fromkeys(config.evaluate.manifest):
        manifest = read_manifest(path, **limits_of(tokenizer_of(model), config.data.language))
        rows += manifest.rows
        if manifest.rows and path in config.data.train:
            continue  # training reports its problems
        for line in problem_lines(path, manifest.problems):
            say(line)
    rows = rows[: config.evaluate.max_rows or None]
    if not rows:
        raise ValueError(f"{', '.join(config.evaluate.manifest)}: no row can be used; correct evaluate.manifest")

    def run(model: Whisper) -> dict[str, float]:
        found = evaluate(model, rows, **options)
        for line in error_lines(rows, found):
            say(line)
        if found.wer is None:
            if found.failed:
                raise ValueError(
                    f"evaluate.manifest: none of its rows with speech could be evaluated: {found.failed[0].error}"
                )
            raise ValueError("evaluate.manifest has no words, so there is no word error rate; add rows with speech")
        return {"wer": found.wer, "cer": found.cer or 0.0, "evaluate_s": round(found.wall_s, 1)}

    return run
