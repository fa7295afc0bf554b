"""Tokenizers of formats that list their tokens by id, but neither merges nor which tokens are special.

Where ids are in the order of the merges, as in all released vocabularies, nothing is lost by that: the merge that makes
a token is what the earlier merges leave of its bytes, and so the released merges.txt is found again, line by line. A
vocabulary in another order would cut text otherwise (prompts are concerned, not what is decoded).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weight_loader.folder import CheckpointError
from whisper_nnx.runtime.files import read_regular
from whisper_nnx.text.languages import LANGUAGES
from whisper_nnx.text.tokenizer import Tokenizer
from whisper_nnx.text.vocabulary import BYTE_OF

_CHARACTER_OF = {byte: chr(character) for character, byte in BYTE_OF.items()}
_MULTILINGUAL = 51865  # whisper.cpp takes smaller vocabularies to be English-only
_WITHOUT_LANGUAGES = 51765  # ids of the English-only vocabulary that are no languages; a multilingual one has one more
_MAX_TOKEN = 256  # bytes; in the released vocabularies 128
_MAX_WORK = 40_000_000  # of finding the merges, which grows with the square of a token's length; there 2.3 million
_MAX_FILE = 32 * 2**20  # bytes; the released files have 0.8 million
_TASKS = ("translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps")


def implied_tokens(vocab_size: int) -> dict[str, int]:
    """The tokens behind the text, by name, as whisper.cpp concludes them from the size of the vocabulary alone.

    Raises ValueError for a size that no released vocabulary has.
    """
    multilingual = vocab_size >= _MULTILINGUAL
    n_languages = vocab_size - _WITHOUT_LANGUAGES - multilingual
    if n_languages not in (len(LANGUAGES) - 1, len(LANGUAGES)):
        raise ValueError(f"vocab_size={vocab_size} is none of 51864 to 51866, by which whisper.cpp knows the tokens")
    names = ["endoftext", "startoftranscript", *list(LANGUAGES)[:n_languages], *_TASKS]
    first = 50256 + multilingual
    times = range(vocab_size - first - len(names))
    return {f"<|{name}|>": i for i, name in enumerate([*names, *(f"{step * 0.02:.2f}" for step in times)], first)}


def tokenizer_of(text: Mapping[int, bytes], added: Mapping[str, int], vocab_size: int) -> Tokenizer:
    """text: bytes of the ordinary tokens; added: ids of the others. Raises ValueError where they make no tokenizer."""
    lengths = [len(token) for token in text.values()]
    if max(lengths, default=0) > _MAX_TOKEN or sum(n * n for n in lengths) > _MAX_WORK:
        raise ValueError(f"it has a token of {max(lengths)} bytes, or more long ones than any vocabulary of Whisper's")
    if len(set(text.values())) != len(text):
        raise ValueError("the vocabulary has one token twice")
    letters = {i: "".join(map(_CHARACTER_OF.__getitem__, token)) for i, token in sorted(text.items())}
    merges = [["".join(map(_CHARACTER_OF.__getitem__, part)) for part in parts] for parts in _merges(text)]
    content = {
        "version": "1.0",
        "added_tokens": [_added_token(name, i) for name, i in added.items()],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {token: i for i, token in letters.items()}, "merges": merges},
    }
    end = dict.fromkeys(("unk_token", "bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    files = {
        "tokenizer.json": json.dumps(content, ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps({"tokenizer_class": "WhisperTokenizer", **end}).encode(),
    }
    return Tokenizer.from_files(files, vocab_size)


def tokenizer_from_tiktoken(path: Path, vocab_size: int) -> Tokenizer:
    """A line of such a file, as openai-whisper's assets/multilingual.tiktoken, is a token (base64) and its rank.

    Raises CheckpointError where it is none, or does not fit `vocab_size`.
    """
    try:
        lines = read_regular(path, _MAX_FILE).splitlines()
        tokens = {int(rank): base64.b64decode(token) for token, rank in (line.split() for line in lines if line)}
        return tokenizer_of(tokens, implied_tokens(vocab_size), vocab_size)
    except ValueError as error:
        raise CheckpointError(f"{path} is no .tiktoken file of this model ({error}); take openai-whisper's") from error


def _added_token(name: str, i: int) -> dict[str, Any]:
    timestamp = name[2:3].isdigit()
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": name, **plain, "special": not timestamp}


def _merges(text: Mapping[int, bytes]) -> list[list[bytes]]:
    """The two parts of each token that is made of two, in the order of the ids."""
    ranks = {token: i for i, token in text.items()}
    found = []
    for i, token in sorted(text.items()):
        parts = [token[k : k + 1] for k in range(len(token))]
        while len(parts) > 2:
            pairs = [parts[k] + parts[k + 1] for k in range(len(parts) - 1)]
            k = min(range(len(pairs)), key=lambda k: ranks.get(pairs[k], i))
            if ranks.get(pairs[k], i) >= i:
                break
            parts[k : k + 2] = [pairs[k]]
        if len(parts) == 2:
            found.append(parts)
    return found
