"""From a model to a folder that Hugging Face's transformers, and `load_model`, load."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from weight_loader.names import parameters
from whisper_nnx.config import WhisperConfig
from whisper_nnx.model import Whisper
from whisper_nnx.tokenizer import Tokenizer


def save_pretrained(model: Whisper, folder: str | os.PathLike[str], max_shard_size: int | str = "5GB") -> None:
    """Writes weights, configurations and the tokenizer's files, in the model's dtype and Hugging Face's format.

    max_shard_size: bytes, or a text such as "2GB"; weights above it are split into several files and an index.
    Files of the same names are replaced, once all have been written; other weights in the folder are removed.
    """
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    temporary.mkdir(parents=True)
    try:
        _write_configs(model, temporary)
        _write_weights(model, temporary, max_shard_size)
        folder.mkdir(exist_ok=True)
        written = [file.name for file in temporary.iterdir()]
        for name in written:
            os.replace(temporary / name, folder / name)
        for old in folder.glob("model*.safetensors*"):
            if old.name not in written:
                old.unlink()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_configs(model: Whisper, folder: Path) -> None:
    config, tokenizer = model.config, model.tokenizer
    ids = _token_ids(tokenizer)
    dtype = str(model.decoder.embed_tokens.embedding.dtype)
    _write_json(folder / "config.json", {**config.to_hf(), **ids, "dtype": dtype})
    _write_json(folder / "preprocessor_config.json", _preprocessor_config(config))
    generation: dict[str, Any] = {"max_length": config.max_target_positions, "return_timestamps": False, **ids}
    if config.alignment_heads is not None:
        generation["alignment_heads"] = config.alignment_heads
    if tokenizer:
        generation |= _generation_ids(tokenizer)
        for name, content in tokenizer.files.items():
            (folder / name).write_bytes(content)
    _write_json(folder / "generation_config.json", generation)


def _write_weights(model: Whisper, folder: Path, max_shard_size: int | str) -> None:
    from huggingface_hub import split_state_dict_into_shards_factory

    variables = dict(nnx.to_flat_state(nnx.state(model)))
    table = {parameter.huggingface: parameter for parameter in parameters(model.config)}

    def stored(name: str) -> np.ndarray:
        array = np.asarray(variables[table[name].path][...])
        return np.ascontiguousarray(array.transpose(table[name].stored_axes))  # save_file writes memory as it lies

    split = split_state_dict_into_shards_factory(
        {name: variables[parameter.path][...] for name, parameter in table.items()},
        get_storage_size=lambda array: array.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: stored(name) for name in names}, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # save_file's are for their owner alone
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)


def _token_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """Without a tokenizer None is written: where nothing is, transformers takes ids beyond a small vocabulary."""
    if tokenizer is None:
        return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    eot, sot = tokenizer.special.eot, tokenizer.special.sot
    return {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot, "decoder_start_token_id": sot}


def _generation_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokens that transformers' generate() must know, as in the released models' generation_config.json."""
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
