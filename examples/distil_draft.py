"""Makes a draft for speculative decoding: a model's encoder with a few of its decoder layers, trained on its own text.

    python examples/distil_draft.py CHECKPOINT my-draft talk.mp3 interview.wav --layers 2 --steps 200

No transcripts are needed: the draft learns what the model writes, timestamps included. Recordings should be like those
to come; hours of them make a better draft than minutes. All windows are kept in memory, 3 MB each for `base`.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from whisper_nnx import Whisper, decode, load_audio, load_model, log_mel_spectrogram, pad_or_trim, save_pretrained
from whisper_nnx.training.config import DistillConfig
from whisper_nnx.training.distill import make_student

RATE, WINDOW_S = 16_000, 30
parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
parser.add_argument("checkpoint")
parser.add_argument("out", help="folder of the draft")
parser.add_argument("audio", nargs="+")
parser.add_argument("--layers", type=int, default=2, help="decoder layers of the draft")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--batch_size", type=int, default=4)
parser.add_argument("--learning_rate", type=float, default=3e-4)
parser.add_argument("--stride_s", type=float, default=10.0, help="seconds from one window of 30 s to the next")
args = parser.parse_args()


def windows_of(model: Whisper, audio: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Encoder output [T,D] of overlapping windows, and what the model writes about each [longest+1]."""
    samples, found = load_audio(audio), []
    for start in range(0, len(samples), round(args.stride_s * RATE)):
        mel = log_mel_spectrogram(pad_or_trim(samples[start : start + WINDOW_S * RATE]), model.config.num_mel_bins)
        features = model.encode(mel[None])
        [result] = decode(model, features)
        assert model.tokenizer is not None
        text = [*model.tokenizer.sot_sequence(result.language, "transcribe"), *result.tokens][:longest]
        ids = np.full(longest + 1, model.tokenizer.special.eot)
        ids[: len(text)] = text
        found.append((np.asarray(features[0]), ids))
    return found


model = load_model(args.checkpoint)
longest = min(128, model.config.max_target_positions)  # texts are cut
windows = [window for audio in args.audio for window in windows_of(model, audio)]
print(f"{len(windows)} windows, {sum(int((ids != ids[-1]).sum()) for _, ids in windows)} tokens")

draft = make_student(model, DistillConfig(decoder_layers=args.layers))
structure, trained, fixed = nnx.split(draft.decoder, nnx.PathContains("layers"), ...)  # embeddings are the model's
schedule = optax.warmup_cosine_decay_schedule(0.0, args.learning_rate, args.steps // 10, args.steps)
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
state = (trained, optimizer.init(trained))


def loss_of(trained: Any, fixed: Any, features: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy of ids [B,S+1] given features [B,T,D], and how many the draft would propose."""
    logits = nnx.merge(structure, trained, fixed)(ids[:, :-1], features)
    counts = jnp.cumsum(ids[:, :-1] == model.tokenizer.special.eot, axis=1) == 0  # the first end counts, as a label
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
    right = (jnp.argmax(logits, axis=-1) == ids[:, 1:]) & counts
    return (losses * counts).sum() / counts.sum(), right.sum() / counts.sum()


@partial(jax.jit, donate_argnums=0)
def train_step(state: Any, fixed: Any, features: jax.Array, ids: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
    trained, moments = state
    (loss, accuracy), gradient = jax.value_and_grad(loss_of, has_aux=True)(trained, fixed, features, ids)
    updates, moments = optimizer.update(gradient, moments, trained)
    return (optax.apply_updates(trained, updates), moments), loss, accuracy


random = np.random.default_rng(0)
for step in range(args.steps):
    chosen = random.choice(len(windows), min(args.batch_size, len(windows)), replace=False)
    features, ids = (np.stack([windows[i][part] for i in chosen]) for part in (0, 1))
    state, loss, accuracy = train_step(state, fixed, features, ids)
    if step % 10 == 0 or step == args.steps - 1:
        print(f"step {step:3} loss {loss:.3f}, {accuracy:.0%} of the tokens", flush=True)

nnx.update(draft.decoder, state[0])
save_pretrained(draft, args.out)
