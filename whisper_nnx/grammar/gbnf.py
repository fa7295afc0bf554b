"""Reads GBNF, the grammars of whisper.cpp: rules, literals, character sets, groups, repetition and comments."""

from __future__ import annotations

import re

from whisper_nnx.grammar.expressions import (
    EMPTY,
    MAX_CODE_POINT,
    Chars,
    Choice,
    Node,
    Reference,
    Repeat,
    Sequence,
    complement,
    literal,
)

_NAME = re.compile(r"[a-zA-Z0-9_-]+")
_BLANKS, _LINES = re.compile(r"(?:[ \t]|#[^\r\n]*)*"), re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_TIMES = re.compile(r"\{(\d{1,6})(,(\d{1,6})?)?\}")
_ESCAPES = {"t": "\t", "r": "\r", "n": "\n", **{c: c for c in '\\"[]-^'}}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
_REPEATS = {"*": (0, None), "+": (1, None), "?": (0, 1)}


def read_gbnf(text: str, start: str) -> dict[str, Node]:
    """The rules by name, of which one is `start`. Raises ValueError, with the line, for what is not GBNF."""
    if "::=" not in text:
        raise ValueError("is neither an existing file nor a grammar (NAME ::= ...); in Python, give a file as a Path")
    rules = _Reader(text).rules()
    if start not in rules:
        known = ", ".join(list(rules)[:10]) or "no rule"
        raise ValueError(f"has no rule {start!r}; grammar_rule names the first one of {known}")
    for name, body in rules.items():
        if missing := sorted(body.references - rules.keys()):
            raise ValueError(f"rule {name!r} refers to {missing[0]!r}, which is not defined")
    return rules


class _Reader:
    def __init__(self, text: str):
        self._text, self._at = text, 0

    def rules(self) -> dict[str, Node]:
        rules: dict[str, Node] = {}
        self._space(lines=True)
        while self._at < len(self._text):
            name = self._match(_NAME, "the name of a rule")[0]
            self._space()
            self._expect("::=")
            self._space(lines=True)
            if name in rules:
                raise self._error(f"rule {name!r} is defined twice")
            rules[name] = self._choice(nested=False)
            if self._at < len(self._text) and self._text[self._at] not in "\r\n":
                raise self._error("expected the end of the line")
            self._space(lines=True)
        return rules

    def _choice(self, *, nested: bool) -> Node:
        parts = [self._sequence(nested=nested)]
        while self._text.startswith("|", self._at):
            self._at += 1
            self._space(lines=True)
            parts.append(self._sequence(nested=nested))
        return parts[0] if len(parts) == 1 else Choice(tuple(parts))

    def _sequence(self, *, nested: bool) -> Node:
        parts: list[Node] = []
        while (item := self._item()) is not None:
            self._space(lines=nested)
            while (times := self._times()) is not None:
                item = Repeat((item,), *times)
                self._space(lines=nested)
            parts.append(item)
        return parts[0] if len(parts) == 1 else Sequence(tuple(parts)) if parts else EMPTY

    def _item(self) -> Node | None:
        first = self._text[self._at : self._at + 1]
        if first == '"':
            self._at += 1
            characters = []
            while not self._text.startswith('"', self._at):
                characters.append(self._character())
            self._at += 1
            return literal("".join(map(chr, characters)))
        if first == "[":
            return self._set()
        if first == ".":
            self._at += 1
            return Chars(intervals=((0, MAX_CODE_POINT),))
        if first == "(":
            self._at += 1
            self._space(lines=True)
            inner = self._choice(nested=True)
            self._expect(")")
            return inner
        if first and (name := _NAME.match(self._text, self._at)):
            self._at = name.end()
            return Reference(name=name[0])
        if first and first in "*+?{":
            raise self._error(f"{first!r} follows nothing that it could repeat")
        return None

    def _set(self) -> Node:
        self._at += 1
        excluded = self._text.startswith("^", self._at)
        self._at += excluded
        intervals = []
        while not self._text.startswith("]", self._at):
            low = high = self._character()
            if self._text.startswith("-", self._at) and not self._text.startswith("-]", self._at):
                self._at += 1
                high = self._character()
            if low > high:
                raise self._error(f"the range {chr(low)}-{chr(high)} is empty; exchange its ends")
            intervals.append((low, high))
        self._at += 1
        return Chars(intervals=complement(tuple(intervals)) if excluded else tuple(intervals))

    def _times(self) -> tuple[int, int | None] | None:
        first = self._text[self._at : self._at + 1]
        if first in _REPEATS and first:
            self._at += 1
            return _REPEATS[first]
        if first != "{":
            return None
        found = self._match(_TIMES, "numbers such as {2}, {2,} or {2,5}")
        least = int(found[1])
        most = least if found[2] is None else int(found[3]) if found[3] else None
        if most is not None and most < least:
            raise self._error(f"{found[0]} ends below its beginning; exchange the numbers")
        return least, most

    def _character(self) -> int:
        character = self._text[self._at : self._at + 1]
        self._at += 1
        if character in ("", "\n"):
            raise self._error("a literal or set has no end")
        if character != "\\":
            return ord(character)
        escaped = self._text[self._at : self._at + 1]
        self._at += 1
        if escaped in _HEX_DIGITS:
            digits = re.compile(f"[0-9a-fA-F]{{{_HEX_DIGITS[escaped]}}}")
            code = int(self._match(digits, f"{_HEX_DIGITS[escaped]} hexadecimal digits")[0], 16)
            if code > MAX_CODE_POINT:
                raise self._error(f"{code:#x} exceeds the last Unicode character, 0x10ffff")
            return code
        if escaped not in _ESCAPES or not escaped:
            raise self._error(f"\\{escaped} is not a known escape; write \\\\ for a backslash")
        return ord(_ESCAPES[escaped])

    def _space(self, *, lines: bool = False) -> None:
        space = (_LINES if lines else _BLANKS).match(self._text, self._at)
        self._at = space.end() if space else self._at

    def _match(self, pattern: re.Pattern[str], what: str) -> re.Match[str]:
        found = pattern.match(self._text, self._at)
        if found is None:
            raise self._error(f"expected {what}")
        self._at = found.end()
        return found

    def _expect(self, text: str) -> None:
        if not self._text.startswith(text, self._at):
            raise self._error(f"expected {text!r}")
        self._at += len(text)

    def _error(self, problem: str) -> ValueError:
        line = self._text.count("\n", 0, self._at) + 1
        rest = self._text[self._at : self._at + 20].split("\n")[0]
        return ValueError(f"line {line}: {problem}" + (f", found {rest!r}" if problem.startswith("expected") else ""))
