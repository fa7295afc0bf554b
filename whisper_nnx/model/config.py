"""`WhisperConfig`: the shape of a model; the table of released sizes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields, replace
from typing import Any

from whisper_nnx.model.heads import check_heads


@dataclass(frozen=True)
class WhisperConfig:
    """Decides all shapes of a model; field names are those of Hugging Face's `config.json`.

    `alignment_heads`: (layer, head) pairs whose cross-attention follows the audio in time; None if unknown.
    `condition_on_prev_tokens`: whether the model was trained with the text before a window; None if unknown.
    Raises ValueError for an impossible shape.
    """

    d_model: int
    encoder_layers: int
    encoder_attention_heads: int
    decoder_layers: int
    decoder_attention_heads: int
    vocab_size: int = 51865
    num_mel_bins: int = 80
    max_source_positions: int = 1500
    max_target_positions: int = 448
    encoder_ffn_dim: int = 0  # 0: four times d_model, as in the paper
    decoder_ffn_dim: int = 0
    dropout: float = 0.0
    tie_word_embeddings: bool = True
    alignment_heads: tuple[tuple[int, int], ...] | None = None
    condition_on_prev_tokens: bool | None = None

    def __post_init__(self):
        for name in ("encoder_ffn_dim", "decoder_ffn_dim"):
            object.__setattr__(self, name, getattr(self, name) or 4 * self.d_model)
        if self.alignment_heads is not None:
            pairs = tuple((int(layer), int(head)) for layer, head in self.alignment_heads)
            if pairs != tuple(map(tuple, self.alignment_heads)):
                raise ValueError(f"alignment_heads={self.alignment_heads} must be pairs of whole numbers")
            object.__setattr__(self, "alignment_heads", pairs)
        self._validate()

    def _validate(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{field.name}={value!r} must be a whole number of at least 1")
        for side in ("encoder", "decoder"):
            heads = getattr(self, f"{side}_attention_heads")
            if self.d_model % heads:
                raise ValueError(f"d_model={self.d_model} is not divisible by {side}_attention_heads={heads}")
        if self.d_model % 2 or self.d_model < 4:
            raise ValueError(f"d_model={self.d_model} must be even and at least 4: half are sines, half cosines")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")
        check_heads(self, self.alignment_heads or ())

    @classmethod
    def from_hf(cls, config: dict[str, Any], generation_config: dict[str, Any] | None = None) -> WhisperConfig:
        """Reads the contents of `config.json`, and of `generation_config.json` for fields that decide no shape.

        Alignment heads that the decoder lacks are ignored with a warning: distilled models often keep their teacher's
        file. Raises ValueError if `config.json` does not describe a Whisper or lacks a size.
        """
        if config.get("model_type", "whisper") != "whisper":
            raise ValueError(f"model_type={config['model_type']!r} is not 'whisper'; give a Whisper checkpoint")
        if config.get("activation_function", "gelu") != "gelu":
            raise ValueError(
                f"activation_function={config['activation_function']!r} is not supported; Whisper has 'gelu'"
            )
        required = ("d_model", "encoder_layers", "encoder_attention_heads", "decoder_layers", "decoder_attention_heads")
        if missing := [name for name in (*required, "vocab_size") if config.get(name) is None]:
            raise ValueError(f"config.json lacks {', '.join(missing)}; take it from the model's original repository")
        known = {name: config[name] for name in _names_of_shape() if config.get(name) is not None}
        generation_config = generation_config or {}
        conditioned = generation_config.get("condition_on_prev_tokens")
        made = cls(**known, condition_on_prev_tokens=conditioned if isinstance(conditioned, bool) else None)
        heads = generation_config.get("alignment_heads") or config.get("alignment_heads")
        try:
            return replace(made, alignment_heads=heads and tuple(map(tuple, heads)))
        except (TypeError, ValueError) as error:
            fix = "correct generation_config.json for good word times"
            warnings.warn(f"alignment_heads are ignored ({error}); {fix}", stacklevel=2)
            return made

    def to_hf(self) -> dict[str, Any]:
        """The model's part of a Hugging Face `config.json` (token ids belong to the tokenizer)."""
        own = {name: getattr(self, name) for name in _names_of_shape()}
        return {
            "model_type": "whisper",
            "architectures": ["WhisperForConditionalGeneration"],
            "activation_function": "gelu",
            "is_encoder_decoder": True,
            **own,
        }


def _names_of_shape() -> list[str]:
    """The fields that are in `config.json`."""
    elsewhere = ("alignment_heads", "condition_on_prev_tokens")
    return [field.name for field in fields(WhisperConfig) if field.name not in elsewhere]


def _size(d_model: int, layers: int, heads: int, **other: Any) -> WhisperConfig:
    both = {"encoder_layers": layers, "decoder_layers": layers}
    return WhisperConfig(
        **{**both, "d_model": d_model, "encoder_attention_heads": heads, "decoder_attention_heads": heads, **other}
    )


_ENGLISH_ONLY = {"vocab_size": 51864}
_V3 = {"vocab_size": 51866, "num_mel_bins": 128}

# Paper, table 1; large-v3 introduced 128 mels and Cantonese, turbo a decoder of four layers.
# Distilled models (distil-whisper) differ in the number of decoder layers and are read from their own config.json.
RELEASED: dict[str, WhisperConfig] = {
    "tiny": _size(384, 4, 6),
    "tiny.en": _size(384, 4, 6, **_ENGLISH_ONLY),
    "base": _size(512, 6, 8),
    "base.en": _size(512, 6, 8, **_ENGLISH_ONLY),
    "small": _size(768, 12, 12),
    "small.en": _size(768, 12, 12, **_ENGLISH_ONLY),
    "medium": _size(1024, 24, 16),
    "medium.en": _size(1024, 24, 16, **_ENGLISH_ONLY),
    "large-v1": _size(1280, 32, 20),
    "large-v2": _size(1280, 32, 20),
    "large-v3": _size(1280, 32, 20, **_V3),
    "large-v3-turbo": _size(1280, 32, 20, decoder_layers=4, **_V3),
}
ALIASES = {"large": "large-v3", "turbo": "large-v3-turbo"}

# Decoder (layer, head) pairs that follow the audio in time, as listed in openai-whisper 20250625.
# fmt: off
RELEASED_ALIGNMENT_HEADS: dict[str, tuple[tuple[int, int], ...]] = {
    "tiny": ((2, 2), (3, 0), (3, 2), (3, 3), (3, 4), (3, 5)),
    "tiny.en": ((1, 0), (2, 0), (2, 5), (3, 0), (3, 1), (3, 2), (3, 3), (3, 4)),
    "base": ((3, 1), (4, 2), (4, 3), (4, 7), (5, 1), (5, 2), (5, 4), (5, 6)),
    "base.en": ((3, 3), (4, 7), (5, 1), (5, 5), (5, 7)),
    "small": ((5, 3), (5, 9), (8, 0), (8, 4), (8, 7), (8, 8), (9, 0), (9, 7), (9, 9), (10, 5)),
    "small.en": (
        (6, 6), (7, 0), (7, 3), (7, 8), (8, 2), (8, 5), (8, 7), (9, 0), (9, 4), (9, 8), (9, 10),
        (10, 0), (10, 1), (10, 2), (10, 3), (10, 6), (10, 11), (11, 2), (11, 4),
    ),
    "medium": ((13, 15), (15, 4), (15, 15), (16, 1), (20, 0), (23, 4)),
    "medium.en": (
        (11, 4), (14, 1), (14, 12), (14, 14), (15, 4), (16, 0), (16, 4), (16, 9), (17, 12), (17, 14),
        (18, 7), (18, 10), (18, 15), (20, 0), (20, 3), (20, 9), (20, 14), (21, 12),
    ),
    "large-v1": ((9, 19), (11, 2), (11, 4), (11, 17), (22, 7), (22, 11), (22, 17), (23, 2), (23, 15)),
    "large-v2": (
        (10, 12), (13, 17), (16, 11), (16, 12), (16, 13), (17, 15), (17, 16), (18, 4), (18, 11), (18, 19),
        (19, 11), (21, 2), (21, 3), (22, 3), (22, 9), (22, 12), (23, 5), (23, 7), (23, 13), (25, 5),
        (26, 1), (26, 12), (27, 15),
    ),
    "large-v3": ((7, 0), (10, 17), (12, 18), (13, 12), (16, 1), (17, 14), (19, 11), (21, 4), (24, 1), (25, 6)),
    "large-v3-turbo": ((2, 4), (2, 11), (3, 3), (3, 6), (3, 11), (3, 14)),
}
# fmt: on

# Heads that follow text in pieces of at most three letters (see timing/word_times.py). tiny.en: the ranking of
# find_alignment_heads on real speech, since the heads above lag by 0.1 s on such pieces. base: the heads above, which
# follow them better than any ranked ones.
RELEASED_SHORT_PIECE_HEADS: dict[str, tuple[tuple[int, int], ...]] = {
    "tiny.en": ((0, 2), (1, 5), (2, 1), (2, 4), (2, 5), (3, 3), (3, 4), (3, 5)),
    "base": RELEASED_ALIGNMENT_HEADS["base"],
}


def released_alignment_heads(config: WhisperConfig) -> tuple[tuple[int, int], ...] | None:
    """Returns the alignment heads of the released size with this shape, or None.

    large-v1 and large-v2 have the same shape, which is taken for large-v2.
    """
    name = _released_name(config)
    return RELEASED_ALIGNMENT_HEADS[name] if name else None


def released_short_piece_heads(config: WhisperConfig) -> tuple[tuple[int, int], ...] | None:
    """Returns the heads that follow short pieces, for the released size with this shape; None if not measured."""
    return RELEASED_SHORT_PIECE_HEADS.get(_released_name(config) or "")


def _released_name(config: WhisperConfig) -> str | None:
    ignored: dict[str, Any] = {"alignment_heads": None, "condition_on_prev_tokens": None, "dropout": 0.0}
    ignored["max_source_positions"] = 1500  # fewer with audio_ctx
    shape = replace(config, **ignored)
    return next((name for name in reversed(RELEASED) if RELEASED[name] == shape), None)
