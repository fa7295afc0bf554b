"""Parsers of option values given as text, on the command line or in the fields of a request."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, TypeVar

from whisper_nnx.runtime.options import Option

T = TypeVar("T")


def _optional(parse: Callable[[str], T]) -> Callable[[str], T | None]:
    def parse_unless_none(text: str) -> T | None:
        return None if text.lower() == "none" else parse(text)

    parse_unless_none.__name__ = parse.__name__  # argparse shows it: invalid int value
    return parse_unless_none


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def _texts(text: str) -> tuple[str, ...]:
    """One a line if there are several lines, otherwise separated by commas."""
    parts = text.splitlines() if "\n" in text.strip() else text.split(",")
    return tuple(part for part in map(str.strip, parts) if part)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def _at_least_one(text: str) -> int:
    if _count(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be at least 1")
    return int(text)


def _language(text: str) -> str | None:
    from whisper_nnx.text.languages import language_or_none, to_language_code

    try:
        return None if language_or_none(text) is None else to_language_code(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _languages(text: str) -> list[str] | None:
    return [code for name in text.split(",") if (code := _language(name.strip()))] or None


def how(parse: Callable[[str], Any], metavar: str | None, **more: Any) -> dict[str, Any]:
    return {"type": parse, "metavar": metavar, **more}


def _phrases(text: str) -> tuple[Any, ...] | None:
    from whisper_nnx.decoding.phrases import parse_phrases

    try:
        return parse_phrases(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


# Kind of value -> arguments of argparse's `add_argument`. Parsers raise ValueError, or ArgumentTypeError
# with a message that starts with the value.
KINDS = {
    "flag": how(_boolean, "{True,False}"),
    "flag or none": how(_optional(_boolean), "{True,False,None}"),
    "number": how(float, "X"),
    "number or none": how(_optional(float), "X"),
    "count": how(_count, "N"),
    "count or none": how(_optional(_count), "N"),
    "some": how(_at_least_one, "N"),
    "whole or none": how(_optional(int), "N"),
    "text": how(str, "TEXT"),
    "texts": how(_texts, "TEXTS"),
    "texts or none": how(_optional(_texts), "TEXTS"),
    "grammar": how(str, "GBNF"),
    "task": how(str, None, choices=["transcribe", "translate"]),
    "hallucination": how(_optional(str), "calm"),
    "language": how(_optional(_language), "NAME"),
    "languages": how(_languages, "NAMES"),
    "ids": how(_optional(str), "IDS"),
    "phrases": how(_optional(_phrases), "WORDS"),
    "heads": how(_optional(str), "HEADS"),
}
_KIND_OF_TYPE = {
    "bool": "flag",
    "bool | None": "flag or none",
    "float": "number",
    "float | None": "number or none",
    "int": "count",
    "int | None": "count or none",
    "str": "text",
    "str | None": "text",
}


def kind_of(one: Option, default: Any) -> str:
    """The key of `KINDS`, or of the command's own kinds, for an option with this default."""
    optional = default is None and not one.type.endswith("None")
    return one.kind or _KIND_OF_TYPE[f"{one.type} | None" if optional else one.type]
