"""From a checkpoint to a model: `load_model` and its parts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from weight_loader.folder import CONFIG_FILES, WEIGHT_FILES, CheckpointError, read_config, read_tokenizer
from weight_loader.hub import checkpoint_folder
from weight_loader.names import PROJ_OUT, SINUSOIDS, Path, parameters
from weight_loader.readers import safetensors
from whisper_nnx.config import WhisperConfig
from whisper_nnx.model import Dtype, Whisper, sinusoids
from whisper_nnx.tokenizer import FILE_NAMES as TOKENIZER_FILES

Name = str | os.PathLike[str]
Shape = tuple[int, ...]


def load_model(
    name_or_path: Name,
    *,
    dtype: Dtype = None,
    param_dtype: Dtype = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Name | None = None,
) -> Whisper:
    """A trained model with its tokenizer.

    name_or_path: a folder in Hugging Face's format, a repository ("owner/name"; `revision`, `token`, `cache_dir` are
      for it), or a short name: "tiny", "base.en", "large-v3", "turbo", "distil-large-v3". A folder of that name wins.
    dtype, param_dtype: float32, bfloat16 or float16 of the computation (default float32) and of the parameters
      (default: the same). Whatever is stored is converted tensor by tensor.

    Raises FileNotFoundError for a path to nothing, CheckpointError for a checkpoint that cannot be had or used.
    """
    dtype = _floating(dtype or jnp.float32)
    param_dtype = _floating(param_dtype or dtype)
    files = (*CONFIG_FILES, *TOKENIZER_FILES, *WEIGHT_FILES)
    folder = checkpoint_folder(name_or_path, files, revision=revision, token=token, cache_dir=cache_dir)
    config = read_config(folder)
    tokenizer = read_tokenizer(folder, config)
    model = abstract_model(config, dtype, param_dtype)
    params = _read_params(safetensors.tensors(folder), model, param_dtype, str(folder))
    nnx.update(model, nnx.State(unflatten_dict(params)))
    model.tokenizer = tokenizer
    return model


def download_whisper_weights(
    name_or_path: Name,
    *,
    dtype: Dtype = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Name | None = None,
) -> tuple[dict[str, Any], WhisperConfig]:
    """The arrays of a checkpoint, as stored or as `dtype`, and its configuration.

    The arrays lie in nested dicts by their place in the model, params["decoder"]["layers"][0]["fc1"]["kernel"], as
    `nnx.to_pure_dict(nnx.state(model))` has them. Arguments and errors are those of `load_model`.
    """
    files = (*CONFIG_FILES, *WEIGHT_FILES)
    folder = checkpoint_folder(name_or_path, files, revision=revision, token=token, cache_dir=cache_dir)
    config = read_config(folder)
    dtype = dtype and _floating(dtype)
    params = _read_params(safetensors.tensors(folder), abstract_model(config), dtype, str(folder))
    return unflatten_dict(params), config


def get_whisper_config(
    name_or_path: Name,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Name | None = None,
) -> WhisperConfig:
    """The configuration of a checkpoint, without its weights. Arguments and errors are those of `load_model`."""
    return read_config(
        checkpoint_folder(name_or_path, CONFIG_FILES, revision=revision, token=token, cache_dir=cache_dir)
    )


def load_weights_into_nnx_model(model: nnx.Module, params: Mapping[Any, Any]) -> None:
    """Puts `params` (nested by place in the model, or an `nnx.State`) into the model, in its dtypes and on its devices.

    Raises CheckpointError, and changes nothing, where names or shapes differ.
    """
    nested = nnx.to_pure_dict(params) if isinstance(params, nnx.State) else params
    # Layer numbers are text in what was kept as JSON or by orbax.
    given = {tuple(int(k) if str(k).isdigit() else k for k in path): v for path, v in flatten_dict(nested).items()}
    variables = _variables(model)
    _compare(
        {_dotted(path): variable.shape for path, variable in variables.items()},
        {_dotted(path): np.shape(array) for path, array in given.items()},
        "params do not fit the model",
        "make the model with the configuration that came with them",
    )
    for path, variable in variables.items():
        variable[...] = jax.device_put(jnp.asarray(given[path], variable.dtype), variable.sharding)


def print_model_info(config: WhisperConfig) -> None:
    """Prints the sizes of a model, how many parameters it has and how much memory they take."""
    state = nnx.to_flat_state(nnx.state(abstract_model(config), nnx.Param))
    sizes = {side: sum(v.size for path, v in state if path[0] == side) for side in ("encoder", "decoder")}
    total = sum(sizes.values())
    megabytes = {name: total * jnp.dtype(name).itemsize / 1e6 for name in ("float32", "bfloat16", "float16")}
    print(
        f"width        {config.d_model}\n"
        f"encoder      {config.encoder_layers} layers of {config.encoder_attention_heads} heads, "
        f"{config.num_mel_bins} mels, {config.max_source_positions} positions\n"
        f"decoder      {config.decoder_layers} layers of {config.decoder_attention_heads} heads, "
        f"{config.vocab_size} tokens, {config.max_target_positions} positions\n"
        f"parameters   {total:,} (encoder {sizes['encoder']:,}, decoder {sizes['decoder']:,})\n"
        f"memory       {', '.join(f'{name} {size:,.0f} MB' for name, size in megabytes.items())}"
    )


def abstract_model(config: WhisperConfig, dtype: Dtype = jnp.float32, param_dtype: Dtype = jnp.float32) -> Whisper:
    """A model whose arrays have shapes and dtypes, but no memory."""
    key = jax.random.key(0)
    # Stands for nnx.Rngs, whose counter, traced once for each parameter, takes 13 s at large-v3 (flax 0.12.8).
    rngs: Any = SimpleNamespace(params=lambda: key)
    return nnx.eval_shape(lambda: Whisper(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype))


def _read_params(
    tensors: Iterable[tuple[str, np.ndarray]], model: Whisper, dtype: Dtype, where: str
) -> dict[Path, jax.Array]:
    """Every array of the (abstract) model by its path; dtype None: as stored. Raises CheckpointError unless all fit."""
    config = model.config
    shapes = {path: variable.shape for path, variable in _variables(model).items()}
    table = {parameter.huggingface: parameter for parameter in parameters(config)}
    expected = {name: tuple(shapes[p.path][axis] for axis in p.stored_axes) for name, p in table.items()}
    found: dict[str, Shape] = {}
    params: dict[Path, jax.Array] = {}
    for name, array in tensors:
        if name == PROJ_OUT.huggingface and config.tie_word_embeddings:
            continue
        if f"model.{name}" in table:  # as WhisperModel, the part without the output layer, is saved
            name = f"model.{name}"
        found[name] = array.shape
        if expected.get(name) == array.shape:
            params[table[name].path] = _convert(array, table[name].axes, dtype or jnp.result_type(array))
    if SINUSOIDS.huggingface not in found:  # they can be computed
        found[SINUSOIDS.huggingface] = shapes[SINUSOIDS.path]
        params[SINUSOIDS.path] = jnp.asarray(sinusoids(*shapes[SINUSOIDS.path]), dtype)
    size = f"d_model={config.d_model}, {config.encoder_layers} and {config.decoder_layers} layers"
    what = f"{where}: the weights do not fit config.json ({size}, vocab_size={config.vocab_size})"
    _compare(expected, found, what, "take both from one checkpoint")
    return params


def _variables(model: nnx.Module) -> dict[Path, nnx.Variable]:
    """The model's own variables by their path."""
    return cast(dict[Path, nnx.Variable], dict(nnx.to_flat_state(nnx.state(model))))


def _convert(array: np.ndarray, axes: tuple[int, ...], dtype: Dtype) -> jax.Array:
    """A stored array in the model's order and dtype."""
    if array.ndim == 1:
        return jnp.asarray(array.astype(dtype))
    return _transposed(array, axes, jnp.dtype(dtype))


@partial(jax.jit, static_argnums=(1, 2))
def _transposed(array: jax.Array, axes: tuple[int, ...], dtype: Any) -> jax.Array:
    """Compiled for each of a handful of shapes; several times as fast as numpy's cast of a transposed array."""
    return array.transpose(axes).astype(dtype)


def _compare(expected: dict[str, Shape], found: dict[str, Shape], what: str, fix: str) -> None:
    """Raises CheckpointError that lists every missing, unexpected and misshapen tensor."""
    differences = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "misshapen": [
            f"{name} is {found[name]}, expected {shape}"
            for name, shape in expected.items()
            if found.get(name, shape) != shape
        ],
    }
    if any(differences.values()):
        listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in differences.items() if names)
        raise CheckpointError(f"{what}: {listed}; {fix}")


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))


def _floating(dtype: Dtype) -> np.dtype:
    """float32, bfloat16 or float16. Raises ValueError for anything else."""
    known = [jnp.dtype(name) for name in ("float32", "bfloat16", "float16")]
    try:
        if jnp.dtype(dtype) in known:
            return jnp.dtype(dtype)
    except TypeError:
        pass
    raise ValueError(f"dtype={dtype!r} is not supported; choose {', '.join(map(str, known))}")
