"""AdamW (Loshchilov & Hutter 2019) or Muon (Jordan et al. 2024) with warm-up, decay, clipping and averaged weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from whisper_nnx.training.config import OptimizerConfig

Arrays = Mapping[str, jax.Array]
_DECAYS: dict[str, Callable[[jax.Array], jax.Array]] = {  # of the fraction done, 0 to 1
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + jnp.cos(jnp.pi * done)) / 2,
    "constant": jnp.ones_like,
}


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the schedule by steps (batches) done: linear warm-up, then decay to 0 at `steps`.

    Raises ValueError for an unknown decay or a negative warm-up.
    """
    if config.decay not in _DECAYS:
        raise ValueError(f"optimizer.decay={config.decay!r} is unknown; choose one of {', '.join(_DECAYS)}")
    if config.warmup_steps < 0:
        raise ValueError(f"optimizer.warmup_steps={config.warmup_steps} must be at least 0")

    def rate(step: jax.Array) -> jax.Array:
        # + 1 gives the first step a nonzero rate.
        up = jnp.minimum(1, (step + 1) / max(1, config.warmup_steps))
        done = jnp.clip((step - config.warmup_steps) / max(1, steps - config.warmup_steps), 0, 1)
        return config.learning_rate * up * _DECAYS[config.decay](done)

    return rate


def is_decayed(path: str) -> bool:
    """Whether a parameter has weight decay: matrices do, biases, norms and position embeddings do not."""
    name = path.rsplit(".", 1)[-1]
    return name not in ("bias", "scale") and "embed_positions" not in path


def is_matrix(path: str) -> bool:
    """Whether Muon updates a parameter: matrices inside layers and LoRA factors; not convolutions or embeddings."""
    return "layers." in path and path.endswith((".kernel", ".a", ".b"))


def orthogonalized(matrix: jax.Array) -> jax.Array:
    """Approximates U V^T of a matrix [M,N] = U S V^T by five Newton-Schulz steps.

    Computes what `optax.contrib.muon` does, with matmuls that are three times as fast on XLA's CPU backend.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (jnp.linalg.norm(wide) + 1e-8)
    for _ in range(5):
        square = jnp.dot(x, x.T)
        x = 3.4445 * x + jnp.dot(-4.775 * square + 2.0315 * jnp.dot(square, square), x)
    return x if wide is matrix else x.T


def _muon(rate: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """Muon for matrices. Entries move by about 0.2 * rate, as with AdamW, so one rate suits both."""

    def orthogonalize(updates: Any, _: Any) -> Any:
        return jax.tree.map(lambda x: 0.2 * max(x.shape) ** 0.5 * orthogonalized(x), updates)

    return optax.chain(
        optax.trace(0.95, nesterov=True),
        optax.stateless(orthogonalize),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(rate),
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Makes the optimizer for a flat dict of parameters by path; steps: batches, `accumulate` of which make an update.

    The gradients of an update's batches are averaged, then clipped; with equal numbers of tokens per batch this is the
    gradient of one large batch.
    """
    if config.accumulate < 1:
        raise ValueError(f"optimizer.accumulate={config.accumulate} must be at least 1")
    by_batch = learning_rate(config, steps)

    def rate(updates: jax.Array) -> jax.Array:
        return by_batch(updates * config.accumulate)

    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    update = optax.adamw(
        rate,
        *config.betas,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=lambda params: {path: is_decayed(path) for path in params},
    )
    if config.method == "muon":
        update = optax.partition(
            {True: _muon(rate, config.weight_decay), False: update},
            lambda params: {path: is_matrix(path) for path in params},
        )
    chain = optax.chain(clip, update)
    if config.accumulate == 1:
        return chain
    return optax.MultiSteps(chain, config.accumulate).gradient_transformation()


def averaged(ema: Arrays, params: Arrays, decay: float, updates: jax.Array) -> dict[str, jax.Array]:
    """Returns the moving average after one more update, following `updates` earlier ones.

    The first updates use a smaller decay, as in TensorFlow, so that the average of a short run excludes its start.
    """
    keep = jnp.minimum(decay, (1 + updates) / (10 + updates))
    return {path: keep * ema[path] + (1 - keep) * params[path] for path in params}
