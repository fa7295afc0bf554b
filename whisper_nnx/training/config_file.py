"""Makes a TrainConfig from a TOML file and the command line's `--name value ...`."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from whisper_nnx.training.config import TrainConfig, check

T = TypeVar("T")
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


def load_config(file: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """Loads a configuration from a TOML file (None: the defaults) and command-line overrides.

    overrides: dotted names and values, `--optimizer.learning_rate 1e-4 --data.train a.jsonl b.jsonl`; they take
    precedence over the file. Raises ValueError, in one line, for values that are unknown, of the wrong type or out of
    range, and OSError if the file cannot be read.
    """
    content: dict[str, Any] = {}
    if file is not None:
        try:
            content = tomllib.loads(Path(file).read_text("utf-8"))
        except ValueError as error:  # invalid TOML or UTF-8
            raise ValueError(f"{file} is not a TOML file: {error}") from None
        try:
            from_dict(content)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
    for name, texts in _options(overrides):
        *sections, last = name.split(".")
        within = content
        for section in sections:
            within = within.setdefault(section, {})
        within[last] = _from_texts(name, texts)
    config = from_dict(content)
    check(config)
    return config


def from_dict(content: Mapping[str, Any]) -> TrainConfig:
    """Makes a TrainConfig from nested mappings. Raises ValueError for an unknown name or a wrong type."""
    return _make(TrainConfig, content, "")


def _make(kind: type[T], content: Any, prefix: str) -> T:
    """Makes a configuration dataclass from a mapping; prefix: its dotted name, for messages."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{prefix[:-1]}={content!r} must be a table of names and values")
    hints = get_type_hints(kind)
    for name in content:
        if name not in hints:
            raise ValueError(_unknown(f"{prefix}{name}"))
    return kind(**{name: _typed(f"{prefix}{name}", value, hints[name]) for name, value in content.items()})


def _typed(name: str, value: Any, hint: Any) -> Any:
    """Converts a value to its field's type."""
    if is_dataclass(hint):
        return _make(cast(type, hint), value, f"{name}.")
    if get_origin(hint) is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{name}={value!r} must be a table of names and values")
        return dict(value)
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name}={value!r} must be a list: [{value!r}]")
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        if len(value) != len(kinds):
            raise ValueError(f"{name}={list(value)} must be {len(kinds)} values, not {len(value)}")
        return tuple(_typed(name, item, kind) for item, kind in zip(value, kinds, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{name}={value!r} must be {_KINDS[hint]}")
    return value


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Parses `--a.b 1 2 --c=3` to (a.b, [1, 2]), (c, [3]). Names may have hyphens instead of underscores."""
    found: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            found.append((name.replace("-", "_"), [value] if equals else []))
        elif found:
            found[-1][1].append(argument)
        else:
            raise ValueError(f"{argument!r} follows no option; write --name value, or --config {argument}")
    yield from found


def _from_texts(name: str, texts: list[str]) -> Any:
    """Converts the command-line values of a name to TOML's types."""
    hint = _fields().get(name)
    if hint is None:
        parent = name.rpartition(".")[0]
        if get_origin(_fields().get(parent)) is not dict:  # only a dict has arbitrary keys
            raise ValueError(_unknown(name))
        values = [_from_toml(text) for text in texts]
        return values[0] if len(values) == 1 else values
    if get_origin(hint) is dict:
        raise ValueError(f"{name} is a table; give its values one by one: --{name}.KEY VALUE")
    if get_origin(hint) is tuple:
        return [_parsed(name, text, get_args(hint)[0]) for text in texts]
    if len(texts) != 1:
        raise ValueError(f"{name} needs one value, but {' '.join(texts) or 'none'} was given")
    return _parsed(name, texts[0], hint)


def _parsed(name: str, text: str, hint: Any) -> Any:
    if hint is str:
        return text
    try:
        if get_origin(hint) is tuple:  # a (layer, head), as in --alignment_heads
            return [int(part) for part in text.split(":")]
        return {"true": True, "false": False}[text.lower()] if hint is bool else hint(text)
    except (KeyError, ValueError):
        raise ValueError(f"{name}={text!r} must be {_KINDS.get(hint, 'layer:head')}") from None


def _from_toml(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return text


@cache
def _fields(kind: Any = None, prefix: str = "") -> dict[str, Any]:
    """Maps the dotted names of all values to their types."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind or TrainConfig).items():
        found |= _fields(cast(Any, hint), f"{prefix}{name}.") if is_dataclass(hint) else {f"{prefix}{name}": hint}
    return found


def _unknown(name: str) -> str:
    """Message for an unknown name, suggesting the same name in another section or the most similar one."""
    names = [*_fields(), *{field.partition(".")[0] for field in _fields()}]
    last = name.rpartition(".")[2]
    near = [known for known in names if known.rpartition(".")[2] == last] or get_close_matches(name, names, 1, 0.5)
    near = near or get_close_matches(last, names, 1, 0.5)
    return f"{name} is unknown" + (f"; did you mean {near[0]}?" if near else f"; choose from {', '.join(_fields())}")
