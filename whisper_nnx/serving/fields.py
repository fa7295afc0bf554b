"""The options of a request as form fields: which there are, how their values are read, and their schema."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any, NamedTuple, TypeVar

from whisper_nnx.audio.constants import FRAMES_PER_SECOND
from whisper_nnx.audio.options import VadOptions
from whisper_nnx.output.subtitles import SubtitleOptions
from whisper_nnx.runtime.options import Option, explanation, options_of
from whisper_nnx.serving.errors import bad_request
from whisper_nnx.serving.settings import ServerSettings
from whisper_nnx.transcription.fallback import temperature_ladder
from whisper_nnx.transcription.longform import parse_clips
from whisper_nnx.transcription.option_values import KINDS, kind_of
from whisper_nnx.transcription.options import RECORDING, TranscribeOptions
from whisper_nnx.transcription.other_names import OTHER_KEYWORDS

T = TypeVar("T")
INCREMENT = "temperature_increment_on_fallback"
_VAD = "vad_"
_NEEDING_EXTRAS = ("vad_filter", "hallucination", "json_schema", "grammar")
# Of arrays; of the model; its fields are options; an OpenAI field of that name means initial_prompt; the server's file.
_NO_FIELD = {"sampling_rate", "fp16", "vad_parameters", "prompt", "lm"}
_TRUE, _FALSE = {"true", "1", "yes", "on", "t", "y"}, {"false", "0", "no", "off", "f", "n", ""}
_SMALLEST_INCREMENT = 0.05
_JOINED = {"texts": "\n", "phrases": "\n", "ids": ",", "languages": ","}  # how several values of a list become one
_LONGEST_GRAMMAR = 20_000
# A regular expression that takes for ever would stop the server.
_SLOW_PATTERN = re.compile(r"\)[*+?{]|\\[1-9]|(?:[*+{].*){3}", re.DOTALL)


class Field(NamedTuple):
    """An option as a form field."""

    name: str
    kind: str
    option: Option

    def read(self, text: str) -> Any:
        """Raises ApiError for a value that is none of its kind."""
        if self.name == "temperature":
            return read_temperatures(text)
        kind = KINDS[self.kind]
        choices = kind.get("choices")
        try:
            if self.kind.startswith("flag"):
                return _read_flag(text, self.kind == "flag or none")
            value = kind["type"](text)
        except argparse.ArgumentTypeError as error:
            raise bad_request(f"{self.name}: {error}", self.name) from None
        except ValueError:
            raise _unreadable(self.name, text, kind["metavar"]) from None
        if value != value:
            raise _unreadable(self.name, text, "X")
        if choices and value not in choices:
            raise not_one_of(self.name, value, choices)
        return value


def _fields(options: Iterable[Option], prefix: str = "") -> dict[str, Field]:
    """Options that only Python has, too: a client chooses its seed."""
    found = {}
    for one in options:
        if one.name in _NO_FIELD:
            continue
        kind = "text" if one.name == "prefix" else kind_of(one, one.default)
        if one.default is None and not kind.endswith("none") and f"{kind} or none" in KINDS:
            kind += " or none"
        found[prefix + one.name] = Field(prefix + one.name, kind, one)
    return found


RECORDING_FIELDS = _fields(options_of(*RECORDING).values())
VAD_FIELDS = _fields(options_of(VadOptions).values(), _VAD)
SUBTITLE_FIELDS = _fields(options_of(SubtitleOptions).values())
OPTION_FIELDS = {**RECORDING_FIELDS, **VAD_FIELDS}


class Fields:
    """The text fields of a request, taken by name, with or without brackets.

    Of several of one name, lists have all values, and other fields the last one.
    """

    def __init__(self, items: Iterable[tuple[str, str]]):
        self._values: dict[str, list[str]] = {}
        for name, value in items:
            self._values.setdefault(re.sub(r"\[\d*\]$", "", name), []).append(value)

    def take(self, name: str) -> str | None:
        values = self._values.pop(name, None)
        return values[-1] if values else None

    def take_list(self, name: str, split: bool = True) -> list[str]:
        """split: values may also be several, with commas."""
        values = self._values.pop(name, [])
        parts = [part for value in values for part in (value.split(",") if split else [value])]
        return [part.strip() for part in parts if part.strip()]

    def take_flag(self, name: str) -> bool:
        try:
            return bool(_read_flag(self.take(name) or ""))
        except argparse.ArgumentTypeError as error:
            raise bad_request(f"{name}: {error}", name) from None

    def take_choice(self, name: str, choices: Iterable[str], default: str) -> str:
        value = self.take(name) or default
        if value not in choices:
            raise not_one_of(name, value, choices)
        return value

    def take_options(self, known: dict[str, Field]) -> dict[str, Any]:
        """Values of options by the names of their fields. An empty value is none, but of texts."""
        found: dict[str, Any] = {}
        for name, field in known.items():
            if (joined := _JOINED.get(field.kind.removesuffix(" or none"))) and len(self._values.get(name, ())) > 1:
                text: str | None = joined.join(self.take_list(name, split=False))
            else:
                text = self.take(name)
            if text is not None and (text.strip() or field.kind in ("text", "ids")):
                found[name] = field.read(text.strip() if field.kind != "text" else text)
        return found

    def warnings(self, known: Iterable[str]) -> list[str]:
        """Names what nothing took."""
        hints = []
        for name in list(self._values)[:10]:
            near = get_close_matches(name, known, 1)
            hint = f"it {OTHER_KEYWORDS[name]}" if name in OTHER_KEYWORDS else ""
            hint = hint or (f"did you mean {near[0]}?" if near else "")
            hints.append(f"unknown field {name[:60]!r} has no effect{'; ' if hint else ''}{hint}")
        return hints


def _read_flag(text: str, or_none: bool = False) -> bool | None:
    word = text.strip().lower()
    if or_none and word in ("none", "null"):
        return None
    if word not in _TRUE | _FALSE:
        raise argparse.ArgumentTypeError(f"{text[:100]!r} is neither true nor false")
    return word in _TRUE


def _unreadable(name: str, text: str, metavar: str) -> Exception:
    kind = "a whole number" if metavar == "N" else "a number"
    return bad_request(f"{name}={text[:100]!r} must be {kind}", name)


def not_one_of(name: str, value: str, choices: Iterable[str]) -> Exception:
    return bad_request(f"{name}={str(value)[:100]!r} is not one of {', '.join(choices)}", name)


def read_temperatures(text: str) -> tuple[float, ...]:
    """One, or several with commas."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or len(values) > 20 or not all(0 <= value <= 10 for value in values):
        message = f"temperature={text[:100]!r} must be a number of 0 or more, or up to 20 of them with commas"
        raise bad_request(message, "temperature")
    return values


def temperatures(first: tuple[float, ...] | None, increment: str | None) -> tuple[float, ...] | None:
    """The temperatures to try -> None for the usual ones: as in OpenAI's API, 0 is where they start.

    Args:
      first: of the request, None where it names none.
      increment: text; "none" for one attempt alone. With None, a temperature above 0 is the only one.
    """
    if increment is None:
        return None if first in (None, (0.0,)) else first
    if first is not None and len(first) > 1:
        raise bad_request(f"{INCREMENT} goes with one temperature; drop it or the others", INCREMENT)
    start = first[0] if first else 0.0
    step = None if increment.lower() in ("none", "null", "") else Field(INCREMENT, "number", _NONE).read(increment)
    if step is not None and step > 0 and not step >= _SMALLEST_INCREMENT:
        raise bad_request(f"{INCREMENT}={step:g} must be at least {_SMALLEST_INCREMENT}, or none", INCREMENT)
    return temperature_ladder(start, step if step and step > 0 else None)


_NONE = Option("", "window")


def transcribe_options(values: dict[str, Any], settings: ServerSettings) -> TranscribeOptions:
    """From values by names of fields, within the limits of the server. Raises ApiError."""
    changes = {name: value for name, value in values.items() if name in RECORDING_FIELDS}
    vad = {name.removeprefix(_VAD): value for name, value in values.items() if name in VAD_FIELDS}
    if vad and not changes.get("vad_filter"):
        name = f"{_VAD}{next(iter(vad))}"
        raise bad_request(f"{name}={values[name]} needs vad_filter=true", name)
    _check_limits(changes, settings)
    changes = {"max_hours": settings.max_hours, **settings.language_model, **changes}
    try:
        if vad:
            changes["vad_parameters"] = _converted(VadOptions, vad, _VAD)
        if changes.get("alignment_heads") is not None:
            from whisper_nnx.model.heads import parse_heads

            changes["alignment_heads"] = parse_heads(changes["alignment_heads"])
        made = TranscribeOptions.changed(TranscribeOptions(), changes)
        clips = parse_clips(made.longform.clip_timestamps, round(3600 * FRAMES_PER_SECOND * made.max_hours))
    except ValueError as error:
        named = re.match(r"([a-z]\w*)=", str(error))
        raise bad_request(str(error), named[1] if named else None) from None
    except ImportError as error:  # of the detector, or for a grammar: says what to install
        needs = next((name for name in _NEEDING_EXTRAS if changes.get(name)), None)
        raise bad_request(str(error), needs, "not_installed") from None
    if sum(end - start for start, end in clips) > 3600 * FRAMES_PER_SECOND * made.max_hours:
        raise bad_request(
            f"clip_timestamps last longer than max_hours={made.max_hours:g}; drop some", "clip_timestamps"
        )
    return made


def _converted(make: Callable[..., T], values: dict[str, Any], prefix: str) -> T:
    try:
        return make(**values)
    except ValueError as error:
        names = "|".join(options_of(make))
        raise ValueError(re.sub(rf"\b({names})=", rf"{prefix}\1=", str(error))) from None


def _check_limits(changes: dict[str, Any], settings: ServerSettings) -> None:
    for name in ("beam_size", "best_of", "n_best"):
        if (changes.get(name) or 0) > (most := settings.max_candidates):
            raise bad_request(f"{name}={changes[name]} is more than this server allows; give at most {most}", name)
    if changes.get("patience") is not None and changes["patience"] > 8:
        raise bad_request(
            f"patience={changes['patience']:g} is more than this server allows; give at most 8", "patience"
        )
    if changes.get("max_hours", 0) > (most_hours := settings.max_hours):
        message = f"max_hours={changes['max_hours']:g} is more than this server allows; give at most {most_hours:g}"
        raise bad_request(message, "max_hours")
    if changes.get("lm_weight") and not settings.lm:
        message = f"lm_weight={changes['lm_weight']:g} needs a server with a language model (--lm); drop it"
        raise bad_request(message, "lm_weight")
    pattern = changes.get("suppress_regex") or ""
    if _SLOW_PATTERN.search(pattern) or len(pattern) > 500:
        message = "suppress_regex may take too long; write one without repeated groups, and with at most two of * + {"
        raise bad_request(message, "suppress_regex")
    for name in ("grammar", "regex", "json_schema"):
        if len(changes.get(name) or "") > _LONGEST_GRAMMAR:
            message = f"{name} has {len(changes[name])} characters; give at most {_LONGEST_GRAMMAR}"
            raise bad_request(message, name)


def subtitle_options(values: dict[str, Any], options: TranscribeOptions) -> dict[str, Any]:
    """Checked: raises ApiError for what goes not together, or needs times that were not asked for."""
    try:
        chosen = SubtitleOptions(**values)
    except ValueError as error:
        raise bad_request(str(error), next(iter(values), None)) from None
    for name, value in vars(chosen).items():
        needed = "token_timestamps" if name == "max_len" and not chosen.split_on_word else "word_timestamps"
        if value and not getattr(options.longform, needed):
            raise bad_request(f"{name}={value} needs {needed}=true", name)
    return values


_SCHEMAS: dict[str, dict[str, Any]] = {"number": {"type": "number"}, "flag": {"type": "boolean"}}
_SCHEMAS |= {"count": {"type": "integer", "minimum": 0}, "some": {"type": "integer", "minimum": 1}}
_SCHEMAS |= {"whole": {"type": "integer"}}


def schema(field: Field) -> dict[str, Any]:
    """Of OpenAPI, for the documentation at /docs."""
    kind, default = field.kind.removesuffix(" or none"), field.option.default
    of_value = dict(_SCHEMAS.get(kind, {"type": "string"}))
    if choices := KINDS[field.kind].get("choices"):
        of_value["enum"] = choices
    if field.name == "temperature":
        return {"type": "string", "description": explanation(field.option), "example": "0"}
    if field.name.startswith(_VAD) and field.name != "vad_filter" and isinstance(default, float) and default > 1e9:
        default = None
    plain = default is not None and isinstance(default, str | int | float)
    return {**of_value, "description": explanation(field.option), **({"default": default} if plain else {})}
