"""Parameter names and axis orders in the NNX state and in each checkpoint format.

The tables have a row per module; `parameters` expands them to an entry per array of a model, so that missing and
unexpected names are set differences. A format defines how it names a row (`_MODULE`) and the suffix and axes of each
kind of array (`_ENDS`). Readers and writers use the same entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from whisper_nnx.model.config import WhisperConfig

Path = tuple[str | int, ...]  # in the NNX state: ("decoder", "layers", 0, "fc1", "kernel")
Axes = tuple[int, ...]


class Stored(NamedTuple):
    """An array in a file: `stored.transpose(axes)` has the model's axis order; `stored_axes` is the inverse."""

    name: str
    axes: Axes

    @property
    def stored_axes(self) -> Axes:
        return tuple(self.axes.index(axis) for axis in range(len(self.axes)))


class Parameter(NamedTuple):
    """One array: its path in the model, and its name and axes in each format that stores it."""

    path: Path
    stored: dict[str, Stored]


class _Row(NamedTuple):
    """Names of a module; {} is the layer number."""

    name: str  # in NNX and Hugging Face, which use the same names
    openai: str
    ct2: str  # after a colon, the part of a projection that CTranslate2 fuses
    arrays: tuple[str, ...]


_LINEAR, _NO_BIAS, _CONV, _NORM = ("kernel", "bias"), ("kernel",), ("conv", "bias"), ("scale", "bias")
_NNX_END = {"kernel": "kernel", "conv": "kernel", "scale": "scale", "bias": "bias"}  # of the others: "embedding"

_LAYER = (
    _Row("layers.{}.self_attn_layer_norm", "blocks.{}.attn_ln", "layer_{}/self_attention/layer_norm", _NORM),
    _Row("layers.{}.self_attn.q_proj", "blocks.{}.attn.query", "layer_{}/self_attention/linear_0:q", _LINEAR),
    _Row("layers.{}.self_attn.k_proj", "blocks.{}.attn.key", "layer_{}/self_attention/linear_0:k", _NO_BIAS),
    _Row("layers.{}.self_attn.v_proj", "blocks.{}.attn.value", "layer_{}/self_attention/linear_0:v", _LINEAR),
    _Row("layers.{}.self_attn.out_proj", "blocks.{}.attn.out", "layer_{}/self_attention/linear_1", _LINEAR),
    _Row("layers.{}.fc1", "blocks.{}.mlp.0", "layer_{}/ffn/linear_0", _LINEAR),
    _Row("layers.{}.fc2", "blocks.{}.mlp.2", "layer_{}/ffn/linear_1", _LINEAR),
    _Row("layers.{}.final_layer_norm", "blocks.{}.mlp_ln", "layer_{}/ffn/layer_norm", _NORM),
)
_ENCODER = (
    _Row("conv1", "conv1", "conv1", _CONV),
    _Row("conv2", "conv2", "conv2", _CONV),
    *_LAYER,
    _Row("layer_norm", "ln_post", "layer_norm", _NORM),
)
_DECODER = (
    _Row("embed_tokens", "token_embedding", "embeddings", ("embedding",)),
    _Row("embed_positions", "positional_embedding", "position_encodings", ("positions",)),
    *_LAYER,
    _Row("layers.{}.encoder_attn_layer_norm", "blocks.{}.cross_attn_ln", "layer_{}/attention/layer_norm", _NORM),
    _Row("layers.{}.encoder_attn.q_proj", "blocks.{}.cross_attn.query", "layer_{}/attention/linear_0", _LINEAR),
    _Row("layers.{}.encoder_attn.k_proj", "blocks.{}.cross_attn.key", "layer_{}/attention/linear_1:k", _NO_BIAS),
    _Row("layers.{}.encoder_attn.v_proj", "blocks.{}.cross_attn.value", "layer_{}/attention/linear_1:v", _LINEAR),
    _Row("layers.{}.encoder_attn.out_proj", "blocks.{}.cross_attn.out", "layer_{}/attention/linear_2", _LINEAR),
    _Row("layer_norm", "ln", "layer_norm", _NORM),
)

# Module name in each format, given side and row.
_MODULE: dict[str, Callable[[str, _Row], str]] = {
    "hf": lambda side, row: f"model.{side}.{row.name}",
    "openai": lambda side, row: f"{side}.{row.openai}",
    "mlx": lambda side, row: f"{side}.{row.openai}".replace("mlp.0", "mlp1").replace("mlp.2", "mlp2"),
    "ggml": lambda side, row: f"{side}.{row.openai}",
    "ct2": lambda side, row: f"{side}/{row.ct2}",
    "flax": lambda side, row: f"model/{side}/{row.name}".replace(".", "/"),
}
COLUMNS = tuple(_MODULE)

# Suffixes of array names, and the permutation from stored to model axes.
_TORCH = {
    "kernel": (".weight", (1, 0)),  # stored [out,in]
    "conv": (".weight", (2, 1, 0)),  # stored [out,in,k]
    "scale": (".weight", (0,)),
    "bias": (".bias", (0,)),
    "embedding": (".weight", (0, 1)),
    "positions": (".weight", (0, 1)),
}
_OPENAI = {**_TORCH, "positions": ("", (0, 1))}
_ENDS: dict[str, dict[str, tuple[str, Axes]]] = {
    "hf": _TORCH,
    "openai": _OPENAI,
    "mlx": {**_OPENAI, "conv": (".weight", (1, 2, 0))},  # stored [out,k,in]
    "ggml": _OPENAI,
    "ct2": {
        "kernel": ("/weight", (1, 0)),
        "conv": ("/weight", (2, 1, 0)),
        "scale": ("/gamma", (0,)),
        "bias": ("/bias", (0,)),
        "beta": ("/beta", (0,)),  # a LayerNorm's bias
        "embedding": ("/weight", (0, 1)),
        "positions": ("/encodings", (0, 1)),
    },
    "flax": {
        "kernel": ("/kernel", (0, 1)),
        "conv": ("/kernel", (0, 1, 2)),
        "scale": ("/scale", (0,)),
        "bias": ("/bias", (0,)),
        "embedding": ("/embedding", (0, 1)),
        "positions": ("/embedding", (0, 1)),
    },
}

# Computed if a file lacks them.
SINUSOIDS = Parameter(
    ("encoder", "embed_positions"),
    {
        "hf": Stored("model.encoder.embed_positions.weight", (0, 1)),
        "openai": Stored("encoder.positional_embedding", (0, 1)),
        "ggml": Stored("encoder.positional_embedding", (0, 1)),
        "ct2": Stored("encoder/position_encodings/encodings", (0, 1)),
        "flax": Stored("model/encoder/embed_positions/embedding", (0, 1)),
    },
)
# Only if the output layer is not tied to the embedding.
PROJ_OUT = Parameter(
    ("decoder", "proj_out", "kernel"),
    {
        "hf": Stored("proj_out.weight", (1, 0)),
        "ct2": Stored("decoder/projection/weight", (1, 0)),
        "flax": Stored("lm_head/kernel", (0, 1)),
    },
)


def path_of(dotted: str) -> Path:
    """Splits 'decoder.layers.0.fc1' into ('decoder', 'layers', 0, 'fc1')."""
    return tuple(int(part) if part.isdigit() else part for part in dotted.split("."))


def parameters(config: WhisperConfig) -> tuple[Parameter, ...]:
    """Lists all arrays of a model of this configuration."""
    found = [SINUSOIDS] if config.tie_word_embeddings else [SINUSOIDS, PROJ_OUT]
    sides = (("encoder", _ENCODER, config.encoder_layers), ("decoder", _DECODER, config.decoder_layers))
    for side, rows, layers in sides:
        for row in rows:
            for array in row.arrays:
                path = f"{side}.{row.name}.{_NNX_END.get(array, 'embedding')}"
                stored = {format: _stored(format, side, row, array) for format in COLUMNS}
                for layer in map(str, range(layers if "{}" in row.name else 1)):
                    names = {f: Stored(s.name.replace("{}", layer), s.axes) for f, s in stored.items()}
                    found.append(Parameter(path_of(path.replace("{}", layer)), names))
    return tuple(found)


def _stored(format: str, side: str, row: _Row, array: str) -> Stored:
    kinds = _ENDS[format]
    end, axes = kinds.get("beta" if row.arrays == _NORM and array == "bias" else array, kinds[array])
    module, colon, part = _MODULE[format](side, row).partition(":")
    return Stored(f"{module}{end}{colon}{part}", axes)
