"""Writes one checkpoint, released or with random weights of a released shape, in the formats of all systems."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

TOKENS = 100  # per window, with random weights
FIXED = "tokens_per_window"  # file that marks random weights
FILES = {  # format and dtype as weight_loader names them -> file; released checkpoints are stored in float16
    ("hf", "float16"): "huggingface",
    ("openai", "float16"): "openai.pt",
    ("ct2", "float16"): "ctranslate2",
    ("ggml", "float16"): "ggml-f16.bin",
    ("ggml", "q8_0"): "ggml-q8_0.bin",
}


def prepare(
    source: Path, folder: Path, random_shape: str | None = None, only: Collection[str] = FILES.values()
) -> Path:
    """Writes the checkpoint `source` (of any format), or random weights with its vocabulary, into `folder` in the
    formats whose file names are in `only`; keeps existing files."""
    from weight_loader.load import read_content
    from weight_loader.writers import write_checkpoint

    folder.mkdir(parents=True, exist_ok=True)
    if random_shape and not (folder / FIXED).exists():
        write_random(random_shape, source, folder / "huggingface")
        (folder / FIXED).write_text(str(TOKENS))
    content = read_content(folder / "huggingface" if random_shape else source)
    for (form, dtype), name in FILES.items():
        if name in only and not (folder / name).exists():
            write_checkpoint(content, folder / name, form, dtype)
    return folder


def write_random(shape: str, source: Path, to: Path) -> None:
    """Writes random weights of a released shape with a folder's vocabulary that never produce eot or timestamps.

    The first element of the decoder's output is always 1, and the rows of these tokens start with -1000, so that every
    system decodes its maximum number of tokens.
    """
    import jax.numpy as jnp

    from weight_loader import save_pretrained
    from whisper_nnx import RELEASED, Tokenizer, create_whisper

    tokenizer = Tokenizer.from_folder(source)
    size = json.loads((source / "config.json").read_text())["vocab_size"]
    model = create_whisper(replace(RELEASED[shape], vocab_size=size, num_mel_bins=80))
    special, norm, table = tokenizer.special, model.decoder.layer_norm, model.decoder.embed_tokens.embedding
    norm.scale[...] = norm.scale[...].at[0].set(0)
    norm.bias[...] = norm.bias[...].at[0].set(1)
    banned = [special.eot, *range(special.timestamp_begin, special.timestamp_end + 1)]
    first = table[...][:, 0] * 0
    table[...] = table[...].at[:, 0].set(first.at[jnp.array(banned)].set(-1000))
    model.tokenizer = tokenizer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no alignment heads
        save_pretrained(model, to)
    for name in ("tokenizer.json", "preprocessor_config.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, to / name)
