"""Loads a checkpoint in float32, bfloat16 and float16 and compares parameter memory and logits.

python examples/half_precision.py path/to/checkpoint recording.wav
python examples/half_precision.py tiny recording.wav
"""

import argparse

import jax
import jax.numpy as jnp
from flax import nnx

from whisper_nnx import decode, load_audio, load_model, log_mel_spectrogram

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint", help="a folder, a short name or a Hugging Face id")
parser.add_argument("audio")
args = parser.parse_args()

exact = load_model(args.checkpoint, dtype=jnp.float32)
# The first 30 s; silence fills the window, as in training.
mel = log_mel_spectrogram(load_audio(args.audio), exact.config.num_mel_bins, padding=480_000)[:, :3000]
decoded = decode(exact, mel)
ids = jnp.array([[*exact.tokenizer.sot_sequence(decoded.language), *decoded.tokens]])
print(decoded.text)

logits_of = jax.jit(lambda model, mel, ids: model(mel, ids))  # always float32, as are LayerNorm and softmax
expected = logits_of(exact, mel[None], ids)
print(f"logits {expected.shape}: standard deviation {expected.std():.2f}")

for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
    # dtype is that of the computation and, unless `weights` is given, of the parameters.
    model = load_model(args.checkpoint, dtype=dtype)
    megabytes = sum(p.nbytes for p in jax.tree.leaves(nnx.state(model, nnx.Param))) / 1e6
    logits = logits_of(model, mel[None], ids)
    same = (logits.argmax(-1) == expected.argmax(-1)).sum()
    print(
        f"{jnp.dtype(dtype).name:<9}{megabytes:>8,.1f} MB   logits differ by {abs(logits - expected).mean():.4f} on "
        f"average, {abs(logits - expected).max():.4f} at most; same best token at {same} of {ids.shape[1]} positions"
    )
