"""Reconstructs tokenizers from formats that list tokens by id, without merges or special tokens.

If ids are in merge order, as in all released vocabularies, this is lossless: applying the earlier merges to a token's
bytes leaves exactly the two parts that it merges, which reproduces the released merges.txt line by line. Vocabularies
in another order may tokenize text differently (this affects prompts, not decoding).
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
_MULTILINGUAL = 51865  # whisper.cpp considers smaller vocabularies English-only
_WITHOUT_LANGUAGES = 51765  # ids other than languages in the English-only vocabulary; multilingual ones have one more
_MAX_TOKEN = 256  # bytes; the released vocabularies have at most 128
_MAX_WORK = 40_000_000  # sum of squared token lengths; 2.3 million in the released vocabularies
_MAX_FILE = 32 * 2**20  # bytes; the released files have 0.8 million
_TASKS = ("translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps")


def implied_tokens(vocab_size: int) -> dict[str, int]:
    """Returns the special tokens by name, as whisper.cpp infers them from the vocabulary size.

    Raises ValueError for a size that no released vocabulary has.
    """
    multilingual = vocab_size >= _MULTILINGUAL
    n_languages = vocab_size - _WITHOUT_LANGUAGES - multilingual
    if n_languages not in (len(LANGUAGES) - 1, len(LANGUAGES)):
        raise ValueError(f"vocab_size={vocab_size} must be 51864 to 51866, from which whisper.cpp infers the tokens")
    names = ["endoftext", "startoftranscript", *list(LANGUAGES)[:n_languages], *_TASKS]
    first = 50256 + multilingual
    times = range(vocab_size - first - len(names))
    return {f"<|{name}|>": i for i, name in enumerate([*names, *(f"{step * 0.02:.2f}" for step in times)], first)}


def tokenizer_of(text: Mapping[int, bytes], added: Mapping[str, int], vocab_size: int) -> Tokenizer:
    """Makes a tokenizer of ordinary tokens (id -> bytes) and added ones (name -> id). Raises ValueError if invalid."""
    lengths = [len(token) for token in text.values()]
    if max(lengths, default=0) > _MAX_TOKEN or sum(n * n for n in lengths) > _MAX_WORK:
        raise ValueError(f"it has a token of {max(lengths)} bytes, or more long tokens than any Whisper vocabulary")
    if len(set(text.values())) != len(text):
        raise ValueError("the vocabulary contains a token twice")
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
    """Reads a .tiktoken file, such as openai-whisper's assets/multilingual.tiktoken: lines of base64 tokens and ranks.

    Raises CheckpointError if the file is invalid or does not fit `vocab_size`.
    """
    try:
        lines = read_regular(path, _MAX_FILE).splitlines()
        tokens = {int(rank): base64.b64decode(token) for token, rank in (line.split() for line in lines if line)}
        return tokenizer_of(tokens, implied_tokens(vocab_size), vocab_size)
    except ValueError as error:
        raise CheckpointError(f"{path} is not a .tiktoken file of this model ({error}); use OpenAI's") from error


def _added_token(name: str, i: int) -> dict[str, Any]:
    timestamp = name[2:3].isdigit()
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": name, **plain, "special": not timestamp}


def _merges(text: Mapping[int, bytes]) -> list[list[bytes]]:
    """Returns the two parts of each merged token, in id order."""
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
