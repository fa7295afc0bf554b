"""Grammars that are not regular, in the form that llguidance reads: Lark."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from whisper_nnx.grammar.expressions import Chars, Choice, Intervals, Node, Reference, Repeat, Sequence

_EXACT = '%llguidance {"no_forcing": true}\n'  # any tokens of a text, not only those that a tokenizer would choose
_SPACE = {"x-guidance": {"whitespace_pattern": " ?"}}  # in JSON, as outlines-core allows it


@dataclass(frozen=True)
class Lark:
    """The text of a grammar."""

    text: str


def checked(grammar: Lark, reason: str) -> Lark:
    """Raises ValueError for what llguidance cannot read, ImportError without it; reason: why it is needed."""
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise ImportError(f"{reason}, which needs llguidance; pip install 'whisper-nnx[grammar]'") from None
    if problem := LLMatcher.validate_grammar(grammar.text):
        raise ValueError(f"cannot be used: {problem.splitlines()[0]}")
    return grammar


def lark_of_schema(schema: str) -> Lark:
    """The JSON texts of a schema, as llguidance reads it, also after a space."""
    return Lark(f'{_EXACT}start: " "? json\njson: %json {json.dumps(_SPACE | json.loads(schema))}')


def lark_of_rules(rules: Mapping[str, Node], start: str) -> Lark:
    """The texts of the rule `start`. Raises ValueError if there are none.

    Each character is a terminal: longer ones are matched greedily, and what follows would be refused.
    """
    finite = _finite(rules)
    if start not in finite:
        raise ValueError("matches no text; correct it")
    names = {name: f"r{n}" for n, name in enumerate(rules)}
    lines = [f"{names[name]}: {_written(rules[name], names, finite)}" for name in rules if name in finite]
    return Lark("\n".join([f"{_EXACT}start: {names[start]}", *lines]))


def _finite(rules: Mapping[str, Node]) -> set[str]:
    """Names of the rules that match any text."""
    found = set[str]()
    while new := {name for name, body in rules.items() if name not in found and _matches(body, found)}:
        found |= new
    return found


def _matches(node: Node, finite: Collection[str]) -> bool:
    """Whether it matches any text, where only the rules `finite` do."""
    if isinstance(node, Reference):
        return node.name in finite
    if isinstance(node, Chars):
        return any(_valid(node.intervals))
    if isinstance(node, Repeat) and node.least == 0:
        return True
    return (any if isinstance(node, Choice) else all)(_matches(part, finite) for part in node.parts)


def _written(node: Node, names: Mapping[str, str], finite: Collection[str]) -> str:
    """An expression that matches a text."""
    if isinstance(node, Reference):
        return names[node.name]
    if isinstance(node, Chars):
        ranges = "".join(f"\\x{{{low:x}}}-\\x{{{high:x}}}" for low, high in _valid(node.intervals))
        return f"/[{ranges}]/"
    parts = [_written(part, names, finite) for part in node.parts if _matches(part, finite)]
    if not parts or (isinstance(node, Repeat) and node.most == 0):
        return '""'
    if isinstance(node, Repeat):
        return f"({parts[0]}){{{node.least},{'' if node.most is None else node.most}}}"
    return f"({(' ' if isinstance(node, Sequence) else ' | ').join(parts)})"


def _valid(intervals: Intervals) -> list[tuple[int, int]]:
    """Without surrogates, which have no UTF-8."""
    halves = [pair for low, high in intervals for pair in ((low, min(high, 0xD7FF)), (max(low, 0xE000), high))]
    return [(low, high) for low, high in halves if low <= high]
