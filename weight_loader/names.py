"""What every parameter is called: in the NNX state, at Hugging Face, in openai-whisper; and how its axes lie there.

A row per module, a column per naming. `parameters` expands it to an entry per array of a given model, so that what is
missing or unexpected in a checkpoint is a set difference. Another format is another column.
"""

from __future__ import annotations

from typing import NamedTuple

from whisper_nnx.config import WhisperConfig

Path = tuple[str | int, ...]  # in the NNX state: ("decoder", "layers", 0, "fc1", "kernel")


class Parameter(NamedTuple):
    """One array: where it lives in the model and what it is called in the files (None: it is not stored there).

    `axes` are the stored array's axes in the model's order: `stored.transpose(axes)`; `stored_axes` lead back.
    """

    path: Path
    huggingface: str
    openai: str | None
    axes: tuple[int, ...]

    @property
    def stored_axes(self) -> tuple[int, ...]:
        return tuple(self.axes.index(axis) for axis in range(len(self.axes)))


# How the names of a module's arrays end: NNX, Hugging Face, openai-whisper; axes.
_BIAS = (".bias", ".bias", ".bias", (0,))
_KERNEL = (".kernel", ".weight", ".weight", (1, 0))  # stored [out,in]
_LINEAR = (_KERNEL, _BIAS)
_NO_BIAS = (_KERNEL,)
_CONV = ((".kernel", ".weight", ".weight", (2, 1, 0)), _BIAS)  # stored [out,in,k]
_NORM = ((".scale", ".weight", ".weight", (0,)), _BIAS)
_EMBED = ((".embedding", ".weight", ".weight", (0, 1)),)
_POSITIONS = ((".embedding", ".weight", "", (0, 1)),)

# NNX and Hugging Face (the model's modules are named after theirs), openai-whisper; arrays. {} is the layer.
_LAYER = (
    ("layers.{}.self_attn_layer_norm", "blocks.{}.attn_ln", _NORM),
    ("layers.{}.self_attn.q_proj", "blocks.{}.attn.query", _LINEAR),
    ("layers.{}.self_attn.k_proj", "blocks.{}.attn.key", _NO_BIAS),
    ("layers.{}.self_attn.v_proj", "blocks.{}.attn.value", _LINEAR),
    ("layers.{}.self_attn.out_proj", "blocks.{}.attn.out", _LINEAR),
    ("layers.{}.fc1", "blocks.{}.mlp.0", _LINEAR),
    ("layers.{}.fc2", "blocks.{}.mlp.2", _LINEAR),
    ("layers.{}.final_layer_norm", "blocks.{}.mlp_ln", _NORM),
)
_ENCODER = (
    ("conv1", "conv1", _CONV),
    ("conv2", "conv2", _CONV),
    *_LAYER,
    ("layer_norm", "ln_post", _NORM),
)
_DECODER = (
    ("embed_tokens", "token_embedding", _EMBED),
    ("embed_positions", "positional_embedding", _POSITIONS),
    *_LAYER,
    ("layers.{}.encoder_attn_layer_norm", "blocks.{}.cross_attn_ln", _NORM),
    ("layers.{}.encoder_attn.q_proj", "blocks.{}.cross_attn.query", _LINEAR),
    ("layers.{}.encoder_attn.k_proj", "blocks.{}.cross_attn.key", _NO_BIAS),
    ("layers.{}.encoder_attn.v_proj", "blocks.{}.cross_attn.value", _LINEAR),
    ("layers.{}.encoder_attn.out_proj", "blocks.{}.cross_attn.out", _LINEAR),
    ("layer_norm", "ln", _NORM),
)

# Computed where a file lacks them.
SINUSOIDS = Parameter(
    ("encoder", "embed_positions"), "model.encoder.embed_positions.weight", "encoder.positional_embedding", (0, 1)
)
# Only there where the embedding does not serve as the output layer too.
PROJ_OUT = Parameter(("decoder", "proj_out", "kernel"), "proj_out.weight", None, (1, 0))


def path_of(dotted: str) -> Path:
    """'decoder.layers.0.fc1' -> ('decoder', 'layers', 0, 'fc1')."""
    return tuple(int(part) if part.isdigit() else part for part in dotted.split("."))


def parameters(config: WhisperConfig) -> tuple[Parameter, ...]:
    """Every array of a model of this shape."""
    found = [SINUSOIDS] if config.tie_word_embeddings else [SINUSOIDS, PROJ_OUT]
    sides = (("encoder", _ENCODER, config.encoder_layers), ("decoder", _DECODER, config.decoder_layers))
    for side, rows, layers in sides:
        for name, openai, arrays in rows:
            for layer in range(layers if "{}" in name else 1):
                for end, hf_end, openai_end, axes in arrays:
                    module, openai_module = f"{side}.{name.format(layer)}", f"{side}.{openai.format(layer)}"
                    path = path_of(module + end)
                    found.append(Parameter(path, f"model.{module}{hf_end}", openai_module + openai_end, axes))
    return tuple(found)
