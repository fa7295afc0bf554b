"""llguidance's parsers of grammars that are not regular, on the host: which tokens may follow a text."""

from __future__ import annotations

import itertools
import warnings
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np

from whisper_nnx.grammar.lark import Lark

MAX_PARSERS = 1024  # grammars of windows that are decoded at the same time
MAX_TEXTS = 2048  # whose parsers are kept
BITS = 32  # of a word of a mask
_numbers = itertools.count(1)


@dataclass(frozen=True, eq=False)
class TokenParser:
    """A grammar over a vocabulary's tokens.

    Attributes:
      shown: how a warning names the grammar.
      matcher: llguidance's, before any text.
      end: the mask [W] of the end of text. others: that of ids that are no text and may stand beside it.
      strict: as in `token_automaton`.
      number: by which the decoding loop names it.
    """

    shown: str
    matcher: Any
    end: np.ndarray
    others: np.ndarray
    strict: bool
    number: int = field(default_factory=lambda: next(_numbers))

    def after(self, text: Sequence[int], before: Any = None) -> Any:
        """The matcher after text tokens, None if they do not match; before: that without the last of them.

        What is too complex for it counts as a match: `mask` warns.
        """
        rest = text if before is None else text[-1:]
        matcher = (before or self.matcher).deep_copy()
        return matcher if matcher.try_consume_tokens(rest) == len(rest) or matcher.is_error() else None

    def mask(self, matcher: Any, *, at_start: bool) -> np.ndarray:
        """The mask [W] of the tokens that may follow."""
        if matcher is None:
            return np.full_like(self.end, 0 if self.strict else ~np.uint32(0))
        text, ends = np.frombuffer(matcher.compute_bitmask(), np.uint32) & ~self.end, matcher.is_accepting()
        if matcher.is_error():
            problem = matcher.get_error().splitlines()[0]
            warnings.warn(f"a text of {self.shown} is cut off; llguidance: {problem}", stacklevel=2)
            return self.end
        if not self.strict or ends:
            return text | self.end | self.others
        return text | self.others if at_start else text


def token_parser(
    grammar: Lark, shown: str, tokenizer: Any, size: int, eot: int, others: Collection[int], *, strict: bool
) -> TokenParser:
    """The parser of a grammar; tokenizer: of `llguidance_tokenizer`, the other arguments as in `token_automaton`."""
    from llguidance import LLMatcher

    matcher = LLMatcher(tokenizer, grammar.text, log_level=0)
    first = matcher.deep_copy()
    first.compute_bitmask()
    if first.get_error().startswith("NoExtensionBias"):
        raise ValueError("cannot be written with the tokens that are not suppressed; suppress fewer")
    if first.is_error():
        raise ValueError(f"cannot be used: {first.get_error().splitlines()[0]}")
    return TokenParser(shown, matcher, _mask([eot], size), _mask(others, size), strict)


def llguidance_tokenizer(text: dict[int, bytes], size: int, eot: int) -> Any:
    """The bytes of text tokens by id, as llguidance takes them; size: of the whole vocabulary."""
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Tokens([text.get(i, b"") for i in range(size)], eot)), slices=[])


@dataclass
class _Tokens:
    """What llguidance asks a tokenizer for."""

    tokens: list[bytes]
    eos_token_id: int
    bos_token_id: int | None = None

    def __call__(self, text: bytes) -> list[int]:
        """The tokens of a text: not asked for without `no_forcing`."""
        raise NotImplementedError


class Parsers:
    """The parsers in use, by number, and where they are after texts."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._parsers, self._texts = OrderedDict[int, TokenParser](), OrderedDict[Any, tuple[Any, np.ndarray]]()

    def use(self, parsers: Sequence[TokenParser]) -> list[int]:
        """Keeps parsers for the windows that are decoded next -> their numbers."""
        with self._lock:
            return [_kept(self._parsers, parser.number, parser, MAX_PARSERS).number for parser in parsers]

    def masks(self, words: int, numbers: Any, tokens: Any, length: Any) -> np.ndarray:
        """Masks [R,words] of what may follow the texts: the first `length` [R] of tokens [R,T], by parsers [R].

        Number 0 is that of an idle row.
        """
        with self._lock:
            rows = zip(np.asarray(numbers).tolist(), np.asarray(tokens), np.asarray(length).tolist(), strict=True)
            nothing = np.zeros(words, np.uint32)
            return np.stack([self._mask(number, row[:n]) if number else nothing for number, row, n in rows])

    def _mask(self, number: int, text: np.ndarray) -> np.ndarray:
        parser, key = self._parsers[number], (number, text.tobytes())
        _kept(self._parsers, number, parser, MAX_PARSERS)
        if key not in self._texts:
            before, _ = self._texts.get((number, text[:-1].tobytes()), (None, None))
            matcher = parser.after(text.tolist(), before)
            self._texts[key] = matcher, parser.mask(matcher, at_start=not len(text))
        _, mask = _kept(self._texts, key, self._texts[key], MAX_TEXTS)
        return mask


def _kept(cache: OrderedDict[Any, Any], key: Any, value: Any, most: int) -> Any:
    """The value, as the latest one of a cache of so many."""
    cache[key] = value
    cache.move_to_end(key)
    if len(cache) > most:
        cache.popitem(last=False)
    return value


def _mask(ids: Collection[int], size: int) -> np.ndarray:
    bits = np.zeros(-(-size // BITS) * BITS, np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)
