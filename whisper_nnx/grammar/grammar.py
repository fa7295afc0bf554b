"""`Grammar`: what an option says that transcripts must match."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from whisper_nnx.runtime.files import read_regular

if TYPE_CHECKING:
    from whisper_nnx.grammar.automaton import ByteAutomaton
    from whisper_nnx.grammar.expressions import Node
    from whisper_nnx.grammar.lark import Lark


_LARGEST_FILE = 1_000_000  # bytes


@dataclass(frozen=True)
class Grammar:
    """A grammar by the option that gives it: grammar (GBNF), choices, regex or json_schema.

    text: its value; of choices, all of them. rule: of GBNF, where a text starts.
    """

    option: str
    text: str | tuple[str, ...]
    rule: str = "root"

    @property
    def shown(self) -> str:
        """How an error names it."""
        text = self.text if isinstance(self.text, str) else ",".join(self.text)
        return f"{self.option}={text if len(text) <= 60 else text[:57] + '...'!r}"


def read_grammar(path: str | os.PathLike[str]) -> str:
    """The text of a GBNF file. Raises ValueError, with its path, for what is not one; OSError."""
    file = Path(path)
    try:
        return read_regular(file, _LARGEST_FILE).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"grammar={str(file)!r} is not UTF-8 text; give a GBNF grammar") from None


@lru_cache(maxsize=64)
def automaton_of(grammar: Grammar) -> ByteAutomaton | Lark:
    """The automaton of a grammar; of one that is not regular, its form for llguidance.

    Raises ValueError, with the option and the remedy, for what is no grammar or too large a one; ImportError.
    """
    from whisper_nnx.grammar.automaton import byte_automaton
    from whisper_nnx.grammar.expressions import NotRegularError, Sequence, literal, optional
    from whisper_nnx.grammar.lark import checked

    try:
        try:
            expression = _expression(grammar)
            if grammar.option != "grammar":  # Whisper's text starts with a space, in most languages.
                expression = Sequence((optional(literal(" ")), expression))
            return byte_automaton(expression)
        except NotRegularError as error:
            return checked(_lark(grammar), str(error))
    except RecursionError:
        raise ValueError(f"{grammar.shown} is nested too deeply; simplify it") from None
    except ImportError as error:
        raise ImportError(f"{grammar.shown}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{grammar.shown}: {error}") from None


def _expression(grammar: Grammar) -> Node:
    from whisper_nnx.grammar.expressions import Choice, Rules, literal
    from whisper_nnx.grammar.gbnf import read_gbnf
    from whisper_nnx.grammar.regex import read_json_schema, read_regex

    text = grammar.text
    if grammar.option == "choices":
        return Choice(tuple(literal(one.strip()) for one in text))
    if grammar.option == "grammar":
        return Rules(read_gbnf(str(text), grammar.rule)).solve(grammar.rule)
    return (read_regex if grammar.option == "regex" else read_json_schema)(str(text))


def _lark(grammar: Grammar) -> Lark:
    from whisper_nnx.grammar.gbnf import read_gbnf
    from whisper_nnx.grammar.lark import lark_of_rules, lark_of_schema

    if grammar.option == "json_schema":
        return lark_of_schema(str(grammar.text))
    return lark_of_rules(read_gbnf(str(grammar.text), grammar.rule), grammar.rule)
