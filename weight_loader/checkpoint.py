"""`Checkpoint`, which readers return, and `Content`, which writers take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
import numpy as np

from weight_loader.folder import CheckpointError
from weight_loader.names import SINUSOIDS, Path, Stored, parameters
from whisper_nnx.model.config import WhisperConfig
from whisper_nnx.text.tokenizer import Tokenizer

# Far above any Whisper: bounds the memory that a damaged or hostile file can claim.
_LIMITS = {
    "d_model": 16_384,
    "encoder_layers": 128,
    "decoder_layers": 128,
    "vocab_size": 2_000_000,
    "num_mel_bins": 4_096,
    "max_source_positions": 100_000,
    "max_target_positions": 100_000,
    "encoder_ffn_dim": 131_072,
    "decoder_ffn_dim": 131_072,
}
_FIXED_FFN = ("openai", "mlx", "ggml")  # formats that do not store the MLP width


@dataclass
class Checkpoint:
    """Result of a reader: lazily read tensors under the format's names, configuration and tokenizer.

    Raises CheckpointError for a configuration beyond the supported limits.
    """

    format: str  # one of names.COLUMNS
    where: str  # for messages
    config: WhisperConfig  # with alignment_heads if the format stores them
    tokenizer: Tokenizer | None  # None: the format has none
    tensors: Iterator[tuple[str, np.ndarray]]  # read one at a time; floating point, dequantized if necessary
    details: dict[str, str] = field(default_factory=dict)  # for `inspect`: quantization, stored dtypes, ...

    def __post_init__(self) -> None:
        for name, limit in _LIMITS.items():
            if (value := getattr(self.config, name)) > limit:
                raise CheckpointError(
                    f"{self.where}: {name}={value} exceeds the supported maximum of {limit}; it may be malicious"
                )


@dataclass(frozen=True)
class Content:
    """A complete model for writers: arrays by path in the NNX state, in the model's axis order."""

    config: WhisperConfig
    tokenizer: Tokenizer | None
    arrays: Mapping[Path, Any]

    @property
    def dtype(self) -> str:
        """Name of the dtype with the most elements."""
        sizes: dict[str, int] = {}
        for array in self.arrays.values():
            sizes[str(array.dtype)] = sizes.get(str(array.dtype), 0) + array.size
        return max(sizes, key=lambda name: sizes[name])

    def tensors(self, format: str, dtype: str | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the name and contiguous array of every parameter in the format's layout; dtype None keeps the dtype.

        Raises CheckpointError for arrays that the format cannot store, and for values that overflow the dtype.
        """
        for path, stored in self.table(format):
            yield stored.name, self.laid_out(path, stored, dtype)

    def table(self, format: str) -> list[tuple[Path, Stored]]:
        """Lists each array that the format stores: its path in the model, its name and axes in the format.

        Raises CheckpointError for an array that the format cannot store.
        """
        config = self.config
        if format in _FIXED_FFN and (config.encoder_ffn_dim, config.decoder_ffn_dim) != (4 * config.d_model,) * 2:
            ffn = f"encoder_ffn_dim={config.encoder_ffn_dim}, decoder_ffn_dim={config.decoder_ffn_dim}"
            raise CheckpointError(f"the format {format} supports only 4 * d_model, not {ffn}; write the model as hf")
        rows = parameters(config)
        lost = [p.path for p in rows if format not in p.stored and p.path != SINUSOIDS.path]  # these can be computed
        if lost:
            names = ", ".join(".".join(map(str, path)) for path in lost)
            raise CheckpointError(f"the format {format} cannot store {names}; write the model as hf")
        return [(p.path, p.stored[format]) for p in rows if format in p.stored]

    def laid_out(self, path: Path, stored: Stored, dtype: str | None) -> np.ndarray:
        """Returns one array in the format's layout. Raises CheckpointError if its values overflow the dtype."""
        array = np.ascontiguousarray(np.asarray(self.arrays[path]).transpose(stored.stored_axes))
        if dtype is None or array.dtype == np.dtype(dtype):
            return array
        with np.errstate(over="ignore"):
            cast = array.astype(dtype)
        if not np.isfinite(cast.astype(np.float32)).all() and np.isfinite(array.astype(np.float32)).all():
            name = ".".join(map(str, path))
            raise CheckpointError(f"{name} has values beyond the range of {dtype}; choose float32 or bfloat16")
        return cast
