"""Makes the demo model's vocabulary: byte-level BPE of its sentences, then Whisper's special tokens in Whisper's order.

python examples/train_demo/make_tokenizer.py data/demo/sentences.txt data/demo/tokenizer
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from whisper_nnx import LANGUAGES

TEXT_TOKENS = 1000
RELEASED_LANGUAGES = 99  # large-v3 added a hundredth, Cantonese


def special_names() -> list[str]:
    """Returns Whisper's special tokens in id order, without timestamps."""
    languages = [f"<|{code}|>" for code in list(LANGUAGES)[:RELEASED_LANGUAGES]]
    tasks = ["translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps"]
    return ["<|endoftext|>", "<|startoftranscript|>", *languages, *(f"<|{name}|>" for name in tasks)]


def make_tokenizer(sentences: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TEXT_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((" " + sentence for sentence in sentences), trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special_names()])
    times = [AddedToken(f"<|{step * 0.02:.2f}|>", special=False, normalized=False) for step in range(1501)]
    tokenizer.add_tokens(times)
    return tokenizer


def main(sentences: str, folder: str) -> None:
    tokenizer = make_tokenizer(Path(sentences).read_text(encoding="utf-8").splitlines())
    Path(folder).mkdir(parents=True, exist_ok=True)
    tokenizer.save(f"{folder}/tokenizer.json", pretty=False)
    eot = "<|endoftext|>"
    names = {
        "tokenizer_class": "WhisperTokenizer",
        "unk_token": eot,
        "bos_token": eot,
        "eos_token": eot,
        "pad_token": eot,
    }
    Path(folder, "tokenizer_config.json").write_text(json.dumps(names) + "\n", encoding="utf-8")
    print(f"{folder}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main(*sys.argv[1:])
