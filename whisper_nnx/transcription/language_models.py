"""From the path in `DecodingOptions.lm` to the language model in that file."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import lru_cache

from whisper_nnx.decoding.ngram import NgramModel
from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.decoding.word_ngram import WordNgramModel
from whisper_nnx.text.arpa import read_arpa
from whisper_nnx.text.tokenizer import Tokenizer
from whisper_nnx.transcription.options import TranscribeOptions


def with_lm(tokenizer: Tokenizer, options: TranscribeOptions) -> TranscribeOptions:
    """Like `window_with_lm`, of a recording."""
    return replace(options, decoding=window_with_lm(tokenizer, options.decoding))


def window_with_lm(tokenizer: Tokenizer, options: DecodingOptions) -> DecodingOptions:
    """Options with the language model in place of its path.

    A file that has not changed is read once. Raises ValueError or OSError as `read_arpa`.
    """
    if not isinstance(options.lm, str):
        return options
    about = os.stat(options.lm)
    return replace(options, lm=_read(os.path.abspath(options.lm), about.st_mtime_ns, about.st_size, tokenizer))


@lru_cache(maxsize=4)
def _read(path: str, modified_ns: int, size: int, tokenizer: Tokenizer) -> NgramModel | WordNgramModel:
    ngrams, words = read_arpa(path, tokenizer)
    try:
        if words is None:
            return NgramModel.from_ngrams(ngrams, tokenizer.vocab_size)
        return WordNgramModel.from_ngrams(ngrams, words, tokenizer)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
