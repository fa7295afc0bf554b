"""Texts as they are compared: Whisper's normalizers (paper, appendix C), and the words whose errors are counted."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

from whisper_nnx.runtime.packages import require_packages
from whisper_nnx.text.tokenizer import UNSPACED

NORMALIZERS = ("auto", "english", "basic", "none")

# The package whisper-normalizer writes these out too. openai-whisper, with whose figures people compare, does not.
_NOT_OPENAIS = (r"\bkinda\b", r"\bsorta\b", r"\bdunno\b", r"\bcause\b")


def require_normalizers() -> None:
    """Raises ImportError where a package of the extra `evaluate` is missing."""
    require_packages("evaluation", "evaluate", "jiwer", "whisper-normalizer")


def normalize(text: str, language: str | None, normalizer: str = "auto") -> str:
    """The text without what is no error: case, punctuation, fillers, ways to write numbers and to spell.

    normalizer: "english", "basic", "none", or "auto": english for English ("en"), basic for everything else.
    Raises ValueError for another one.
    """
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer={normalizer!r} is unknown; choose {', '.join(NORMALIZERS)}")
    if normalizer == "auto":
        normalizer = "english" if language == "en" else "basic"
    return " ".join((text if normalizer == "none" else _normalizer(normalizer)(text)).split())


def split(text: str, language: str | None, normalizer: str = "auto") -> list[str]:
    """The words of a normalized text; its letters (graphemes) where the language is written without spaces."""
    plain = normalize(text, language, normalizer)
    if language not in UNSPACED:
        return plain.split()
    import regex

    return " ".join(regex.findall(r"\X", plain)).split()


@cache
def _normalizer(name: str) -> Callable[[str], str]:
    require_normalizers()
    with warnings.catch_warnings(action="ignore"):  # of its escapes, where its bytecode is not kept
        from whisper_normalizer.basic import BasicTextNormalizer
        from whisper_normalizer.english import EnglishTextNormalizer

    if name == "basic":
        return BasicTextNormalizer()
    english = EnglishTextNormalizer()
    for pattern in _NOT_OPENAIS:
        english.replacers.pop(pattern, None)
    return english
