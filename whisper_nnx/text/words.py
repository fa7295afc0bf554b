"""Splits text into words, separates trailing punctuation and normalizes words for comparison."""

from __future__ import annotations

import unicodedata
from typing import NamedTuple

from whisper_nnx.text.tokenizer import UNSPACED, Tokenizer

_SENTENCE_ENDS = ".?!…。？！"


class TextWord(NamedTuple):
    """A word as written, with its leading space, and whether it is the last of its line."""

    text: str
    ends_line: bool = False

    @property
    def ends_sentence(self) -> bool:
        return any(mark in _SENTENCE_ENDS for mark in split_tail(self.text)[1])


def words_of(text: str, tokenizer: Tokenizer, language: str) -> list[TextWord]:
    """Splits text into words. Lone punctuation joins the previous word, or the next one at the start of a line."""
    words: list[TextWord] = []
    for line in text.splitlines():
        pieces = [" " + word for word in line.split()]
        if language in UNSPACED:
            pieces, _ = tokenizer.split_to_word_tokens(tokenizer.encode(line.strip()), language)
        own: list[str] = []
        for piece in pieces:
            if own and not (normalized(piece) and normalized(own[-1])):
                own[-1] += piece
            else:
                own.append(piece)
        words += [TextWord(word, i == len(own)) for i, word in enumerate(own, 1)]
    return words


def normalized(word: str) -> str:
    """Returns a word's letters, marks and numbers, casefolded."""
    plain = unicodedata.normalize("NFKC", word).casefold()
    return "".join(c for c in plain if unicodedata.category(c)[0] in "LMN")


def split_tail(word: str) -> tuple[str, str]:
    """Splits a word into (word, trailing punctuation)."""
    core = next((i for i in range(len(word), 0, -1) if normalized(word[i - 1])), len(word))
    return word[:core], word[core:]
