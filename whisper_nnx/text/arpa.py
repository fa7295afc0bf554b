"""Reads n-grams over words or over a tokenizer's tokens from an ARPA file, as KenLM and SRILM write them."""

from __future__ import annotations

import gzip
import os
import re
import stat
import zlib
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from whisper_nnx.text.vocabulary import BYTE_OF

if TYPE_CHECKING:
    import numpy as np

    from whisper_nnx.text.tokenizer import Tokenizer

MOST_NGRAMS = 20_000_000
LONGEST_NGRAM = 8
UNKNOWN, START, END = b"<unk>", b"<s>", b"</s>"
_SINGLE_BYTES = (
    94  # the first ids, which are ASCII characters: a file with no others is one over words that are numbers
)
_SPACED_PART = 3  # of all tokens of a text, more than the third begin with a space
_LARGEST_BACKOFF = 20.0  # natural logarithm
_OTHER_UNKNOWN = (b"<UNK>",)  # as KenLM
_LONGEST_LINE = 1 << 16  # bytes
_COUNT = re.compile(rb"ngram\s+(\d{1,2})\s*=\s*(\d{1,18})")
_LETTER_OF = {byte: chr(letter) for letter, byte in BYTE_OF.items()}
_SPACES = ("Ġ".encode(), "▁".encode())  # how tokens are written that begin with a space


class Ngrams(NamedTuple):
    """The N n-grams of one length.

    ids [N,n]: tokens or words, or what `read_arpa` has for <unk> and <s>. logprob [N], backoff [N]: natural logarithms.
    """

    ids: np.ndarray
    logprob: np.ndarray
    backoff: np.ndarray


class Arpa(NamedTuple):
    """The n-grams of each length, from 1 up, except those with </s>, and the words that their ids stand for.

    words: None where ids are tokens. <unk> has the id after the last word, or `tokenizer.vocab_size`; <s> the next one.
    """

    ngrams: list[Ngrams]
    words: list[str] | None


def read_arpa(path: str | os.PathLike[str], tokenizer: Tokenizer) -> Arpa:
    """Reads an ARPA file, which may be compressed (.gz).

    What the file has as words may be words, token ids in decimal, or tokens as vocab.json writes them.

    Raises:
      ValueError: not an ARPA file, a damaged one, or one over tokens that are not the tokenizer's text tokens.
      OSError: it cannot be read.
    """
    file = Path(path)
    if not stat.S_ISREG(file.stat().st_mode):
        raise ValueError(f"{file} is not a regular file; give an ARPA file")
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
        reader = _Reader(stream, tokenizer)
        try:
            return reader.read()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{file} is damaged: {error}; copy it again") from None
        except _Problem as problem:
            raise ValueError(f"{file}{problem}") from None


class _Problem(Exception):
    pass


class _Reader:
    def __init__(self, stream: Any, tokenizer: Tokenizer):
        self._stream: BinaryIO = stream
        self._tokenizer, self._line = tokenizer, 0
        self._ids: dict[bytes, int] = {}
        self._words: list[str] | None = None

    def read(self) -> Arpa:
        counts = self._counts()
        found = []
        for n, count in enumerate(counts, start=1):
            self._expect(b"\\%d-grams:" % n)
            found.append(self._section(n, count, last=n == len(counts)))
        self._expect(b"\\end\\")
        return Arpa(found, self._words)

    def _next(self) -> bytes:
        """The next line without spaces around it; b"" for an empty one."""
        line = self._stream.readline(_LONGEST_LINE)
        self._line += 1
        if not line:
            raise _Problem(f" ends after line {self._line - 1}, before \\end\\; it is truncated, copy it again")
        return line.strip()

    def _fault(self, what: str) -> _Problem:
        return _Problem(f", line {self._line}: {what}")

    def _expect(self, heading: bytes) -> None:
        while not (line := self._next()):
            pass
        if line != heading:
            raise self._fault(f"{_shown(line)} in place of {_shown(heading)}; the counts do not match the n-grams")

    def _counts(self) -> list[int]:
        """How many n-grams of each length the head of the file states."""
        first = self._stream.readline(_LONGEST_LINE)
        self._line = 1
        if first.startswith(b"mmap lm"):
            raise _Problem(" is KenLM's binary format; give the ARPA file that it was made from")
        while first.strip() != b"\\data\\":
            first = self._stream.readline(_LONGEST_LINE)
            self._line += 1
            if not first or self._line > 1000:
                raise _Problem(" is not an ARPA file: it has no line \\data\\; KenLM's lmplz writes ARPA files")
        counts: list[int] = []
        while line := self._next():
            match = _COUNT.fullmatch(line)
            if not match or int(match[1]) != len(counts) + 1:
                raise self._fault(f"{_shown(line)} in place of 'ngram {len(counts) + 1}=COUNT'")
            counts.append(int(match[2]))
        if not counts or sum(counts) > MOST_NGRAMS or len(counts) > LONGEST_NGRAM:
            raise self._fault(
                f"{sum(counts)} n-grams of up to {len(counts)} tokens; at most {MOST_NGRAMS} of up to {LONGEST_NGRAM} "
                "are read (lmplz --prune and -o make fewer)"
            )
        return counts

    def _section(self, n: int, count: int, last: bool) -> Ngrams:
        import numpy as np

        ids, numbers = array("i"), array("f")
        words: list[bytes] = []
        for _ in range(count):
            fields = self._next().split()
            if not fields or fields[0].startswith(b"\\"):
                raise self._fault(f"there are fewer than {count} {n}-grams; the counts do not match the n-grams")
            if not n + 1 <= len(fields) <= n + 2 - last:
                raise self._fault(f"{_shown(b' '.join(fields))} is not a {n}-gram with its logarithms")
            try:
                numbers.append(float(fields[0]))
                numbers.append(float(fields[n + 1]) if len(fields) > n + 1 else 0.0)
            except ValueError:
                raise self._fault(f"{_shown(b' '.join(fields))} has something else than numbers around it") from None
            own = fields[1 : n + 1]
            if n == 1:
                words += own
            else:
                try:
                    ids.extend([self._ids[word] for word in own])
                except KeyError as error:
                    raise self._fault(f"{_shown(error.args[0])} is not among the 1-grams") from None
        if n == 1:
            self._ids = self._ids_of(words)
            ids.extend([self._ids[word] for word in words])
        logs = np.asarray(numbers, np.float32).reshape(-1, 2) * np.float32(np.log(10))
        if not np.isfinite(logs).all() or (logs > [0, _LARGEST_BACKOFF]).any():
            raise _Problem(
                f": a {n}-gram before line {self._line} has a logarithm above 0 or not finite, or an absurd backoff "
                "weight; the file may be corrupt"
            )
        rows = np.asarray(ids, np.int32).reshape(-1, n)
        kept = (rows >= 0).all(axis=1)
        return Ngrams(rows[kept], logs[kept, 0], logs[kept, 1])

    def _ids_of(self, words: Sequence[bytes]) -> dict[bytes, int]:
        """Word -> id; -1 for </s>."""
        if len(set(words)) < len(words):
            raise _Problem(": a 1-gram occurs twice")
        special = {START, END, UNKNOWN, *_OTHER_UNKNOWN}
        own = [word for word in words if word not in special]
        known, size = self._tokens(own), self._tokenizer.vocab_size
        if known is None:
            known, size = {word: i for i, word in enumerate(own)}, len(own)
            try:
                self._words = [word.decode() for word in own]
            except UnicodeDecodeError as error:
                raise _Problem(f": {_shown(error.object)} is not UTF-8; convert the file, such as with iconv") from None
        ends = dict.fromkeys([UNKNOWN, *_OTHER_UNKNOWN], size) | {START: size + 1, END: -1}
        return {word: ends[word] if word in special else known[word] for word in words}

    def _tokens(self, words: Sequence[bytes]) -> Mapping[bytes, int] | None:
        """The ids of a model's tokens; None for a model of words."""
        text = self._tokenizer.text_tokens(range(self._tokenizer.vocab_size))
        if words and all(word.isdigit() for word in words) and max(map(int, words)) >= _SINGLE_BYTES:
            known = {str(i).encode(): i for i in text}
        else:
            known = _by_name(text, self._tokenizer)
            spaced = sum(word.startswith(_SPACES) for word in words)
            foreign = sum(not word.isascii() for word in words)  # bytes of scripts without spaces
            are_tokens = known.keys() >= set(words) and (spaced or 2 * foreign > len(words))
            if not are_tokens and _SPACED_PART * spaced <= len(words):  # Maltese words may begin with Ġ
                return None
        if unknown := next((word for word in words if word not in known), None):
            raise _Problem(f": {_shown(unknown)} is not a text token of this model; its text needs this tokenizer")
        return known


def _by_name(text: Sequence[int], tokenizer: Tokenizer) -> dict[bytes, int]:
    """Tokens as vocab.json writes them -> ids."""
    pieces = tokenizer.token_bytes(text)
    return {"".join(map(_LETTER_OF.__getitem__, piece)).encode(): i for i, piece in zip(text, pieces, strict=True)}


def _shown(line: bytes) -> str:
    text = line[:60].decode("utf-8", "replace")
    return repr(text + "..." if len(line) > 60 else text)
