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
def automaton_of(grammar: Grammar) -> ByteAutomaton:
    """Raises ValueError, with the option and the remedy, for what is no grammar or too large a one."""
    from whisper_nnx.grammar.automaton import byte_automaton
    from whisper_nnx.grammar.expressions import Choice, Node, Sequence, literal, optional
    from whisper_nnx.grammar.gbnf import read_gbnf
    from whisper_nnx.grammar.regex import read_json_schema, read_regex

    text = grammar.text
    try:
        if grammar.option == "grammar":
            return byte_automaton(read_gbnf(str(text), grammar.rule))
        if grammar.option == "choices":
            expression: Node = Choice(tuple(literal(one.strip()) for one in text))
        else:
            expression = (read_regex if grammar.option == "regex" else read_json_schema)(str(text))
        # Whisper's text starts with a space, in most languages.
        return byte_automaton(Sequence((optional(literal(" ")), expression)))
    except RecursionError:
        raise ValueError(f"{grammar.shown} is nested too deeply; simplify it") from None
    except ValueError as error:
        raise ValueError(f"{grammar.shown}: {error}") from None
