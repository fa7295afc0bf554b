"""AdamW with warm-up, decay, clipping and accumulation (Loshchilov & Hutter 2019), and averaged weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from whisper_nnx.training.config import OptimizerConfig

Arrays = Mapping[str, jax.Array]
_DECAYS: dict[str, Callable[[jax.Array], jax.Array]] = {  # of the part that is done, 0 to 1
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + jnp.cos(jnp.pi * done)) / 2,
    "constant": jnp.ones_like,
}


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Steps (batches) done -> the rate: up to the full one in `warmup_steps`, then down to 0 at `steps`.

    Raises ValueError for an unknown decay or a negative warm-up.
    """
    if config.decay not in _DECAYS:
        raise ValueError(f"optimizer.decay={config.decay!r} is unknown; choose one of {', '.join(_DECAYS)}")
    if config.warmup_steps < 0:
        raise ValueError(f"optimizer.warmup_steps={config.warmup_steps} must be at least 0")

    def rate(step: jax.Array) -> jax.Array:
        # + 1: the first step is not lost on a rate of 0, nor the last.
        up = jnp.minimum(1, (step + 1) / max(1, config.warmup_steps))
        done = jnp.clip((step - config.warmup_steps) / max(1, steps - config.warmup_steps), 0, 1)
        return config.learning_rate * up * _DECAYS[config.decay](done)

    return rate


def is_decayed(path: str) -> bool:
    """Weight decay is for the matrices: not for biases, norms and the tables of embeddings' positions."""
    name = path.rsplit(".", 1)[-1]
    return name not in ("bias", "scale") and "embed_positions" not in path


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """For a flat dict of parameters by path; `steps` are batches, of which `accumulate` make one update.

    The gradients of the batches of an update are averaged, then clipped: where the batches count the same number of
    tokens that is the gradient of one large batch.
    """
    if config.accumulate < 1:
        raise ValueError(f"optimizer.accumulate={config.accumulate} must be at least 1")
    rate = learning_rate(config, steps)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    adam = optax.adamw(
        lambda updates: rate(updates * config.accumulate),
        *config.betas,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=lambda params: {path: is_decayed(path) for path in params},
    )
    chain = optax.chain(clip, adam)
    if config.accumulate == 1:
        return chain
    return optax.MultiSteps(chain, config.accumulate).gradient_transformation()


def averaged(ema: Arrays, params: Arrays, decay: float, updates: jax.Array) -> dict[str, jax.Array]:
    """The moving average after one more update; `updates` were done before it.

    In the first updates it forgets faster (as TensorFlow's does), so that a short run is not an average with its start.
    """
    keep = jnp.minimum(decay, (1 + updates) / (10 + updates))
    return {path: keep * ema[path] + (1 - keep) * params[path] for path in params}
