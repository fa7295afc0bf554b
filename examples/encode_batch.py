"""Encodes a batch of windows with jit, and one window at many gains with vmap; times compilation and running.

python examples/encode_batch.py
python examples/encode_batch.py --size base --batch 8
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from whisper_nnx import Whisper, create_whisper, log_mel_spectrogram

WINDOW = 30 * 16_000  # samples


def timed(what: str, function: Callable[..., Any], *args: Any) -> Any:
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))  # JAX returns before the work is done
    print(f"{what:<32}{time.perf_counter() - start:7.2f} s")
    return result


@jax.jit
def encode(model: Whisper, mel: jax.Array) -> jax.Array:
    """Encodes mel [B,M,T] to [B,T/2,D]. The model is an argument, since closed-over weights become constants."""
    return model.encode(mel)


def encode_at(model: Whisper, waveform: jax.Array, gain: jax.Array) -> jax.Array:
    """Encodes one window [N] at one gain to [T/2,D], written without a batch."""
    return model.encode(log_mel_spectrogram(gain * waveform)[None])[0]


encode_at_all = jax.jit(jax.vmap(encode_at, in_axes=(None, None, 0)))  # only the gain has a batch axis

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()

    model = create_whisper(args.size)
    waveforms = 0.1 * jax.random.normal(jax.random.key(0), (args.batch, WINDOW))
    mel = log_mel_spectrogram(waveforms, model.config.num_mel_bins)
    print(f"mel {mel.shape}, on {jax.devices()[0].device_kind}")

    program = timed("encode: compile", lambda: encode.lower(model, mel).compile())
    timed("encode: first run", program, model, mel)
    features = timed("encode: second run", program, model, mel)
    print(f"features {features.shape}, {features.dtype}")

    gains = jnp.array([0.25, 0.5, 1.0, 2.0])
    program = timed("vmap over gains: compile", lambda: encode_at_all.lower(model, waveforms[0], gains).compile())
    at_gains = timed("vmap over gains: run", program, model, waveforms[0], gains)
    difference = abs(at_gains[2] - features[0]).max()
    print(f"features {at_gains.shape}; at gain 1 they differ by {difference:.1e} from those of the batch")
