"""How words are written in tokens, for language models over words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from whisper_nnx.text.tokenizer import Tokenizer

LONGEST_WORD = 32  # tokens


class Spelling(NamedTuple):
    """A way to write a word: the tokens of the word after a space, and its index."""

    tokens: tuple[int, ...]
    word: int


def spell(words: Sequence[str], tokenizer: Tokenizer) -> list[Spelling]:
    """All spellings, in ascending order, without words that are too long or that the tokenizer cannot write.

    Where all words are in lower case, or all in capitals, each is in lower case and with a capital first letter. For
    this, what is in brackets, such as <SIL>, does not count.
    """
    letters = [letter for word in words if word[:1] not in "<[" for letter in word if len(letter.upper()) == 1]
    one_case = not any(map(str.isupper, letters)) or not any(map(str.islower, letters))
    found: dict[tuple[int, ...], int] = {}
    for i, word in enumerate(words):
        for text in (word.lower(), word.capitalize()) if one_case else (word,):
            tokens = tuple(tokenizer.encode(f" {text}"))
            if len(tokens) <= LONGEST_WORD and b"".join(tokenizer.token_bytes(tokens)) == f" {text}".encode():
                found.setdefault(tokens, i)
    return [Spelling(*one) for one in sorted(found.items())]


class TokenKinds(NamedTuple):
    """What tokens are beside words.

    Attributes:
      spaced: [V], whether the token begins with a space, and so with a word.
      mark: [V], whether it has no letters and is no number after a space: punctuation, digits that continue a number,
        parts of characters, special tokens.
      begin: [V], the token with a space before it, where there is one; else itself.
    """

    spaced: np.ndarray
    mark: np.ndarray
    begin: np.ndarray

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenKinds:
        size = tokenizer.vocab_size
        spaced, mark, begin = np.zeros(size, bool), np.ones(size, bool), np.arange(size, dtype=np.int32)
        text = tokenizer.text_tokens(range(size))
        pieces = tokenizer.token_bytes(text)
        ids = dict(zip(pieces, text, strict=True))
        for i, piece in zip(text, pieces, strict=True):
            spaced[i] = piece.startswith(b" ")
            mark[i] = not any(map(str.isalnum if spaced[i] else str.isalpha, piece.decode(errors="ignore")))
            begin[i] = i if spaced[i] else ids.get(b" " + piece, i)
        return cls(spaced, mark, begin)
