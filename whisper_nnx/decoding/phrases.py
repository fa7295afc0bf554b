"""`BiasPhrase`: words and phrases to prefer, as `DecodingOptions.bias` has them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

MOST_PHRASES = 5000
MOST_VARIANTS = 20  # of a phrase
LONGEST_PHRASE = 200  # characters


class BiasPhrase(NamedTuple):
    """A phrase to prefer; weight: added to the logit of each of its tokens (None: `bias_weight`).

    variants: other spellings to prefer as well; the transcript has the one that was decoded.
    """

    text: str
    weight: float | None = None
    variants: tuple[str, ...] = ()


def parse_phrases(given: Any) -> tuple[BiasPhrase, ...] | None:
    """Phrases from text, or from strings, tuples (phrase, weight, variants) and mappings -> None if there are none.

    Text has phrases separated by commas, or one a line: phrase<TAB>weight<TAB>variant<TAB>variant...

    Raises:
      ValueError: with the value and the remedy.
    """
    if given is None:
        return None
    if isinstance(given, str):
        given = _lines(given)
    elif not isinstance(given, Iterable) or isinstance(given, Mapping | BiasPhrase):
        raise ValueError(f"bias={given!r} must be a list of phrases")
    phrases = tuple(_phrase(one) for one in given)
    if len(phrases) > MOST_PHRASES:
        raise ValueError(f"bias has {len(phrases)} phrases; give at most {MOST_PHRASES}")
    return phrases or None


def _lines(text: str) -> list[Any]:
    if not {"\t", "\n"} & {*text}:
        return [part for part in map(str.strip, text.split(",")) if part]
    lines = [[part.strip() for part in line.split("\t")] for line in text.splitlines() if line.strip()]
    return [(phrase, weight or None, [one for one in more if one]) for phrase, weight, *more in _filled(lines)]


def _filled(lines: list[list[str]]) -> list[list[str]]:
    return [[*parts, ""] if len(parts) == 1 else parts for parts in lines]


def _phrase(given: Any) -> BiasPhrase:
    try:
        if isinstance(given, str):
            made = BiasPhrase(given)
        else:
            made = BiasPhrase(**given) if isinstance(given, Mapping) else BiasPhrase(*given)
        text, weight, variants = made
    except TypeError:
        raise ValueError(f"bias has {given!r}; give a phrase, or a tuple (phrase, weight, variants)") from None
    variants = (variants,) if isinstance(variants, str) else tuple(variants or ())
    if not all(isinstance(one, str) and 0 < len(one.strip()) <= LONGEST_PHRASE for one in (text, *variants)):
        raise ValueError(
            f"bias has {_short(given)}; phrases and variants must be text of 1 to {LONGEST_PHRASE} letters"
        )
    if len(variants) > MOST_VARIANTS:
        raise ValueError(f"bias has {len(variants)} variants of {text!r}; give at most {MOST_VARIANTS}")
    return BiasPhrase(text.strip(), None if weight is None else _weight(weight, text), tuple(map(str.strip, variants)))


def _weight(given: Any, text: str) -> float:
    try:
        weight = float(given)
    except (TypeError, ValueError):
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ValueError(f"bias has the weight {given!r} for {text!r}; give a number above 0, such as 2")
    return weight


def _short(given: Any) -> str:
    text = repr(given)
    return text if len(text) <= 80 else f"{text[:80]}..."
