"""What an n-gram model (`lm`) costs per step of the loop, on a quiet machine.

    python benchmarks/ngram.py CHECKPOINT MANIFEST --result benchmarks/results/NAME.ngram_cost.json

The n-grams are random: all text tokens, and the given numbers of bigrams and trigrams, whose tokens are as frequent as
those of texts (by Zipf's law). What is decoded is the first recording of the manifest.
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from benchmarks import speech
from benchmarks.bias import cost
from benchmarks.scoring import write_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="in any format")
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--result", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--counts", type=int, nargs="*", default=[10_000, 1_000_000], help="of bigrams and trigrams")
    args = parser.parse_args()

    from whisper_nnx import NgramModel, load_model

    model = load_model(str(args.checkpoint))
    recordings = speech.read(args.manifest, {"en"})
    variants: dict[str, Any] = {"none": {}}
    for count in args.counts:
        ngrams = random_ngrams(len(model.tokenizer.text_tokens(range(model.config.vocab_size))), count)
        variants[str(count)] = {"lm": NgramModel.from_ngrams(ngrams, model.config.vocab_size)}
    versions = {"whisper_nnx": f"{version('whisper-nnx')}, jax {version('jax')}"}
    taken = cost(model, recordings[0].audio, variants)
    write_result(args.result, args.checkpoint.name, versions, cost_ms=taken)


def random_ngrams(tokens: int, count: int) -> list[Any]:
    """1-, 2- and 3-grams of the first `tokens` ids; `count` of 2 and of 3 before equal ones are merged."""
    from whisper_nnx.text.arpa import Ngrams

    rng = np.random.default_rng(0)
    ids = (3 * rng.pareto(0.9, (count, 3))).clip(0, tokens - 1).astype(np.int32)
    lengths = [np.arange(tokens, dtype=np.int32)[:, None], np.unique(ids[:, :2], axis=0), np.unique(ids, axis=0)]
    return [Ngrams(some, *-rng.random((2, len(some)), np.float32)) for some in lengths]


if __name__ == "__main__":
    main()
