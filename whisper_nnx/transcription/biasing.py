"""From the phrases of `DecodingOptions.bias` to the trie of their tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

from whisper_nnx.decoding.bias import Trie
from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.decoding.phrases import BiasPhrase
from whisper_nnx.text.tokenizer import Tokenizer

# Letters of scripts without spaces between words: Thai, Lao, Burmese, Khmer, kana and Han.
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")


def trie_of(tokenizer: Tokenizer, options: DecodingOptions) -> Trie | None:
    """The trie of what these options prefer; None: nothing. Raises ValueError for too many phrases."""
    return _trie(tokenizer, options.bias, options.bias_weight) if options.bias else None


@lru_cache(maxsize=16)  # of a server's requests; up to 5 MB each
def _trie(tokenizer: Tokenizer, phrases: tuple[BiasPhrase, ...], weight: float) -> Trie:
    return Trie.from_phrases(
        (tokenizer.encode(text), phrase.weight or weight) for phrase in phrases for text in _spellings(phrase)
    )


def _spellings(phrase: BiasPhrase) -> Iterator[str]:
    """How a phrase and its variants may appear in a text: as given, and with a capital first letter."""
    for text in dict.fromkeys((phrase.text, *phrase.variants)):
        yield f" {text}"
        if text[0].islower():
            yield f" {text[0].upper()}{text[1:]}"
        if _UNSPACED.match(text):
            yield text
