"""Options that describe themselves: a dataclass's field holds what commands, functions and documents need of it.

    beam_size: int | None = field(default=None, metadata=option("beams of the search", scope="window", ...))

Everything that lists options derives its list from the fields by `options_of`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

T = TypeVar("T")
_KEY = "option"
SAME: Any = object()  # as the field's own default

# What an option is about: a call of `transcribe`; how a recording is read, which parts of it are transcribed and how
# its language is found; how its windows are decoded; how a finished transcript is written; or the server.
Scope = Literal["call", "recording", "window", "output", "server"]


@dataclass(frozen=True)
class Option:
    """A field of an options class, described.

    Attributes:
      help: one line, which --help shows; other options in it have their Python names.
      scope: see `Scope`.
      group: of --help.
      more: further explanation, for the documents.
      name: where it differs from the field's.
      accepts: the type of the keyword argument, where it differs from the field's.
      kind: how the command reads a value, where the type alone does not decide; a key of `KINDS` in
        transcription/option_values.py or cli/options.py.
      on_command: the command's default, where it differs; None: the command passes nothing on unless it is set.
      after: the option that precedes it in --help; "" for the first place.
      python_only: why the command has no such option.
      evaluate: whether `evaluate` has the option.
      detection: whether it is about detecting the language.
    """

    help: str
    scope: Scope
    group: str = ""
    more: str = ""
    name: str = ""
    accepts: str = ""
    kind: str = ""
    on_command: Any = SAME
    after: str | None = None
    python_only: str = ""
    evaluate: bool = True
    detection: bool = False
    type: str = ""  # this and the default are the field's
    default: Any = None

    @property
    def unset(self) -> Any:
        """The command's value that passes nothing on."""
        return None if self.on_command is None else SAME

    @property
    def command_default(self) -> Any:
        return self.default if self.on_command is SAME else self.on_command


def option(help: str, scope: Scope, **more: Any) -> Mapping[str, Option]:
    """The `metadata` of a dataclass's field; for the arguments see `Option`."""
    return {_KEY: Option(help, scope, **more)}


def options_of(*kinds: Any) -> dict[str, Option]:
    """Name -> option, in the order of the fields. Of options that several classes have, the first one counts."""
    found: dict[str, Option] = {}
    for kind in kinds:
        for field in fields(kind):
            if _KEY in field.metadata:
                described: Option = field.metadata[_KEY]
                name, type_ = described.name or field.name, str(field.type)
                accepts = described.accepts or type_
                own = replace(described, name=name, accepts=accepts, type=type_, default=field.default)
                found.setdefault(name, own)
    return found


def explained(kind: type[T]) -> type[T]:
    """A class decorator: the docstring names all options with their explanations, for `help()`."""
    wrap = textwrap.TextWrapper(110, initial_indent="      ", subsequent_indent="        ").fill
    lines = [wrap(f"{name}: {explanation(one)}") for name, one in options_of(kind).items()]
    if kind.__doc__ is not None:
        kind.__doc__ = "\n".join([kind.__doc__.rstrip(), "", "    Attributes:", *lines])
    return kind


def explanation(described: Option) -> str:
    """What the documents say of an option."""
    text = f"{described.help[0].upper()}{described.help[1:]}."
    return f"{text} {described.more}" if described.more else text
