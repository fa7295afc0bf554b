"""Losses, each a sum and a weight so that means are over the whole batch of all devices."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

_NEVER = -1e30  # finite stand-in for log(0)


class Mean(NamedTuple):
    """A sum and the total weight of its terms."""

    total: jax.Array
    weight: jax.Array

    @property
    def value(self) -> jax.Array:
        """The mean; 0 without terms."""
        return self.total / jnp.maximum(self.weight, 1)


def cross_entropy(
    logits: jax.Array, labels: jax.Array, weights: jax.Array, smoothing: float = 0.0
) -> tuple[Mean, Mean]:
    """Returns (cross-entropy, accuracy) over the weighted labels.

    logits: [B,S,V], float32. labels, weights: [B,S]. smoothing: target probability spread over the whole vocabulary.
    """
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    # A comparison instead of a gather: the gradient is one pass over the logits, without a scatter.
    hit = jnp.arange(logits.shape[-1]) == labels[..., None]
    right = jnp.where(hit, logits, 0).sum(axis=-1)
    loss = normalizer - (1 - smoothing) * right
    if smoothing:
        loss -= smoothing * logits.mean(axis=-1)
    count = weights.sum()
    best = jax.lax.stop_gradient(logits).max(axis=-1) <= jax.lax.stop_gradient(right)
    return Mean((loss * weights).sum(), count), Mean((best * weights).sum(), count)


def divergence(logits: jax.Array, teacher: jax.Array, weights: jax.Array, temperature: float) -> Mean:
    """Returns the Kullback-Leibler divergence of logits [B,S,V] from the teacher's at `temperature`; weights [B,S].

    Multiplied by temperature² so that gradients do not shrink with the temperature (Hinton et al. 2015).
    """
    ours = jax.nn.log_softmax(logits / temperature, axis=-1)
    theirs = jax.nn.log_softmax(teacher / temperature, axis=-1)
    per_label = (jnp.exp(theirs) * (theirs - ours)).sum(axis=-1) * temperature**2
    return Mean((per_label * weights).sum(), weights.sum())


def guide(scores: jax.Array, spans: jax.Array) -> Mean:
    """Guides attention to where each label is spoken: each third of the label's span should get a third of the weight.

    In nats, at best 0. Guiding to the span as a whole makes heads attend only to the start of each word, so boundaries
    come out early; guiding each position disturbs the rest of a trained decoder.

    scores: [B,A,S,T], of the guided heads, before the softmax. spans: [B,S,2], positions [first, end); (0, 0): unknown.
    """
    first, end = spans[:, None, :, :1], spans[:, None, :, 1:]
    at, length = jnp.arange(scores.shape[-1]), jnp.maximum(end - first, 1)
    third = jnp.where((first <= at) & (at < end), (at - first) * 3 // length, -1)  # two positions have two thirds
    inside = [jax.nn.logsumexp(jnp.where(third == part, scores, _NEVER), axis=-1) for part in range(3)]
    exists = [(third == part).any(axis=-1) for part in range(3)]
    count = jnp.maximum(sum(exists), 1)
    mean = sum(jnp.where(known, log_sum, 0) for known, log_sum in zip(exists, inside, strict=True)) / count
    loss = jnp.where(exists[0], jax.nn.logsumexp(scores, axis=-1) - mean - jnp.log(count), 0)
    return Mean(loss.sum(), exists[0].sum() * scores.shape[1])


def frames(logits: jax.Array, labels: jax.Array) -> Mean:
    """Returns the cross-entropy of CTC's classes per position: logits [B,T,C]; labels [B,T], -1 if unknown."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    hit = jnp.take_along_axis(log_probs, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    known = labels >= 0
    return Mean(-jnp.where(known, hit, 0).sum(), known.sum())


def ctc(logits: jax.Array, labels: jax.Array, empty: jax.Array, blank: int) -> Mean:
    """Returns the loss of connectionist temporal classification (Graves et al. 2006), per label.

    Rows with more labels than fit into T positions, or with labels that are not below `blank`, are ignored.

    Args:
      logits: [B,T,C].
      labels: [B,N], padded with -1.
      empty: [B], 1 for rows whose lack of labels counts (no speech).
      blank: the blank's class.
    """
    n_positions = logits.shape[1]
    there = labels >= 0
    lengths = there.sum(axis=1)
    repeats = ((labels[:, 1:] == labels[:, :-1]) & there[:, 1:]).sum(axis=1)
    fits = (lengths + repeats <= n_positions) & (labels < blank).all(axis=1)
    counted = fits & ((lengths > 0) | (empty > 0))
    labels = jnp.where(there & fits[:, None], labels, blank)[:, :n_positions]
    per_row = _ctc(logits, labels, jnp.where(fits, lengths, 0), blank)
    return Mean(jnp.where(counted, per_row, 0).sum(), (counted * jnp.maximum(lengths, 1)).sum())


@jax.custom_vjp
def _chain(log_probs: jax.Array, skip: jax.Array, end: jax.Array) -> jax.Array:
    """Returns the negative log-probability of all paths through chains of U states, [B].

    log_probs: [T,B,U], of each state at each position. skip: bool [B,U], whether a state is also reached from two
    states before. end: bool [B,U], final states. Paths start in the first two states.
    """
    return _chain_forward(log_probs, skip, end)[0]


def _walk(log_probs: jax.Array, start: jax.Array, skip: jax.Array) -> jax.Array:
    """Returns the log-probability of all paths from `start` (bool [B,U], first position) to each state, [T,B,U]."""

    def step(before: jax.Array, log_prob: jax.Array) -> tuple[jax.Array, jax.Array]:
        from_1 = jnp.pad(before, ((0, 0), (1, 0)), constant_values=_NEVER)[:, :-1]
        from_2 = jnp.where(skip, jnp.pad(before, ((0, 0), (2, 0)), constant_values=_NEVER)[:, :-2], _NEVER)
        top = jnp.maximum(jnp.maximum(before, from_1), from_2)
        total = jnp.log(jnp.exp(before - top) + jnp.exp(from_1 - top) + jnp.exp(from_2 - top))
        now = jnp.maximum(top + total + log_prob, _NEVER)
        return now, now

    first = jnp.where(start, log_probs[0], _NEVER)
    return jnp.concatenate([first[None], jax.lax.scan(step, first, log_probs[1:])[1]])


def _chain_forward(log_probs: jax.Array, skip: jax.Array, end: jax.Array) -> tuple[jax.Array, tuple]:
    """Computes forward and backward variables in one scan, the latter on the reversed chain."""
    n_rows = end.shape[0]
    start = jnp.broadcast_to(jnp.arange(end.shape[1]) < 2, end.shape)
    skip_back = jnp.pad(skip, ((0, 0), (0, 2)))[:, 2:][:, ::-1]
    both = _walk(
        jnp.concatenate([log_probs, log_probs[::-1, :, ::-1]], axis=1),
        jnp.concatenate([start, end[:, ::-1]]),
        jnp.concatenate([skip, skip_back]),
    )
    ahead, back = both[:, :n_rows], both[::-1, n_rows:, ::-1]
    log_total = jax.nn.logsumexp(jnp.where(end, ahead[-1], _NEVER), axis=-1)
    occupied = jnp.exp(jnp.minimum(ahead + back - log_probs - log_total[:, None], 0))
    return -log_total, (occupied,)


def _chain_backward(residuals: tuple, gradient: jax.Array) -> tuple:
    (occupied,) = residuals
    return -occupied * gradient[:, None], None, None


_chain.defvjp(_chain_forward, _chain_backward)


def _ctc(logits: jax.Array, labels: jax.Array, lengths: jax.Array, blank: int) -> jax.Array:
    """Returns CTC's loss per row [B]. labels: [B,N], padded with blank. States: blank, label, blank, label, ..."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    of_labels = jnp.take_along_axis(log_probs, labels[:, None, :], axis=2)  # [B,T,N]
    of_blank = log_probs[:, :, blank, None]
    pairs = jnp.stack([jnp.broadcast_to(of_blank, of_labels.shape), of_labels], axis=-1)
    states = jnp.concatenate([pairs.reshape(*pairs.shape[:2], -1), of_blank], axis=2).swapaxes(0, 1)  # [T,B,2N+1]
    new = jnp.pad(labels[:, 1:] != labels[:, :-1], ((0, 0), (1, 0)))  # the first label has no predecessor
    skip = jnp.pad(jnp.stack([jnp.zeros_like(new), new], axis=-1).reshape(len(labels), -1), ((0, 0), (0, 1)))
    at, last = jnp.arange(states.shape[2]), 2 * lengths[:, None]
    return _chain(states, skip, (at == last) | (at == last - 1))
