"""Saves models in Hugging Face's and other formats."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path as FilePath
from typing import Any, cast

from flax import nnx

from weight_loader.checkpoint import Content
from weight_loader.folder import CheckpointError
from weight_loader.load import FLOATS, abstract_model, differences, dotted, listing
from weight_loader.names import Path
from weight_loader.writers import huggingface, write_checkpoint
from whisper_nnx.model.quantized import Int8Embedding
from whisper_nnx.model.whisper import Whisper


def save_pretrained(model: Whisper, folder: str | os.PathLike[str], max_shard_size: int | str = "5GB") -> None:
    """Writes weights, configurations and tokenizer files in Hugging Face's format and the model's dtype.

    Existing files are replaced after all new ones have been written; other weights in the folder are removed.

    Args:
      model: the model to save.
      folder: output folder; created if missing.
      max_shard_size: bytes, or text such as "2GB"; larger weights are split into several files and an index.

    Raises:
      CheckpointError: the model cannot be represented in a checkpoint.
    """
    folder = FilePath(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        huggingface.write(content_of(model), temporary, None, max_shard_size)
        folder.mkdir(exist_ok=True)
        written = [file.name for file in temporary.iterdir()]
        for name in written:
            os.replace(temporary / name, folder / name)
        for old in folder.glob("model*.safetensors*"):
            if old.name not in written:
                old.unlink()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_model(model: Whisper, path: str | os.PathLike[str], format: str = "hf", dtype: str | None = None) -> list[str]:
    """Writes the model in one of the formats of `writers.WRITERS`; partial outputs are removed.

    Args:
      model: the model to save.
      path: a folder (hf, mlx, ct2) or a file (openai, ggml) that does not exist.
      format: hf, openai, mlx, ggml or ct2.
      dtype: by name ("float16"), or a type of the format ("q8_0"); by default the model's.

    Returns:
      What the format cannot store, one line each.

    Raises:
      CheckpointError: the format cannot represent the model.
    """
    return write_checkpoint(content_of(model), path, format, dtype)


def content_of(model: Whisper) -> Content:
    """Collects a model's arrays for writers.

    Raises CheckpointError for int8 weights, and for a model whose parameters differ from its configuration (replaced or
    removed layers, added modules), since no format can represent it.
    """
    if isinstance(model.decoder.embed_tokens, Int8Embedding):
        raise CheckpointError("the model's weights are int8, which no format here stores; load it with other weights")
    variables = _parameters(model)
    _check(model, variables)
    return Content(model.config, model.tokenizer, {path: variable[...] for path, variable in variables.items()})


def _parameters(model: Whisper) -> dict[Path, nnx.Variable]:
    """Returns all variables by path, except intermediates and random keys."""
    state = nnx.state(model, nnx.Not(nnx.Any(nnx.Intermediate, nnx.RngState)))
    return dict(cast(Iterable[tuple[Path, nnx.Variable]], nnx.to_flat_state(state)))


def _check(model: Whisper, variables: dict[Path, nnx.Variable]) -> None:
    shapes = {path: variable.shape for path, variable in _parameters(abstract_model(model.config)).items()}
    shared = _shared(model, variables, shapes)
    expected = {dotted(path): shape for path, shape in shapes.items() if path not in shared}
    kinds = differences(expected, {dotted(path): variable.shape for path, variable in variables.items()})
    if shared:
        kinds["shared"] = [f"{dotted(path)} is {dotted(same)}" for path, same in shared.items()]
    if integers := [f"{dotted(path)} ({v.dtype})" for path, v in variables.items() if v.dtype not in FLOATS]:
        kinds["not floating point"] = integers
    if not kinds:
        return
    fixes = []
    if any(isinstance(variable, nnx.LoRAParam) for variable in variables.values()):
        fixes.append("merge LoRA into the kernels first (whisper_nnx.training.lora.merge for those of this package)")
    elif "unexpected" in kinds:
        fixes.append("remove the added modules, or save them separately")
    if "missing" in kinds or "misshapen" in kinds:
        fixes.append("if layers were removed or resized, set model.config to the model's sizes")
    if shared:
        fixes.append("replace shared layers by copies (flax.nnx.clone)")
    if "not floating point" in kinds:
        fixes.append("convert them to floating point")
    listed = "; ".join(f"{kind}: {listing(names, 8)}" for kind, names in kinds.items())
    what = "the model's parameters differ from its configuration, so no format can represent it"
    raise CheckpointError(f"{what}: {listed}; {'; '.join(fixes)}")


def _shared(model: Whisper, variables: dict[Path, nnx.Variable], expected: Iterable[Path]) -> dict[Path, Path]:
    """Maps expected paths to the path under which `nnx.state` lists the same variable."""
    listed = {id(variable): path for path, variable in variables.items()}
    places = {path: listed.get(id(_at(model, path))) for path in expected if path not in variables}
    return {path: same for path, same in places.items() if same is not None}


def _at(model: Whisper, path: Path) -> Any:
    """Returns the object at a path of the model, or None."""
    place: Any = model
    try:
        for key in path:
            place = place[key] if isinstance(key, int) else getattr(place, key)
    except (AttributeError, LookupError, TypeError):
        return None
    return place
