"""One checkpoint in the formats of all systems: a real one, or random weights of a released shape."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

TOKENS = 100  # of each window, where the weights are random
FIXED = "tokens_per_window"  # a file that is there if they are
FILES = {  # format -> where it lies, in what precision
    "hf": ("huggingface", "float32"),
    "openai": ("openai.pt", "float32"),
    "ct2": ("ctranslate2", "float32"),
    "mlx": ("mlx", "float32"),
    "ggml": ("ggml.bin", "float16"),  # whisper.cpp has no float32
}


def prepare(folder: Path, scratch: Path, random_shape: str | None = None, formats: Collection[str] = FILES) -> Path:
    """Puts the checkpoint of a Hugging Face folder, or random weights with its vocabulary, in all these formats into
    `scratch`, from which each system is made."""
    from weight_loader.load import read_content
    from weight_loader.writers import write_checkpoint

    made = scratch / FILES["hf"][0]
    if random_shape:
        write_random(random_shape, folder, made)
        (scratch / FIXED).write_text(str(TOKENS))
    else:
        made.symlink_to(folder.resolve())
    for format, (name, dtype) in FILES.items():
        if format != "hf" and format in formats:
            write_checkpoint(read_content(made), scratch / name, format, dtype)
    for name in ("tokenizer.json", "preprocessor_config.json"):
        if "ct2" in formats and (folder / name).exists():
            shutil.copyfile(folder / name, scratch / "ctranslate2" / name)
    return scratch


def write_random(shape: str, folder: Path, to: Path) -> None:
    """Random weights of a released shape, with a folder's vocabulary, which never end and say no timestamp.

    The first number of the decoder's output is always 1, and the rows of those tokens begin with -1000. So every system
    decodes as many tokens as it is allowed to.
    """
    import jax.numpy as jnp

    from weight_loader import save_pretrained
    from whisper_nnx import RELEASED, Tokenizer, create_whisper

    tokenizer = Tokenizer.from_folder(folder)
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
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
        shutil.copyfile(folder / name, to / name)
