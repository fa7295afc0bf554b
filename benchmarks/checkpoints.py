"""Writes one checkpoint, released or with random weights of a released shape, in the formats of all systems."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np

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
    source: Path,
    folder: Path,
    random_shape: str | None = None,
    only: Collection[str] = FILES.values(),
    tokens: int = TOKENS,
) -> Path:
    """Writes the checkpoint `source` (of any format), or random weights with its vocabulary, into `folder` in the
    formats whose file names are in `only`; keeps existing files. tokens: per window, with random weights."""
    from weight_loader.load import read_content
    from weight_loader.writers import write_checkpoint

    folder.mkdir(parents=True, exist_ok=True)
    if random_shape and not (folder / FIXED).exists():
        write_random(random_shape, source, folder / "huggingface")
        (folder / FIXED).write_text(str(tokens))
    content = read_content(folder / "huggingface" if random_shape else source)
    for (form, dtype), name in FILES.items():
        if name in only and not (folder / name).exists():
            write_checkpoint(content, folder / name, form, dtype)
    return folder


def write_random(shape: str, source: Path, to: Path) -> None:
    """Writes random weights of a released shape with a folder's vocabulary that never produce eot or timestamps.

    The first element of the decoder's output is always 1, and the rows of these tokens start with -1000, so that every
    system decodes its maximum number of tokens. In float16, and the same noise again and again: to draw large-v3's
    weights one by one takes minutes.
    """
    import jax.numpy as jnp
    from flax import nnx

    from weight_loader import save_pretrained
    from weight_loader.load import abstract_model
    from whisper_nnx import RELEASED, Tokenizer
    from whisper_nnx.model.whisper import Constant, sinusoids

    tokenizer = Tokenizer.from_folder(source)
    special, size = tokenizer.special, json.loads((source / "config.json").read_text())["vocab_size"]
    model = abstract_model(replace(RELEASED[shape], vocab_size=size, num_mel_bins=80), param_dtype=jnp.float16)
    noise = np.random.default_rng(0).normal(0, 0.02, 2**20 + 7).astype(np.float16)
    for number, (path, variable) in enumerate(nnx.to_flat_state(nnx.state(model))):
        if isinstance(variable, Constant):
            value = sinusoids(*variable.shape)
        elif path[-1] in ("scale", "bias"):
            value = np.full(variable.shape, path[-1] == "scale")
        else:
            value = np.resize(noise[number:], variable.shape)  # no two are equal: converters store these once
        if path[:2] == ("decoder", "layer_norm"):
            value[0] = path[-1] == "bias"
        if path[-2:] == ("embed_tokens", "embedding"):
            value[:, 0] = 0
            value[[special.eot, *range(special.timestamp_begin, special.timestamp_end + 1)], 0] = -1000
        variable.set_raw_value(jnp.asarray(value, jnp.float16))
    model.tokenizer = tokenizer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no alignment heads
        save_pretrained(model, to)
    for name in ("tokenizer.json", "preprocessor_config.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, to / name)
