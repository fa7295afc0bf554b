"""What readers hand to the loader (`Checkpoint`) and the loader to the writers (`Content`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes  # noqa: F401  teaches numpy the name bfloat16
import numpy as np

from weight_loader.folder import CheckpointError
from weight_loader.names import SINUSOIDS, Path, Stored, parameters
from whisper_nnx.model.config import WhisperConfig
from whisper_nnx.text.tokenizer import Tokenizer

# Far above every Whisper: what a damaged or hostile file may ask for stays within what can be described in memory.
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
_FIXED_FFN = ("openai", "mlx", "ggml")  # formats that do not tell the width of the perceptrons


@dataclass
class Checkpoint:
    """What a reader found: lazily read tensors under the names of its format, and what came with them.

    Raises CheckpointError for a configuration that no Whisper has.
    """

    format: str  # one of names.COLUMNS
    where: str  # for messages
    config: WhisperConfig  # with alignment_heads where the format has them
    tokenizer: Tokenizer | None  # None: the format carries none
    tensors: Iterator[tuple[str, np.ndarray]]  # each read when its turn comes; floating, dequantized where need be
    details: dict[str, str] = field(default_factory=dict)  # for `inspect`: quantization, stored dtypes, ...

    def __post_init__(self) -> None:
        for name, limit in _LIMITS.items():
            if (value := getattr(self.config, name)) > limit:
                raise CheckpointError(
                    f"{self.where}: {name}={value} is no Whisper's (at most {limit}); do not trust it"
                )


@dataclass(frozen=True)
class Content:
    """A whole model as writers take it: arrays by their path in the NNX state, in the model's order of axes."""

    config: WhisperConfig
    tokenizer: Tokenizer | None
    arrays: Mapping[Path, Any]

    @property
    def dtype(self) -> str:
        """The dtype of most of its numbers, by name."""
        sizes: dict[str, int] = {}
        for array in self.arrays.values():
            sizes[str(array.dtype)] = sizes.get(str(array.dtype), 0) + array.size
        return max(sizes, key=lambda name: sizes[name])

    def tensors(self, format: str, dtype: str | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """Name and contiguous array of every parameter as the format lays it out, one at a time; dtype None: as it is.

        Raises CheckpointError for what the format has no place for, and for numbers that the dtype cannot hold.
        """
        for path, stored in self.table(format):
            yield stored.name, self.laid_out(path, stored, dtype)

    def table(self, format: str) -> list[tuple[Path, Stored]]:
        """Where each array that the format stores lies in the model, and its name and axes there.

        Raises CheckpointError for an array that the format has no place for.
        """
        config = self.config
        if format in _FIXED_FFN and (config.encoder_ffn_dim, config.decoder_ffn_dim) != (4 * config.d_model,) * 2:
            ffn = f"encoder_ffn_dim={config.encoder_ffn_dim}, decoder_ffn_dim={config.decoder_ffn_dim}"
            raise CheckpointError(f"the format {format} knows only 4 * d_model, not {ffn}; write the model as hf")
        rows = parameters(config)
        lost = [p.path for p in rows if format not in p.stored and p.path != SINUSOIDS.path]  # these can be computed
        if lost:
            names = ", ".join(".".join(map(str, path)) for path in lost)
            raise CheckpointError(f"the format {format} has no place for {names}; write the model as hf")
        return [(p.path, p.stored[format]) for p in rows if format in p.stored]

    def laid_out(self, path: Path, stored: Stored, dtype: str | None) -> np.ndarray:
        """One of them. Raises CheckpointError where the dtype cannot hold its numbers."""
        array = np.ascontiguousarray(np.asarray(self.arrays[path]).transpose(stored.stored_axes))
        if dtype is None or array.dtype == np.dtype(dtype):
            return array
        with np.errstate(over="ignore"):
            cast = array.astype(dtype)
        if not np.isfinite(cast.astype(np.float32)).all() and np.isfinite(array.astype(np.float32)).all():
            name = ".".join(map(str, path))
            raise CheckpointError(f"{name} has numbers beyond what {dtype} holds; choose float32 or bfloat16")
        return cast
