"""Measures what a grammar costs for each token, at several batch sizes.

    python benchmarks/grammar.py CHECKPOINT --result benchmarks/results/NAME.grammar_cost.json

Windows of noise that never end, so that all take the same number of tokens: the difference between long and short ones,
divided by their tokens, without a grammar, with a small one (any text), a large one (a thousand states) and one that is
parsed on the host (lists of lists).
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import whisper_nnx
from benchmarks.scoring import write_result
from whisper_nnx import DecodingOptions, load_model
from whisper_nnx.transcription.attempts import Attempt
from whisper_nnx.transcription.windows import encode_windows, generate_windows, tokenizer_of

SHORT = 8  # tokens


def large_pattern() -> str:
    """Words of random letters in any order: about a thousand states."""
    letters = random.Random(0)
    words = ["".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(250)]
    return f"({'|'.join(words)})( ({'|'.join(words)}))*"


GRAMMARS: dict[str, dict[str, Any]] = {
    "none": {},
    "small": {"regex": ".*"},
    "large": {"regex": large_pattern()},
    "on the host": {"grammar": r'root ::= "[" (root | [^\[\]])* "]"'},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="in any format")
    parser.add_argument("--result", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--batch_sizes", type=int, nargs="*", default=[1, 20])
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5, help="of which the fastest counts")
    args = parser.parse_args()
    model = load_model(str(args.checkpoint))
    found = measure(model, args.batch_sizes, args.tokens, args.repeats)
    versions = {"whisper_nnx": f"{whisper_nnx.__version__}, jax {jax.__version__}"}
    write_result(args.result, args.checkpoint.name, versions, cost_ms=found)


def measure(model: Any, batch_sizes: Sequence[int], tokens: int, repeats: int) -> dict[str, float]:
    """Milliseconds of a step of all rows, by the number of rows and the grammar."""
    config, tokenizer, found = model.config, tokenizer_of(model), {}
    for size in batch_sizes:
        mel = np.random.default_rng(0).normal(size=(1, config.num_mel_bins, 2 * config.max_source_positions))
        one = encode_windows(model, jax.numpy.asarray(mel, jax.numpy.float32))
        encoded = jax.tree.map(lambda x: jax.numpy.repeat(x, size, axis=0), one)  # noqa: B023
        works: dict[tuple[str, int], Callable[[], Any]] = {}
        sizes = {}
        for name, grammar in GRAMMARS.items():
            for length in (SHORT, tokens):
                options = DecodingOptions(
                    language="en", suppress_tokens=(tokenizer.special.eot,), sample_len=length,
                    without_timestamps=True, **grammar,
                )  # fmt: skip
                attempt = Attempt.of(config, tokenizer, options)
                sizes[name] = attempt.grammar_program
                works[name, length] = lambda attempt=attempt: generate_windows(model, encoded, [attempt] * size)  # noqa: B023
        seconds = fastest(works, repeats)
        each = {name: (seconds[name, tokens] - seconds[name, SHORT]) / (tokens - SHORT) for name in sizes}
        for name, table in sizes.items():
            about = f"{name} ({' x '.join(map(str, table))} states x classes)" if len(table) == 2 else name
            found[f"{size} rows, {about}"] = round(1000 * each[name], 3)
            print(f"{size} rows, {about}: {1000 * each[name]:.2f} ms", file=sys.stderr, flush=True)
    return found


def fastest(works: dict[Any, Callable[[], Any]], repeats: int) -> dict[Any, float]:
    """Seconds of each, taken in turns."""
    seconds = dict.fromkeys(works, float("inf"))
    for work in works.values():
        jax.block_until_ready(work())  # compiles
    for _ in range(repeats):
        for name, work in works.items():
            start = time.perf_counter()
            jax.block_until_ready(work())
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
