"""The argument parser of the commands: openai-whisper's short names, hyphens, flags without a value, likely names."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Sequence
from typing import Any, NoReturn

from whisper_nnx.cli.options import KINDS
from whisper_nnx.runtime.console import NAME
from whisper_nnx.transcription.other_names import OPENAI_OPTIONS, OTHER_OPTIONS


class Parser(argparse.ArgumentParser):
    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """The options that start so: openai-whisper's alone, if any, so that its abbreviations work here too."""
        found = super()._get_option_tuples(option_string)
        return [option for option in found if option[1].removeprefix("--") in OPENAI_OPTIONS] or found

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Takes `spelled_out` arguments; names the likely option where one is unknown."""
        # Files may stand between options; after "--" all are files, which argparse forgets when it mixes them.
        parse = self.parse_known_args if "--" in args else self.parse_known_intermixed_args
        found, unknown = parse(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(name, self._option_string_actions, 1)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{f'; did you mean {near[0]}?' if near else ''}")
        return found

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{NAME}: error: {message} ({self.prog} --help lists the options)\n")


class Help(argparse.HelpFormatter):
    """Shows defaults, but not those that only mean "not given"."""

    def _get_help_string(self, action: argparse.Action) -> str:
        shown = action.option_strings and action.default not in (None, argparse.SUPPRESS) and action.nargs != 0
        return f"{action.help} (default: %(default)s)" if shown else action.help or ""


class Version(argparse.Action):
    """As argparse's own, but looks up the versions only when they are requested."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        from whisper_nnx import __version__

        print(f"{NAME} {__version__} (jax {version('jax')}, flax {version('flax')})")
        parser.exit()


def spelled_out(arguments: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """`--beam-size=5` -> `--beam_size=5`, and `--diarize` alone -> `--diarize=True`. Nothing changes after `--`.

    Ends the command where an option has another name here.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    actions = {name: action for name, action in parser._option_string_actions.items() if name.startswith("--")}
    flags = (KINDS["flag"]["metavar"], KINDS["flag or none"]["metavar"])
    spelled: list[str] = []
    for place, argument in enumerate(arguments[:end]):
        name, equals, value = argument.partition("=")
        name = f"--{name[2:].replace('-', '_')}" if name.startswith("--") else name
        if name in OTHER_OPTIONS and name not in parser._option_string_actions:
            parser.error(f"{argument.partition('=')[0]} {OTHER_OPTIONS[name]}")
        meant = [name] if name in actions else [option for option in actions if option.startswith(name)]
        if not name.startswith("--") or not meant:  # a value, perhaps
            spelled.append(argument)
            continue
        alone = not equals and (place + 1 == end or _is_no_value(arguments[place + 1]))
        if alone and all(actions[option].metavar in flags for option in meant):
            equals, value = "=", "True"
        spelled.append(f"{name}{equals}{value}")
    return [*spelled, *arguments[end:]]


def _is_no_value(argument: str) -> bool:
    """Whether it is another option or a file rather than a value such as True."""
    return argument.startswith("-") or any(mark in argument for mark in "./\\*") or os.path.exists(argument)


def parse_spelled(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    return parser.parse_args(spelled_out(arguments, parser))
