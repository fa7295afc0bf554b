"""Plots where a Whisper attends to a word: the gradient of its log-probability, over the spectrogram.

    python examples/word_saliency.py path/to/checkpoint recording.wav
    python examples/word_saliency.py tiny recording.wav --seconds 11 --words country ask --out country.png

The spectrogram is drawn once per word. Red: the squared gradient of the word's log-probability, given the previous
words, with respect to the mel. Blue: the word's start and end by cross-attention (`word_timestamps`).
"""

import argparse
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.signal import convolve
from matplotlib.figure import Figure

from whisper_nnx import Whisper, decode, load_audio, load_model, log_mel_spectrogram
from whisper_nnx.timing.token_times import align_tokens
from whisper_nnx.timing.words import words_from_tokens
from whisper_nnx.transcription.windows import encode_windows


@jax.jit
@jax.grad
def gradient_in_mel(mel: jax.Array, model: Whisper, ids: jax.Array, first: int, end: int) -> jax.Array:
    """Gradient of the log-probability of ids[first:end] (ids [S]), each given mel [1,M,T] and all previous ids."""
    log_probs = jax.nn.log_softmax(model(mel, ids[None, :-1])[0])
    chosen = jnp.take_along_axis(log_probs, ids[1:, None], axis=-1)[:, 0]
    position = jnp.arange(1, len(ids))
    return jnp.sum(chosen, where=(first <= position) & (position < end))


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint", help="a folder, a short name or a Hugging Face id")
parser.add_argument("audio")
parser.add_argument("--seconds", type=float, default=5.0, help="seconds from the start, at most 30")
parser.add_argument("--words", nargs="+", type=str.lower, help="default: all transcribed words")
parser.add_argument("--out", default="saliency.png")
args = parser.parse_args()

model = load_model(args.checkpoint)
audio = load_audio(args.audio)[: int(16_000 * min(args.seconds, 30))]
mel = log_mel_spectrogram(audio, model.config.num_mel_bins, padding=480_000)[:, :3000]  # silence fills the window
decoded = decode(model, mel, without_timestamps=True)
tokenizer = model.tokenizer
start_ids = tokenizer.sot_sequence(decoded.language, timestamps=False)
ids = jnp.array([*start_ids, *decoded.tokens])

# Words, their tokens and times.
cross, positions = encode_windows(model, mel[None]).cross, len(audio) // 320  # of 20 ms
texts = {"starts": [start_ids], "texts": [decoded.tokens], "positions": [positions]}
[(begins_s, probabilities)] = align_tokens(model.decoder, cross, model.config, **texts, eot=tokenizer.special.eot)
words = words_from_tokens(tokenizer, decoded.tokens, begins_s, probabilities, decoded.language)
ends = np.cumsum([len(start_ids), *(len(word.tokens) for word in words)])
found = [(word.word.strip(), word, first, end) for word, (first, end) in zip(words, pairwise(ends), strict=True)]
named = [entry for entry in found if not args.words or entry[0].lower() in args.words]
shown = [entry for entry in named if any(map(str.isalnum, entry[0]))]  # without punctuation
if not shown:
    parser.error(f"none of these words was transcribed in the first {args.seconds:g} s, only: {decoded.text!r}")

figure = Figure(figsize=(10, 1.2 * len(shown) + 0.5), layout="constrained")
rows = figure.subplots(len(shown), sharex=True, squeeze=False)[:, 0]
n_frames = len(audio) // 160  # of 10 ms; the rest is silence
place = {"origin": "lower", "aspect": "auto", "extent": (0, n_frames / 100, 0, len(mel))}
for axes, (text, word, first, end) in zip(rows, shown, strict=True):
    gradient = gradient_in_mel(mel[None], model, ids, first, end)[0, :, :n_frames]
    strength = convolve(gradient**2, jnp.ones((5, 5)), mode="same")  # smooths single points
    strongest_s = strength.sum(axis=0).argmax() / 100
    print(f"{text:<12} strongest at {strongest_s:5.2f} s; by cross-attention {word.start:5.2f} - {word.end:5.2f} s")
    axes.imshow(mel[:, :n_frames], cmap="gray", **place)
    axes.imshow(jnp.ones_like(strength), cmap="autumn", alpha=np.array(strength / strength.max()), **place)
    axes.vlines([word.start, word.end], 0, len(mel), color="deepskyblue", linestyle="--")
    axes.set_yticks([])
    axes.set_ylabel(text, rotation="horizontal", ha="right")
rows[-1].set_xlabel("time (s)")
figure.savefig(args.out, dpi=150)
