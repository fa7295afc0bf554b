"""Decodes with several checkpoints of one shape at once: vmap over their stacked arrays, logits averaged.

python examples/ensemble.py AUDIO CHECKPOINT CHECKPOINT ...
"""

import argparse

import jax
import jax.numpy as jnp

from whisper_nnx import load_audio, load_model, log_mel_spectrogram

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("audio")
parser.add_argument(
    "checkpoints", nargs="+", help="of one size and vocabulary: fine-tuned ones, or epochs of a training"
)
parser.add_argument("--language", default="en")
args = parser.parse_args()

models = [load_model(name) for name in args.checkpoints]
# A model is a pytree: one with a leading axis on each array stands for all of them.
stack, tokenizer = jax.tree.map(lambda *arrays: jnp.stack(arrays), *models), models[0].tokenizer
# The first 30 s; silence fills the window, as in training.
mel = log_mel_spectrogram(load_audio(args.audio), models[0].config.num_mel_bins, padding=480_000)[:, :3000]
encoded = jax.jit(jax.vmap(lambda model: model.encode(mel[None])))(stack)  # [N,1,T,D]


@jax.jit
def next_token(stack, encoded, ids, length):
    """ids [S], of which the first `length` count -> the most probable next text token, or the end."""
    logits = jax.vmap(lambda model, audio: model.decode(ids[None], audio))(stack, encoded)  # [N,1,S,V]
    return jnp.argmax(logits.mean(axis=0)[0, length - 1, : tokenizer.special.eot + 1])


start = tokenizer.sot_sequence(args.language, "transcribe", timestamps=False)
ids, length = jnp.full(128, tokenizer.special.eot).at[: len(start)].set(jnp.array(start)), len(start)
while length < len(ids) and (token := next_token(stack, encoded, ids, length)) != tokenizer.special.eot:
    ids, length = ids.at[length].set(token), length + 1
print(tokenizer.decode(ids[len(start) : length].tolist()).strip())
