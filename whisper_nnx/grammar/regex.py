"""Reads Python's regular expressions, as far as they are regular, and JSON schemas."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cache
from re import _constants, _parser  # type: ignore[attr-defined]  # Python's own parser
from typing import Any

from whisper_nnx.grammar.expressions import (
    EMPTY,
    MAX_CODE_POINT,
    Chars,
    Choice,
    Intervals,
    Node,
    NotRegularError,
    Repeat,
    Sequence,
)
from whisper_nnx.grammar.expressions import complement as others

_REFUSED = {
    "GROUPREF": "backreferences",
    "GROUPREF_EXISTS": "conditions",
    "ASSERT": "lookaround",
    "ASSERT_NOT": "lookaround",
    "AT": "anchors other than ^ and $ at the ends",
    "ATOMIC_GROUP": "atomic groups",
    "POSSESSIVE_REPEAT": "possessive repetition",
}
_DEPTH = 3  # of definitions in others, to which outlines-core expands them
_NESTED = "its definitions refer to themselves, or to each other over many levels"
_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "DIGIT": str.isdecimal,
    "SPACE": str.isspace,
    "WORD": lambda c: c.isalnum() or c == "_",
}


def read_regex(pattern: str) -> Node:
    """The expression of a pattern that is to match a whole text. Raises ValueError for what is not regular."""
    try:
        parsed = _parser.parse(pattern)
    except (re.error, OverflowError, TypeError) as error:
        raise ValueError(f"is not a valid regular expression: {error}") from None
    if parsed.state.flags & ~re.UNICODE.value:
        raise ValueError("has flags, which are not supported; write [Aa] for either case")
    items = list(parsed)
    if items[:1] == [(_constants.AT, _constants.AT_BEGINNING)]:
        items = items[1:]
    if items[-1:] == [(_constants.AT, _constants.AT_END)]:
        items = items[:-1]
    return _sequence(items)


def read_json_schema(schema: str) -> Node:
    """The expression of the JSON texts of a schema. Raises NotRegularError for a recursive one, among others."""
    try:
        from outlines_core.json_schema import build_regex_from_schema
    except ImportError:
        raise ImportError("json_schema needs outlines-core; pip install 'whisper-nnx[grammar]'") from None
    try:
        pattern, deeper = (build_regex_from_schema(schema, None, depth) for depth in (_DEPTH, _DEPTH + 1))
    except (ValueError, TypeError) as error:
        if "limit reached" in str(error):
            raise NotRegularError(_NESTED) from None
        raise ValueError(f"is not a JSON schema that can be used: {error}") from None
    if pattern != deeper:
        raise NotRegularError(_NESTED)
    return read_regex(pattern)


def _sequence(items: Iterable[Any]) -> Node:
    parts = tuple(_node(kind, value) for kind, value in items)
    return parts[0] if len(parts) == 1 else Sequence(parts) if parts else EMPTY


def _node(kind: Any, value: Any) -> Node:
    name = str(kind)
    if name == "LITERAL":
        return Chars(intervals=((value, value),))
    if name == "NOT_LITERAL":
        return Chars(intervals=others(((value, value),)))
    if name == "ANY":
        return Chars(intervals=others(((10, 10),)))
    if name == "IN":
        return Chars(intervals=_set(value))
    if name == "BRANCH":
        return Choice(tuple(_sequence(items) for items in value[1]))
    if name == "SUBPATTERN" and not value[1] and not value[2]:
        return _sequence(value[3])
    if name in ("MAX_REPEAT", "MIN_REPEAT"):
        least, most, items = value
        return Repeat((_sequence(items),), int(least), None if most == _constants.MAXREPEAT else int(most))
    raise ValueError(f"has {_REFUSED.get(name, 'flags')}, which are not supported; leave them out")


def _set(items: Iterable[Any]) -> Intervals:
    found: list[tuple[int, int]] = []
    excluded = False
    for kind, value in items:
        if str(kind) == "NEGATE":
            excluded = True
        elif str(kind) == "RANGE":
            found.append(value)
        elif str(kind) == "CATEGORY":
            found += _category(str(value).removeprefix("CATEGORY_"))
        else:
            found.append((value, value))
    return others(tuple(found)) if excluded else tuple(found)


@cache
def _category(name: str) -> Intervals:
    """Code points of \\d, \\s and \\w, and of the others where the name starts with NOT_."""
    if name.startswith("NOT_"):
        return others(_category(name.removeprefix("NOT_")))
    is_in, found, start = _CATEGORIES[name], [], None
    for code in range(MAX_CODE_POINT + 2):
        inside = code <= MAX_CODE_POINT and is_in(chr(code))
        if inside and start is None:
            start = code
        elif not inside and start is not None:
            found.append((start, code - 1))
            start = None
    return tuple(found)
