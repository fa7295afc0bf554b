"""The command `python -m weight_loader`: converts and inspects checkpoints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from weight_loader.writers import WRITERS
from whisper_nnx.runtime.console import interrupts_wait, run_command

_FORMATS = (
    "hf (a folder for transformers and for load_model), openai (a .pt file for openai-whisper), mlx (a folder for "
    "mlx-whisper), ggml (a .bin file for whisper.cpp), ct2 (a folder for faster-whisper)"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 if reading or writing fails. Wrong usage raises SystemExit(2)."""
    return run_command(arguments, _parser(), argparse.ArgumentParser.parse_args, _run, name="")


def _run(parser: argparse.ArgumentParser, given: argparse.Namespace) -> int:
    return _convert(given) if given.command == "convert" else _inspect(given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m weight_loader", description="Inspect and convert Whisper checkpoints"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    source = "folder, file, repository (owner/name) or short name (tiny, large-v3, ...) of a checkpoint in any format"

    convert = commands.add_parser("convert", help="write a checkpoint in another format")
    convert.add_argument("source", metavar="SRC", help=source)
    convert.add_argument("target", metavar="DST", help="file or folder to write; must not exist")
    convert.add_argument("--to", required=True, choices=tuple(WRITERS), help=_FORMATS)
    convert.add_argument(
        "--dtype", help="float32, float16, or a type of the format such as q8_0 or int8 (default: as stored)"
    )
    convert.add_argument(
        "--tokenizer", metavar="FROM", help="folder, .tiktoken file, repository or short name with the tokenizer"
    )

    inspect = commands.add_parser("inspect", help="show the contents of a checkpoint and what is missing")
    inspect.add_argument("source", metavar="PATH", help=source)
    for command in (convert, inspect):
        command.add_argument("--traceback", action="store_true", help="show the traceback of errors")
    return parser


def _convert(given: argparse.Namespace) -> int:
    with interrupts_wait():  # JAX crashes where its import is interrupted
        from weight_loader.load import read_content
        from weight_loader.writers import check_target, write_checkpoint

    check_target(given.target, given.to, given.dtype)
    content = read_content(given.source, tokenizer=given.tokenizer)
    for lost in write_checkpoint(content, given.target, given.to, given.dtype):
        print(f"not stored: {lost}", file=sys.stderr)
    print(f"{given.target}: {given.to}, {given.dtype or content.dtype}")
    return 0


def _inspect(given: argparse.Namespace) -> int:
    with interrupts_wait():
        from weight_loader.report import report

    lines, complete = report(given.source)
    print("\n".join(lines))
    return 0 if complete else 1
