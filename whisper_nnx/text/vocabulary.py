"""Reads tokens, merges and ids from a tokenizer's files and validates every id."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

_MARKUP = re.compile(r"<\|.*\|>")
_MAX_IDS = 2_000_000  # far above any real vocabulary

# GPT-2's files encode bytes as characters; visible characters encode themselves.
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
BYTE_OF = {byte: byte for byte in _VISIBLE} | {256 + n: byte for n, byte in enumerate(_HIDDEN)}


@dataclass(frozen=True)
class Vocabulary:
    """Contents of the tokenizer files, independent of their format."""

    ranks: dict[bytes, int]  # the 256 bytes, then merged tokens by precedence: tiktoken's input
    ids: list[int | None] | None  # rank -> id, or None if it has no token; None as a whole: ids equal ranks
    text: dict[int, bytes]  # id -> bytes of ordinary tokens
    added: dict[str, tuple[int, bool]]  # text of added tokens -> (id, whether special)


def read_vocabulary(files: Mapping[str, bytes]) -> Vocabulary:
    """Reads tokenizer.json if present, else vocab.json, merges.txt and added_tokens.json.

    Raises FileNotFoundError if files are missing and ValueError if they are damaged.
    """
    if "tokenizer.json" in files:
        with reading_part("tokenizer.json"):
            content = json.loads(files["tokenizer.json"])
            vocab, merges = content["model"]["vocab"], content["model"]["merges"]
            added = {token["content"]: (token["id"], token["special"]) for token in content["added_tokens"]}
            return _vocabulary(vocab, [m.split(" ") if isinstance(m, str) else m for m in merges], added)
    if missing := {"vocab.json", "merges.txt"} - files.keys():
        raise FileNotFoundError(
            f"no tokenizer: {' and '.join(sorted(missing))} missing, and no tokenizer.json; "
            "take them from the checkpoint's original repository"
        )
    with reading_part("tokenizer_config.json"):
        listed = json.loads(files.get("tokenizer_config.json", b"{}")).get("added_tokens_decoder", {})
        added = {token["content"]: (int(i), token.get("special", True)) for i, token in listed.items()}
    with reading_part("added_tokens.json"):
        for text, i in json.loads(files.get("added_tokens.json", b"{}")).items():
            added[text] = (i, added[text][1] if text in added else bool(_MARKUP.fullmatch(text)))
    with reading_part("merges.txt"):
        lines = files["merges.txt"].decode().splitlines()
        merges = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
    with reading_part("vocab.json with merges.txt"):
        return _vocabulary(json.loads(files["vocab.json"]), merges, added)


@contextmanager
def reading_part(name: str) -> Iterator[None]:
    """Converts exceptions caused by a malformed file into a ValueError that names the file."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{name} is damaged or is not Whisper's ({type(error).__name__}: {error}); "
            "take it from the checkpoint's original repository"
        ) from error


def _vocabulary(
    vocab: dict[str, int], merges: Sequence[Sequence[str]], added: dict[str, tuple[int, bool]]
) -> Vocabulary:
    """Builds a Vocabulary; vocab and merges use GPT-2's byte encoding. Raises KeyError or ValueError on mismatch."""
    for name, i in (*vocab.items(), *((name, i) for name, (i, _) in added.items())):
        if type(i) is not int or not 0 <= i < _MAX_IDS:
            raise ValueError(f"the id of {name[:40]!r} is {i!r:.40}, expected a whole number from 0 to {_MAX_IDS - 1}")
    characters = sorted(map(chr, BYTE_OF), key=lambda c: vocab.get(c, len(vocab)))
    merged = [first + second for first, second in merges]
    ids = [*map(vocab.get, characters), *(vocab[token] for token in merged)]
    tokens = [token.translate(BYTE_OF).encode("latin-1") for token in (*characters, *merged)]
    ranks: dict[bytes, int] = {}
    for rank, token in enumerate(tokens):
        ranks.setdefault(token, rank)

    text = {i: token for i, token in zip(ids, tokens, strict=True) if i is not None}
    for name in vocab.keys() - added.keys() - set(characters) - set(merged):
        if _MARKUP.fullmatch(name):
            added[name] = (vocab[name], True)
        else:  # no merge produces it, so it can only be decoded; the released vocabularies have an empty one
            text[vocab[name]] = name.translate(BYTE_OF).encode("latin-1")
    return Vocabulary(ranks, None if ids == list(range(len(ids))) else ids, text, added)
