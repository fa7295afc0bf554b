"""Writes Hugging Face's folder, which transformers and `load_model` load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from weight_loader.checkpoint import Content
from whisper_nnx.model.config import WhisperConfig
from whisper_nnx.text.tokenizer import Tokenizer

DTYPES = ("float32", "float16", "bfloat16")
FOLDER = True


def write(content: Content, path: Path, dtype: str | None, max_shard_size: int | str = "5GB") -> list[str]:
    """Writes the folder; dtype None keeps each array's dtype. max_shard_size: bytes, or text such as "2GB"."""
    path.mkdir(parents=True)
    _write_configs(content, path, dtype or content.dtype)
    _write_weights(content, path, dtype, max_shard_size)
    return [] if content.tokenizer else ["the tokenizer: there is none; put one next to the weights"]


def _write_configs(content: Content, folder: Path, dtype: str) -> None:
    config, tokenizer = content.config, content.tokenizer
    ids = _token_ids(tokenizer)
    _write_json(folder / "config.json", {**config.to_hf(), **ids, "dtype": dtype})
    _write_json(folder / "preprocessor_config.json", _preprocessor_config(config))
    generation: dict[str, Any] = {"max_length": config.max_target_positions, "return_timestamps": False, **ids}
    if config.alignment_heads is not None:
        generation["alignment_heads"] = config.alignment_heads
    if config.condition_on_prev_tokens is not None:
        generation["condition_on_prev_tokens"] = config.condition_on_prev_tokens
    if tokenizer:
        generation |= _generation_ids(tokenizer)
        for name, file in tokenizer.files.items():
            (folder / name).write_bytes(file)
    _write_json(folder / "generation_config.json", generation)


def _write_weights(content: Content, folder: Path, dtype: str | None, max_shard_size: int | str) -> None:
    from huggingface_hub import split_state_dict_into_shards_factory

    places = {stored.name: (path, stored) for path, stored in content.table("hf")}
    split = split_state_dict_into_shards_factory(
        {name: content.arrays[path] for name, (path, _) in places.items()},
        get_storage_size=lambda array: array.size * np.dtype(dtype or array.dtype).itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        arrays = {name: content.laid_out(*places[name], dtype) for name in names}
        save_file(arrays, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # save_file's files are readable only by their owner
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)


def _token_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """Returns token ids; None without a tokenizer, since transformers' defaults may exceed a small vocabulary."""
    if tokenizer is None:
        return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    eot, sot = tokenizer.special.eot, tokenizer.special.sot
    return {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot, "decoder_start_token_id": sot}


def _generation_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the tokens that transformers' generate() needs, as in the released models' generation_config.json."""
    special = tokenizer.special
    never = (special.sot, special.translate, special.transcribe, special.sot_lm, special.sot_prev, special.no_speech)
    ids: dict[str, Any] = {
        "suppress_tokens": sorted({*tokenizer.non_speech_tokens, *(i for i in never if i is not None)}),
        "begin_suppress_tokens": sorted({*tokenizer.blank_tokens, special.eot}),
        "no_timestamps_token_id": special.no_timestamps,
        "prev_sot_token_id": special.sot_prev,
        "max_initial_timestamp_index": 50,  # 1 s
        "is_multilingual": tokenizer.is_multilingual,
    }
    if tokenizer.is_multilingual:
        ids["lang_to_id"] = {f"<|{code}|>": i for code, i in special.languages}
        ids["task_to_id"] = {"transcribe": special.transcribe, "translate": special.translate}
    return ids


def _preprocessor_config(config: WhisperConfig) -> dict[str, Any]:
    frames = 2 * config.max_source_positions  # of 10 ms
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": config.num_mel_bins,
        "sampling_rate": 16_000,
        "hop_length": 160,
        "n_fft": 400,
        "chunk_length": frames // 100,
        "n_samples": frames * 160,
        "nb_max_frames": frames,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
