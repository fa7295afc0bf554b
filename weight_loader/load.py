"""Loads models from checkpoints: `load_model` and its parts."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path as FilePath
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from weight_loader.checkpoint import Checkpoint, Content
from weight_loader.folder import CONFIG_FILES, CheckpointError, read_config, read_tokenizer
from weight_loader.hub import checkpoint_path
from weight_loader.names import SINUSOIDS, Path, parameters
from weight_loader.readers import huggingface, open_checkpoint
from weight_loader.released import released_tokenizer
from weight_loader.vocabulary import tokenizer_from_tiktoken
from whisper_nnx.model.cache import checked_kv_dtype
from whisper_nnx.model.config import WhisperConfig
from whisper_nnx.model.layers import AttentionFn
from whisper_nnx.model.quantized import quantize_model
from whisper_nnx.model.sharding import check_fits, shard_model, sharding_of
from whisper_nnx.model.whisper import Dtype, Whisper, sinusoids
from whisper_nnx.runtime.devices import as_mesh
from whisper_nnx.runtime.forking import refuse_after_fork
from whisper_nnx.text.tokenizer import FILE_NAMES as TOKENIZER_FILES
from whisper_nnx.text.tokenizer import Tokenizer

Name = str | os.PathLike[str]
Shape = tuple[int, ...]
_WITHOUT_TOKENIZER = ("openai", "mlx", "ct2")
FLOATS = tuple(map(np.dtype, ("float64", "float32", "float16", "bfloat16")))


def load_model(
    name_or_path: Name,
    *,
    dtype: Dtype = None,
    weights: Dtype = None,
    kv_cache_dtype: Dtype = None,
    tokenizer: Name | None = None,
    attention_fn: AttentionFn | None = None,
    mesh: Mesh | int | str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Name | None = None,
) -> Whisper:
    """Loads a trained model with its tokenizer.

    Args:
      name_or_path: a folder or file in any format of `weight_loader.readers`; a repository ("owner/name"); a short
        name: "tiny", "base.en", "large-v3", "turbo", "distil-large-v3"; "demo", the small model in this package; one
        of OpenAI's files by name, "tiny.pt", or URL; the URL of a folder or file elsewhere, such as s3://bucket/model,
        which is copied. An existing folder or file takes precedence. A PEFT LoRA adapter is merged into its base model.
      dtype: of the computation: float32 (default on CPUs), bfloat16 (default on GPUs and TPUs) or float16.
      weights: dtype of the parameters in memory: as for dtype, or int8 (matrices only); by default equal to dtype.
        Stored arrays are converted one at a time.
      kv_cache_dtype: int8: the token loop reads the audio's keys and values in 8 bits; by default equal to dtype.
      tokenizer: a folder, .tiktoken file, repository or short name. By default the checkpoint's own; for OpenAI's,
        MLX's and CTranslate2's files without one, that of the released models of the same vocabulary size.
      attention_fn: replaces `ops.attention` in all layers; see `MultiHeadAttention`.
      mesh: several devices (`make_mesh`, or a number of them, or "all"): arrays are read one at a time, and each device
        receives only its part, so that the model may be larger than the memory of one. Whatever is computed with the
        model runs on all of them.
      revision: branch, tag or commit of the repository.
      token: for private repositories.
      cache_dir: folder for downloads; by default Hugging Face's cache.

    Raises:
      FileNotFoundError: a path does not exist.
      CheckpointError: the checkpoint cannot be downloaded or used.
      ValueError: a dtype or mesh that the model cannot have.
    """
    refuse_after_fork()
    mesh = None if mesh is None else as_mesh(mesh, name="mesh")
    dtype = _floating(dtype or default_dtype(mesh))
    int8 = weights in ("int8", jnp.int8, np.dtype("int8"))
    kv_cache_dtype = checked_kv_dtype(kv_cache_dtype)
    param_dtype = dtype if int8 else _floating(weights or dtype, "weights", ", int8")
    options: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
    path = checkpoint_path(name_or_path, **options)
    checkpoint = open_checkpoint(path, token=token, cache_dir=cache_dir)
    found = find_tokenizer(checkpoint, path, tokenizer, **options)
    if mesh is not None:
        check_fits(checkpoint.config, mesh)
    model = abstract_model(checkpoint.config, dtype, param_dtype, attention_fn, kv_cache_dtype)
    params = read_arrays(checkpoint, param_dtype, model, mesh)
    nnx.update(model, nnx.State(unflatten_dict(params)))
    if int8:
        quantize_model(model)
        model = model if mesh is None else shard_model(model, mesh)  # the scales
    model.tokenizer = found
    return model


def default_dtype(mesh: Mesh | None = None) -> Dtype:
    """The dtype in which models compute on JAX's default device: bfloat16 on GPUs and TPUs, float32 on CPUs."""
    device = _default_device() if mesh is None else mesh.devices.flat[0]
    return jnp.float32 if device.platform == "cpu" else jnp.bfloat16


def _default_device() -> jax.Device:
    """JAX's, or what `jax.default_device` has chosen."""
    [device] = jnp.zeros(()).devices()
    return device


def download_whisper_weights(
    name_or_path: Name,
    *,
    dtype: Dtype = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Name | None = None,
) -> tuple[dict[str, Any], WhisperConfig]:
    """Returns the arrays of a checkpoint, as stored or as `dtype`, and its configuration.

    The arrays are in nested dicts by path in the model, `params["decoder"]["layers"][0]["fc1"]["kernel"]`, as in
    `nnx.to_pure_dict(nnx.state(model))`. Arguments and errors are those of `load_model`.
    """
    path = checkpoint_path(name_or_path, revision=revision, token=token, cache_dir=cache_dir)
    checkpoint = open_checkpoint(path, token=token, cache_dir=cache_dir)
    return unflatten_dict(read_arrays(checkpoint, dtype and _floating(dtype))), checkpoint.config


def read_content(name_or_path: Name, *, tokenizer: Name | None = None, **options: Any) -> Content:
    """Reads a checkpoint for writers, its arrays as stored. Arguments and errors are those of `load_model`."""
    path = checkpoint_path(name_or_path, **options)
    checkpoint = open_checkpoint(path)
    found = find_tokenizer(checkpoint, path, tokenizer, **options)
    return Content(checkpoint.config, found, read_arrays(checkpoint))


def get_whisper_config(
    name_or_path: Name,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Name | None = None,
) -> WhisperConfig:
    """Returns the configuration of a checkpoint; does not download weights if it has a config file (Hugging Face).

    Arguments and errors are those of `load_model`.
    """
    options: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
    path = checkpoint_path(name_or_path, files=CONFIG_FILES, **options)
    if path.is_dir() and huggingface.is_config(path):
        return read_config(path)
    return open_checkpoint(checkpoint_path(name_or_path, **options), token=token, cache_dir=cache_dir).config


def find_tokenizer(
    checkpoint: Checkpoint, path: FilePath, given: Name | None, *, warn: bool = True, **options: Any
) -> Tokenizer | None:
    """Finds a model's tokenizer: given, the checkpoint's own, in the files beside it, or a released one.

    Args:
      checkpoint: the model's; released tokenizers, of the same size, are used for formats that usually have none.
      path: of the checkpoint.
      given: as in `load_model`.
      warn: whether to warn if there is none; without it, nothing is downloaded either.
      **options: as in `load_model`.

    Raises:
      CheckpointError: the tokenizer cannot be loaded or belongs to another model.
    """
    size = checkpoint.config.vocab_size
    if given is not None:
        # Token and revision apply only to the model's repository.
        source = checkpoint_path(given, files=(*TOKENIZER_FILES, *CONFIG_FILES), cache_dir=options.get("cache_dir"))
        found = read_tokenizer(source, size) if source.is_dir() else tokenizer_from_tiktoken(source, size)
        if found is None:
            raise CheckpointError(
                f"tokenizer={given!r} lacks tokenizer.json, or vocab.json and merges.txt; give another one"
            )
        return found
    found = checkpoint.tokenizer or read_tokenizer(path if path.is_dir() else path.parent, size)
    reason = ""
    if found is None and checkpoint.format in _WITHOUT_TOKENIZER:
        try:
            found = released_tokenizer(size, options.get("cache_dir"), download=warn)
        except CheckpointError as error:
            reason = f", and that of the released models is not available: {error}"
    if found is None and warn:
        warnings.warn(
            f"{path}: no tokenizer: tokenizer.json, or vocab.json with merges.txt, is missing{reason}; put it next to "
            "the weights, or give tokenizer=FOLDER, a .tiktoken file or a name such as 'tiny' (the model loads, but "
            "transcribing needs a tokenizer)",
            stacklevel=3,
        )
    return found


def load_weights_into_nnx_model(model: nnx.Module, params: Mapping[Any, Any]) -> None:
    """Copies `params` (nested by path in the model, or an `nnx.State`) into the model, in its dtypes and shardings.

    Raises CheckpointError, leaving the model unchanged, if names or shapes differ.
    """
    nested = nnx.to_pure_dict(params) if isinstance(params, nnx.State) else params
    # Layer numbers are strings in JSON and orbax.
    given = {tuple(int(k) if str(k).isdigit() else k for k in path): v for path, v in flatten_dict(nested).items()}
    variables = _variables(model)
    _compare(
        {dotted(path): variable.shape for path, variable in variables.items()},
        {dotted(path): np.shape(array) for path, array in given.items()},
        "params do not fit the model",
        "create the model with the configuration of these params",
    )
    for path, variable in variables.items():
        variable[...] = jax.device_put(jnp.asarray(given[path], variable.dtype), variable.sharding)


def model_info(config: WhisperConfig) -> dict[str, str]:
    """Describes a model of this configuration, by keyword."""
    state = nnx.to_flat_state(nnx.state(abstract_model(config), nnx.Param))
    sizes = {side: sum(v.size for path, v in state if path[0] == side) for side in ("encoder", "decoder")}
    total = sum(sizes.values())
    megabytes = {name: total * jnp.dtype(name).itemsize / 1e6 for name in ("float32", "bfloat16", "float16")}
    return {
        "width": str(config.d_model),
        "encoder": f"{config.encoder_layers} layers of {config.encoder_attention_heads} heads, "
        f"{config.num_mel_bins} mels, {config.max_source_positions} positions",
        "decoder": f"{config.decoder_layers} layers of {config.decoder_attention_heads} heads, "
        f"{config.vocab_size} tokens, {config.max_target_positions} positions",
        "parameters": f"{total:,} (encoder {sizes['encoder']:,}, decoder {sizes['decoder']:,})",
        "memory": ", ".join(f"{name} {size:,.0f} MB" for name, size in megabytes.items()),
    }


def print_model_info(config: WhisperConfig) -> None:
    """Prints a model's sizes, number of parameters and memory."""
    print("\n".join(f"{name:<12} {text}" for name, text in model_info(config).items()))


def abstract_model(
    config: WhisperConfig,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    attention_fn: AttentionFn | None = None,
    kv_cache_dtype: Dtype = None,
) -> Whisper:
    """Makes a model of abstract arrays, which have shapes and dtypes but no memory."""

    def make() -> Whisper:
        key = jax.random.key(0)
        # Replaces nnx.Rngs, whose counter, traced for each parameter, takes 13 s for large-v3 (flax 0.12.8).
        rngs: Any = SimpleNamespace(params=lambda: key)
        options: dict[str, Any] = {"attention_fn": attention_fn, "kv_cache_dtype": kv_cache_dtype}
        return Whisper(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype, **options)

    return nnx.eval_shape(make)


def read_arrays(
    checkpoint: Checkpoint, dtype: Dtype = None, model: Whisper | None = None, mesh: Mesh | None = None
) -> dict[Path, jax.Array]:
    """Reads all arrays of an (abstract) model by path; dtype None: as stored. CheckpointError unless all fit."""
    config, form = checkpoint.config, checkpoint.format
    table = {p.stored[form].name: (p.path, p.stored[form].axes) for p in parameters(config) if form in p.stored}
    expected = expected_shapes(checkpoint, model)
    found: dict[str, Shape] = {}
    params: dict[Path, jax.Array] = {}
    for name, array in checkpoint.tensors:
        if array.dtype not in FLOATS:
            floats = ", ".join(map(str, FLOATS))
            raise CheckpointError(f"{checkpoint.where}: {name} is stored as {array.dtype}, expected one of {floats}")
        found[name] = array.shape
        if expected.get(name) == array.shape:
            path, axes = table[name]
            # Blocks, or arrays that are read faster than they are converted would pile up.
            params[path] = jax.block_until_ready(_convert(array, axes, dtype or jnp.result_type(array), path, mesh))
        del array  # before the next is read
    size = f"d_model={config.d_model}, {config.encoder_layers} and {config.decoder_layers} layers"
    what = f"{checkpoint.where}: the weights do not fit the configuration ({size}, vocab_size={config.vocab_size})"
    _compare(without_computed(expected, found), found, what, "take both from one checkpoint")
    if SINUSOIDS.path not in params:
        computed = sinusoids(config.max_source_positions, config.d_model)
        params[SINUSOIDS.path] = _convert(computed, (0, 1), dtype or computed.dtype, SINUSOIDS.path, mesh)
    return params


def expected_shapes(checkpoint: Checkpoint, model: Whisper | None = None) -> dict[str, Shape]:
    """Returns the shapes that the checkpoint should contain, by its own names."""
    config, form = checkpoint.config, checkpoint.format
    shapes = {path: variable.shape for path, variable in _variables(model or abstract_model(config)).items()}
    rows = [(p.path, p.stored[form]) for p in parameters(config) if form in p.stored]
    return {stored.name: tuple(shapes[path][axis] for axis in stored.stored_axes) for path, stored in rows}


def without_computed(expected: dict[str, Shape], found: Mapping[str, Shape]) -> dict[str, Shape]:
    """Drops the sinusoids, which can be computed, if they were not found."""
    names = {stored.name for stored in SINUSOIDS.stored.values()} - found.keys()
    return {name: shape for name, shape in expected.items() if name not in names}


def _variables(model: nnx.Module) -> dict[Path, nnx.Variable]:
    """Returns the model's variables by path."""
    return cast(dict[Path, nnx.Variable], dict(nnx.to_flat_state(nnx.state(model))))


def _convert(
    array: np.ndarray, axes: tuple[int, ...], dtype: Dtype, path: Path = (), mesh: Mesh | None = None
) -> jax.Array:
    """Converts a stored array to the model's axis order and dtype; on a mesh, each device's part by itself."""
    if mesh is not None:
        parts = array.transpose(axes)
        return jax.make_array_from_callback(
            parts.shape, sharding_of(path, mesh), lambda index: np.ascontiguousarray(parts[index]).astype(dtype)
        )
    if array.ndim == 1:
        return jax.device_put(array.astype(dtype))
    return _transposed(array, axes, jnp.dtype(dtype))


@partial(jax.jit, static_argnums=(1, 2))
def _transposed(array: jax.Array, axes: tuple[int, ...], dtype: Any) -> jax.Array:
    """Transposes and casts; compiled for few shapes, and several times as fast as numpy."""
    return array.transpose(axes).astype(dtype)


def differences(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> dict[str, list[str]]:
    """Lists names that are missing, unexpected or misshapen; without empty lists."""
    kinds = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "misshapen": [
            f"{name} is {found[name]}, expected {shape}"
            for name, shape in expected.items()
            if found.get(name, shape) != shape
        ],
    }
    return {kind: names for kind, names in kinds.items() if names}


def listing(names: Sequence[str], most: int = 50) -> str:
    """Formats the first names and the number of the rest, safely for arbitrary names in a file."""
    shown = [name[:200] if name.isprintable() else ascii(name[:200]) for name in names[:most]]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")


def _compare(expected: Mapping[str, Shape], found: Mapping[str, Shape], what: str, fix: str) -> None:
    """Raises CheckpointError with all differences."""
    if kinds := differences(expected, found):
        listed = "; ".join(f"{kind}: {listing(names)}" for kind, names in kinds.items())
        raise CheckpointError(f"{what}: {listed}; {fix}")


def dotted(path: Path) -> str:
    return ".".join(map(str, path))


def _floating(dtype: Dtype, name: str = "dtype", others: str = "") -> np.dtype:
    """Returns float32, bfloat16 or float16 as a dtype. Raises ValueError, listing choices, for anything else."""
    known = [jnp.dtype(name) for name in ("float32", "bfloat16", "float16")]
    try:
        if jnp.dtype(dtype) in known:
            return jnp.dtype(dtype)
    except TypeError:
        pass
    raise ValueError(f"{name}={dtype!r} is not supported; choose {', '.join(map(str, known))}{others}")
