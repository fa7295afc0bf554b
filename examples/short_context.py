"""Makes short windows (audio_ctx) safe: the encoder learns to serve the decoder as it does in windows of 30 s.

    python examples/short_context.py CHECKPOINT OUT AUDIO ... [--contexts 200,400] [--steps 300]

Needs no texts: the model teaches itself. For each piece of audio it writes a text in a whole window; with the piece
alone, its next-token probabilities along that text shall be the same. Only the encoder is trained. OUT is a folder in
Hugging Face's format, for windows of these lengths and of 30 s.
"""

import argparse
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import whisper_nnx

parser = argparse.ArgumentParser()
parser.add_argument("checkpoint")
parser.add_argument("out")
parser.add_argument("audio", nargs="+")
parser.add_argument("--contexts", default="200,400", help="encoder positions of 20 ms")
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--learning_rate", type=float, default=1e-5)
parser.add_argument("--language", default="en")
args = parser.parse_args()

model = whisper_nnx.load_model(args.checkpoint, dtype=jnp.float32)
config, tokenizer = model.config, model.tokenizer
start = tokenizer.sot_sequence(args.language, "transcribe")
most = min(128, config.max_target_positions)  # ids of a text
recordings = [np.asarray(whisper_nnx.load_audio(path)) for path in args.audio]


@jax.jit
def teach(model: Any, mel: jax.Array, ids: jax.Array) -> jax.Array:
    return jax.nn.softmax(model(mel, ids))


def example(length: int) -> tuple[jax.Array, ...]:
    """A random piece of `length` positions: its mel [1,M,2*length], ids [1,S], the teacher's probabilities, a mask."""
    audio = recordings[random.integers(len(recordings))]
    first = random.integers(max(1, len(audio) - length * 320 + 1))
    piece = whisper_nnx.pad_or_trim(audio[first : first + length * 320], config.max_source_positions * 320)
    mel = whisper_nnx.log_mel_spectrogram(piece, config.num_mel_bins)[None]
    tokens = whisper_nnx.decode(model, mel[0], language=args.language).tokens
    ids = [*start, *tokens][:most]
    padded = np.full((1, most), tokenizer.special.eot)
    padded[0, : len(ids)] = ids
    mask = (np.arange(most) >= len(start) - 1) & (np.arange(most) < len(ids))  # the end of the text included
    return mel[..., : 2 * length], jnp.asarray(padded), teach(model, mel, jnp.asarray(padded)), jnp.asarray(mask)


structure, params, constants = nnx.split(model.encoder, nnx.Param, ...)
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(args.learning_rate, weight_decay=0.0))
params = jax.tree.map(jnp.copy, params)  # the student's; the teacher keeps its own
state = (params, optimizer.init(params))


def loss_of(params: Any, model: Any, mel: jax.Array, ids: jax.Array, taught: jax.Array, mask: jax.Array) -> jax.Array:
    """The divergence of the student's next-token distributions from the teacher's, per token."""
    encoded = nnx.merge(structure, params, constants)(mel)
    student = jax.nn.log_softmax(model.decode(ids, encoded))
    divergence = jnp.sum(taught * (jnp.log(taught + 1e-9) - student), axis=-1)[0]
    return jnp.sum(divergence * mask) / mask.sum()


@partial(jax.jit, donate_argnums=0)
def train_step(state: Any, model: Any, *example: jax.Array) -> tuple[Any, jax.Array]:
    params, moments = state
    loss, gradient = jax.value_and_grad(loss_of)(params, model, *example)
    updates, moments = optimizer.update(gradient, moments, params)
    return (optax.apply_updates(params, updates), moments), loss


random = np.random.default_rng(0)
contexts = [*map(int, args.contexts.split(","))]
losses = []
for step in range(args.steps):
    state, loss = train_step(state, model, *example(contexts[step % len(contexts)]))
    losses.append(float(loss))
    if (step + 1) % max(1, args.steps // 10) == 0:
        print(f"step {step + 1:4} divergence {np.mean(losses[-max(1, args.steps // 10) :]):.3f}")

nnx.update(model.encoder, state[0])
whisper_nnx.save_pretrained(model, args.out)
