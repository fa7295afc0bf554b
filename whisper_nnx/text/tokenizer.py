"""Converts text to token ids and back. All ids, special tokens included, come from the checkpoint's own files."""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whisper_nnx.runtime.files import read_regular
from whisper_nnx.text.languages import LANGUAGES, to_language_code
from whisper_nnx.text.special_tokens import SpecialTokens
from whisper_nnx.text.vocabulary import Vocabulary, read_vocabulary, reading_part

if TYPE_CHECKING:
    import numpy as np
    import tiktoken

FILE_NAMES = (
    *("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "normalizer.json"),
)
_GENERATION_CONFIG = "generation_config.json"
MAX_FILE = 32 * 2**20  # bytes; the released tokenizer.json has 2.5 million
_SPECIAL_NAMES = {  # a second name is that of older files
    "eot": ("<|endoftext|>",),
    "sot": ("<|startoftranscript|>",),
    "transcribe": ("<|transcribe|>",),
    "translate": ("<|translate|>",),
    "sot_lm": ("<|startoflm|>",),
    "sot_prev": ("<|startofprev|>",),
    "no_speech": ("<|nospeech|>", "<|nocaptions|>"),
    "no_timestamps": ("<|notimestamps|>",),
}
_OPTIONAL = {"sot_lm", "no_speech"}
_LANGUAGE = re.compile(r"<\|([a-z]{2,3})\|>")
_TIMESTAMP = re.compile(r"<\|(\d+\.\d\d)\|>")
_TIMESTAMPS = 1501  # 0 to 30 s in steps of 20 ms, for older files, which do not list timestamps
_ENGLISH_EOT, _ENGLISH_VOCAB_SIZE = 50256, 51864  # the released .en vocabulary, which has language tokens too

# GPT-2's pre-tokenization pattern, in tiktoken's notation.
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

# Marks of non-speech annotations (music, speaker names, noises) that openai-whisper suppresses.
_MARKS = [
    *'"#()*+/:;<=>@[\\]^_`{|}~「」『』',
    *"<< >> <<< >>> -- --- -( -[ (' (\" (( )) ((( ))) [[ ]] {{ }} ♪♪ ♪♪♪".split(),  # noqa: SIM905
]
_NOTES = "♩♪♫♬♭♮♯"
UNSPACED = {"zh", "ja", "th", "lo", "my", "yue"}  # written without spaces between words


class Tokenizer:
    """Tokenizer of one checkpoint; two compare equal, with equal hash, if their files and `vocab_size` are equal.

    files: contents of the tokenizer's files by name: tokenizer.json, or else vocab.json, merges.txt and
    added_tokens.json. generation_config.json, if given, states whether the model is multilingual. vocab_size: the
    model's, which may include ids without a token; by default up to the last token.
    Raises FileNotFoundError if files are missing and ValueError if they are damaged or belong to another model.
    """

    def __init__(self, files: Mapping[str, bytes], vocab_size: int | None = None):
        self.files = {name: files[name] for name in FILE_NAMES if name in files}
        self.vocabulary = vocabulary = read_vocabulary(files)
        self.special = special = _special_tokens(vocabulary, vocab_size)

        times = range(special.timestamp_begin, special.timestamp_end + 1)
        named = {i: f"<|{step * 0.02:.2f}|>" for step, i in enumerate(times)}
        named |= {i: text for text, (i, _) in vocabulary.added.items()}
        pieces = vocabulary.text | {i: text.encode() for i, text in named.items()}
        self.vocab_size = vocab_size or max(pieces) + 1
        self._bytes = {i: piece for i, piece in pieces.items() if i < self.vocab_size}

        functional = {*times, *_functional_ids(special)}
        ordinary = {text: i for text, (i, is_special) in vocabulary.added.items() if not is_special}
        self._words = {text: i for text, i in ordinary.items() if i in self._bytes and i not in functional}
        self._text = vocabulary.text.keys() | self._words.values()
        self.is_multilingual = _is_multilingual(files, special, self.vocab_size)

        digest = hashlib.blake2b(f"{self.vocab_size} {self.is_multilingual}".encode(), digest_size=16)
        for name, data in self.files.items():
            digest.update(f" {name} {len(data)} ".encode())
            digest.update(data)
        self._digest = digest.digest()

    @classmethod
    def from_folder(cls, path: str | Path, vocab_size: int | None = None) -> Tokenizer:
        """Reads the tokenizer files in a checkpoint's folder."""
        folder = Path(path)
        present = [name for name in (*FILE_NAMES, _GENERATION_CONFIG) if (folder / name).exists()]
        files = {name: read_regular(folder / name, MAX_FILE) for name in present}
        try:
            return cls(files, vocab_size)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"{folder}: {error}") from error

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], vocab_size: int | None = None) -> Tokenizer:
        """Builds a tokenizer from file contents by name."""
        return cls(files, vocab_size)

    @property
    def digest(self) -> str:
        """Identifies its files and `vocab_size`."""
        return self._digest.hex()

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Tokenizer) and self._digest == other._digest)

    def __hash__(self) -> int:
        return hash(self._digest)

    def __repr__(self) -> str:
        languages = f"languages={len(self.languages)}" if self.is_multilingual else "English only"
        return f"Tokenizer(vocab_size={self.vocab_size}, {languages})"

    @cached_property
    def _encoding(self) -> tiktoken.Encoding:
        import tiktoken

        return tiktoken.Encoding("whisper", pat_str=_PATTERN, mergeable_ranks=self.vocabulary.ranks, special_tokens={})

    @cached_property
    def _added_word(self) -> re.Pattern[str] | None:
        longest_first = sorted(self._words, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None

    def encode(self, text: str) -> list[int]:
        """Encodes text. Names of special tokens are encoded as text; each word added by a fine-tune is one id.

        Bytes without a token in a small vocabulary are dropped, as in transformers.
        """
        if self._added_word is None:
            return self._encode_bytes(text)
        parts = self._added_word.split(text)  # added words are at odd indices
        ids = [[self._words[part]] if i % 2 else self._encode_bytes(part) for i, part in enumerate(parts)]
        return [i for part in ids for i in part]

    def _encode_bytes(self, text: str) -> list[int]:
        ranks, ids = self._encoding.encode_ordinary(text), self.vocabulary.ids
        return ranks if ids is None else [i for i in map(ids.__getitem__, ranks) if i is not None]

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids, without timestamps; special tokens appear by name, and invalid UTF-8 becomes U+FFFD.

        Raises ValueError for an id that has no token.
        """
        return self.decode_with_timestamps(i for i in ids if not self.is_timestamp(i))

    def decode_with_timestamps(self, ids: Iterable[int]) -> str:
        """Like `decode`, with timestamps as <|1.08|> (s)."""
        return _text(b"".join(self.token_bytes(ids)))

    def token_bytes(self, ids: Iterable[int]) -> list[bytes]:
        """Returns each token's bytes, special tokens by name. Raises ValueError for an id that has no token."""
        try:
            return [self._bytes[i] for i in ids]
        except KeyError as error:
            raise ValueError(f"id {error.args[0]} has no token; use the tokenizer of the model that made it") from None

    def is_timestamp(self, token: int) -> bool:
        """Whether an id is a timestamp; tokens that a fine-tune added after the timestamps are not."""
        return self.special.timestamp_begin <= token <= self.special.timestamp_end

    def text_tokens(self, ids: Iterable[int]) -> list[int]:
        """Keeps text tokens: drops timestamps and other special tokens."""
        return [i for i in ids if i in self._text]

    @cached_property
    def known_ids(self) -> np.ndarray:
        """Mask [V], bool, of the ids that have a token; the others must never be sampled."""
        import numpy as np

        known = np.zeros(self.vocab_size, bool)
        known[list(self._bytes)] = True
        return known

    @property
    def languages(self) -> tuple[str, ...]:
        """Codes of the languages that have a token, in token order."""
        return tuple(code for code, _ in self.special.languages)

    def language_token(self, language: str) -> int:
        """Returns the id of a language code or English name; ValueError if Whisper or this checkpoint lacks it."""
        ids = dict(self.special.languages)
        code = language if language in ids else to_language_code(language)
        if code not in ids:
            some = f"{len(ids)} languages" if len(ids) > 9 else ", ".join(ids) or "no language"
            raise ValueError(f"language {language!r} is not in this checkpoint, which has {some}; use another one")
        return ids[code]

    def sot_sequence(
        self, language: str | None = None, task: str | None = None, timestamps: bool = True
    ) -> tuple[int, ...]:
        """Returns the start-of-transcript tokens of a language and task.

        Args:
          language: code or English name, by default en. English-only models have no language and task tokens.
          task: "transcribe", the default, or "translate".
          timestamps: False appends no_timestamps.

        Raises:
          ValueError: the checkpoint does not support the language or task.
        """
        special = self.special
        tasks = {"transcribe": special.transcribe, "translate": special.translate}
        if task is not None and task not in tasks:
            raise ValueError(f"task {task!r} is unknown; choose 'transcribe' or 'translate'")
        start: tuple[int, ...] = (special.sot,)
        if self.is_multilingual:
            start += (self.language_token(language or "en"), tasks[task or "transcribe"])
        elif task == "translate" or to_language_code(language or "en") != "en":
            given = f"language={language!r}, task={task!r}"
            raise ValueError(f"{given}: this checkpoint only transcribes English; use a multilingual one")
        return start if timestamps else (*start, special.no_timestamps)

    @cached_property
    def blank_tokens(self) -> tuple[int, ...]:
        """Ids of a lone space, suppressed at the start of a transcript."""
        return tuple(self.encode(" "))

    @cached_property
    def non_speech_tokens(self) -> tuple[int, ...]:
        """Ids of non-speech annotations, such as ♪ or [, in ascending order; openai-whisper's set.

        A mark is included only if it is a single token. A note's first token is also included if it is only the first
        two of its three bytes: symbols start with these bytes, letters and punctuation do not.
        """
        texts = [" -", " '", *(space + mark for mark in _MARKS for space in ("", " "))]
        encoded = [self.encode(text) for text in texts]
        suppressed = {ids[0] for ids in encoded if len(ids) == 1}
        for note in _NOTES:
            firsts = self.encode(note)[:1] + self.encode(" " + note)[:1]
            suppressed.update(i for i in firsts if self._bytes[i].lstrip().startswith(note.encode()[:2]))
        return tuple(sorted(suppressed))

    def split_to_word_tokens(self, ids: Sequence[int], language: str | None) -> tuple[list[str], list[list[int]]]:
        """Splits into (words, ids of each): at spaces, or at characters for languages written without spaces."""
        split = self.split_tokens_on_unicode if language in UNSPACED else self.split_tokens_on_spaces
        return split(ids)

    def split_tokens_on_unicode(self, ids: Sequence[int]) -> tuple[list[str], list[list[int]]]:
        """Splits into (pieces of text, ids of each), the shortest pieces that split no character.

        The pieces join to the whole text, invalid UTF-8 included (where openai-whisper loses tokens or fails).
        """
        pieces = self.token_bytes(ids)
        raw, start, end = b"".join(pieces), 0, 0
        words: list[str] = []
        tokens: list[list[int]] = [[]]
        for token, piece in zip(ids, pieces, strict=True):
            end += len(piece)
            tokens[-1].append(token)
            # A split character decodes to two or more U+FFFD. None extends more than 3 bytes ahead.
            word, ahead = _text(raw[start:end]), _text(raw[end : end + 3])
            if word + ahead == _text(raw[start : end + 3]):
                words.append(word)
                tokens.append([])
                start = end
        return words, tokens[:-1]

    def split_tokens_on_spaces(self, ids: Sequence[int]) -> tuple[list[str], list[list[int]]]:
        """Splits into (words, ids of each); a word starts with a space, punctuation or a special token."""
        words: list[str] = []
        tokens: list[list[int]] = []
        for piece, piece_ids in zip(*self.split_tokens_on_unicode(ids), strict=True):
            mark = piece.strip() in string.punctuation
            if not words or mark or piece.startswith(" ") or piece_ids[0] not in self._text:
                words.append(piece)
                tokens.append(piece_ids)
            else:
                words[-1] += piece
                tokens[-1] += piece_ids
        return words, tokens


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", errors="replace")


def _special_tokens(vocabulary: Vocabulary, vocab_size: int | None) -> SpecialTokens:
    ids = {text: i for text, (i, _) in vocabulary.added.items()}
    found: dict[str, Any] = {
        field: next((ids[name] for name in names if name in ids), None) for field, names in _SPECIAL_NAMES.items()
    }
    if missing := [_SPECIAL_NAMES[field][0] for field, i in found.items() if i is None and field not in _OPTIONAL]:
        raise ValueError(
            f"the tokenizer's files lack {', '.join(missing)}, so they are not Whisper's; "
            "take them from the checkpoint's original repository"
        )
    # A code unknown to Whisper is a language if its id is among the languages' ids.
    place = range(found["sot"], min(found["transcribe"], found["translate"]))
    codes = {match[1]: i for text, i in ids.items() if (match := _LANGUAGE.fullmatch(text))}
    languages = sorted((i, code) for code, i in codes.items() if code in LANGUAGES or i in place)
    times = _timestamps(ids, {*ids.values(), *vocabulary.text}, found["no_timestamps"], vocab_size)
    special = SpecialTokens(
        **found,
        timestamp_begin=times.start,
        timestamp_end=times.stop - 1,
        languages=tuple((code, i) for i, code in languages),
    )
    _check_distinct(special, vocabulary)
    last = max({*vocabulary.text, *_functional_ids(special), *times})
    if vocab_size is not None and last >= vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {last}, but the model has vocab_size={vocab_size}; "
            "take both from the same checkpoint"
        )
    return special


def _check_distinct(special: SpecialTokens, vocabulary: Vocabulary) -> None:
    """Raises ValueError if two special tokens, or a special token and a text token, share an id."""
    names = {f"<|{code}|>": i for code, i in special.languages}
    names |= {_SPECIAL_NAMES[field][0]: i for field in _SPECIAL_NAMES if (i := getattr(special, field)) is not None}
    owners: dict[int, str] = {}
    for name, i in names.items():
        other = owners.setdefault(i, name)
        if special.timestamp_begin <= i <= special.timestamp_end:
            other = "a timestamp"
        elif i in vocabulary.text:
            other = f"the text {_text(vocabulary.text[i])!r}"
        if other != name:
            raise ValueError(
                f"{name} and {other} have the same id, {i}; take the tokenizer's files from the checkpoint's original "
                "repository"
            )


def _timestamps(ids: Mapping[str, int], taken: Iterable[int], no_timestamps: int, vocab_size: int | None) -> range:
    times = sorted((float(match[1]), i) for text, i in ids.items() if (match := _TIMESTAMP.fullmatch(text)))
    if not times:  # they follow <|notimestamps|>, up to the first token that a fine-tune may have added there
        begin = no_timestamps + 1
        if instead := [text for text, i in ids.items() if i == begin]:
            raise ValueError(
                f"the tokenizer's files list no timestamps, and {instead[0]!r} has the id of <|0.00|>, {begin}: "
                "which of the two the model uses is unknown; give files that list the timestamps, with added tokens "
                "after them"
            )
        limits = [begin + _TIMESTAMPS, *(i for i in taken if i >= begin)]
        return range(begin, min(limits if vocab_size is None else [*limits, max(begin, vocab_size)]))
    listed = [i for _, i in times]
    if times[0][0] != 0 or listed != list(range(listed[0], listed[0] + len(listed))):
        raise ValueError(
            f"the timestamp ids, {times[0][0]:.2f} to {times[-1][0]:.2f} s, are not consecutive from <|0.00|> on; "
            "take the tokenizer's files from the checkpoint's original repository"
        )
    return range(listed[0], listed[-1] + 1)


def _functional_ids(special: SpecialTokens) -> set[int]:
    """Returns all special token ids except timestamps."""
    named = {getattr(special, field) for field in _SPECIAL_NAMES} - {None}
    return named | {i for _, i in special.languages}


def _is_multilingual(files: Mapping[str, bytes], special: SpecialTokens, vocab_size: int) -> bool:
    with reading_part(_GENERATION_CONFIG):
        stated = json.loads(files.get(_GENERATION_CONFIG, b"{}")).get("is_multilingual")
    english = special.eot == _ENGLISH_EOT or vocab_size == _ENGLISH_VOCAB_SIZE
    return stated if isinstance(stated, bool) else bool(special.languages) and not english
