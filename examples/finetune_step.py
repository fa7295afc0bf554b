"""Trains a small Whisper with optax on one batch, with a jitted step and a donated state.

    python examples/finetune_step.py

To fine-tune a trained model, use `load_model(...)`, mels of recordings and the token ids of their texts.
"""

from functools import partial
from typing import Any

import jax
import optax
from flax import nnx

from whisper_nnx import Whisper, WhisperConfig

STEPS = 20
config = WhisperConfig(
    d_model=64,
    encoder_layers=1,
    encoder_attention_heads=2,
    decoder_layers=1,
    decoder_attention_heads=2,
    vocab_size=100,
    max_source_positions=100,  # 2 s
    max_target_positions=16,
    dropout=0.1,
)
model = Whisper(config, rngs=nnx.Rngs(0))

# Trained arrays, other arrays (the encoder's sinusoids) and the structure, which is hashable.
structure, params, constants = nnx.split(model, nnx.Param, ...)
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
state = (params, optimizer.init(params))


def loss_of(params: Any, constants: Any, mel: jax.Array, ids: jax.Array, key: jax.Array) -> jax.Array:
    """Mean cross-entropy of each of ids [B,S] given mel [B,M,T] and the previous ids."""
    model = nnx.merge(structure, params, constants)
    rngs = nnx.Rngs(dropout=key)  # created here, since its counter must stay within one JAX transformation
    logits = model(mel, ids[:, :-1], deterministic=False, rngs=rngs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


@partial(jax.jit, donate_argnums=0)  # the new state reuses the memory of the old one, which is deleted
def train_step(state: Any, constants: Any, mel: jax.Array, ids: jax.Array, key: jax.Array) -> tuple[Any, jax.Array]:
    params, moments = state
    loss, gradient = jax.value_and_grad(loss_of)(params, constants, mel, ids, key)
    updates, moments = optimizer.update(gradient, moments, params)
    return (optax.apply_updates(params, updates), moments), loss


mel_key, ids_key, dropout_key = jax.random.split(jax.random.key(0), 3)
mel = jax.random.normal(mel_key, (4, config.num_mel_bins, 2 * config.max_source_positions))
ids = jax.random.randint(ids_key, (4, config.max_target_positions), 0, config.vocab_size)

for step, key in enumerate(jax.random.split(dropout_key, STEPS)):
    state, loss = train_step(state, constants, mel, ids, key)
    print(f"step {step:2} loss {loss:.3f}")

nnx.update(model, state[0])  # the trained parameters, back into the module
