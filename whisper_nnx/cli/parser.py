"""The argument parser of the commands: openai-whisper's short names, hyphens, flags without a value, likely names."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Sequence
from typing import Any, NoReturn

from whisper_nnx.cli.options import KINDS
from whisper_nnx.runtime.console import NAME
from whisper_nnx.transcription.other_names import MEANT_OPTIONS, OPENAI_OPTIONS, OTHER_OPTIONS


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

    Options of whisper.cpp become those of the same meaning. Ends the command where another option has no counterpart.
    """
    arguments = with_own_names(arguments, parser)
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


def with_own_names(arguments: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """Replaces options of whisper.cpp's command: `-t 4 -osrt -ovtt` -> `--threads=4 --output_format=srt,vtt`."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    known, rest, own, formats = parser._option_string_actions, iter(arguments[:end]), list[str](), list[str]()
    for argument in rest:
        name, equals, value = argument.partition("=")
        name = f"--{name[2:].replace('-', '_')}" if name.startswith("--") else name
        words = MEANT_OPTIONS.get(name, "").split()
        if name in known or not words or any(word.startswith("--") and word not in known for word in words):
            own.append(argument)
            continue
        if not {"{}", "{ms}", "gpu:{}"}.isdisjoint(words) and not equals:
            value = next(rest, "")
        if not value and (equals or "{" in MEANT_OPTIONS[name]):
            parser.error(f"{name} requires a value")
        filled = [word.format(value, ms=_seconds(parser, name, value)) for word in words]
        if len(filled) == 1:
            own += filled
        for option, given in zip(filled[::2], filled[1::2], strict=False):
            if option == "--output_format":
                formats.append(given)
            elif (option, given) != ("--duration_s", "0.0"):  # all of it
                own.append(f"{option}={given}")
    if formats:
        if twice := [a for a in arguments[:end] if a.partition("=")[0].replace("-", "_") in ("_f", "__output_format")]:
            parser.error(f"{twice[0]} and options such as -o{formats[0]} both choose the formats; drop one of the two")
        own.append(f"--output_format={','.join(formats)}")
    return [*own, *arguments[end:]]


def _seconds(parser: argparse.ArgumentParser, name: str, value: str) -> float | None:
    """Of a time in ms, if the option's value is one."""
    if "{ms}" not in MEANT_OPTIONS[name]:
        return None
    try:
        return int(value) / 1000
    except ValueError:
        parser.error(f"{name}: {value!r} is not a whole number of milliseconds")


def _is_no_value(argument: str) -> bool:
    """Whether it is another option or a file rather than a value such as True."""
    return argument.startswith("-") or any(mark in argument for mark in "./\\*") or os.path.exists(argument)


def parse_spelled(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    return parser.parse_args(spelled_out(arguments, parser))
