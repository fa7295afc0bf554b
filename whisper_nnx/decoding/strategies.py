"""How the next token is chosen: `Sampling` (greedy at temperature 0) and `Beam`. Pure functions over R = B*G rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from whisper_nnx.runtime.programs import given_back


@dataclass(frozen=True)
class Sampling:
    """`group` independent samples of each window; at temperature 0 the most probable token."""

    group: int = 1


@dataclass(frozen=True)
class Beam:
    """The `group` most probable unfinished sequences of each window, until `max_candidates` have ended."""

    group: int
    max_candidates: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sequences:
    """R sequences, growing by one token a step.

    tokens [R,N], logprobs [R,N]: what was chosen, and its log-probability after the filters. length [R]: tokens before
    the end of text. total [R]: sum of the log-probabilities, that of the end included. limit [R]: how many may be
    sampled. done [R]: it has ended, or reached its limit. looped [R]: it came to repeat itself too often.
    """

    tokens: jax.Array
    logprobs: jax.Array
    length: jax.Array
    total: jax.Array
    limit: jax.Array
    done: jax.Array
    looped: jax.Array

    @classmethod
    def init(cls, limit: jax.Array, size: int, eot: int) -> Sequences:
        """Nothing sampled yet; limit [R], room for `size` tokens."""
        rows = limit.shape[0]
        zeros = jnp.zeros((rows, size), jnp.float32)
        tokens = jnp.full((rows, size), eot, jnp.int32)
        return cls(tokens, zeros, jnp.zeros(rows, jnp.int32), zeros[:, 0], limit, limit <= 0, jnp.zeros(rows, bool))

    def append(self, step: jax.Array, token: jax.Array, logprob: jax.Array, eot: int) -> Sequences:
        """token [R] and its logprob [R] come next in the rows that are not done."""
        going = ~self.done
        token, logprob = jnp.where(going, token, eot), jnp.where(going, logprob, 0.0)
        length = self.length + (going & (token != eot))
        return replace(
            self,
            tokens=jax.lax.dynamic_update_slice(self.tokens, token[:, None], (0, step)),
            logprobs=jax.lax.dynamic_update_slice(self.logprobs, logprob[:, None], (0, step)),
            length=length,
            total=self.total + logprob,
            done=self.done | (token == eot) | (length >= self.limit),
        )

    def end_loops(self, loops: jax.Array) -> Sequences:
        """The rows that loop [R] are done."""
        return replace(self, looped=self.looped | loops, done=self.done | loops)


@given_back
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Candidates:
    """Sequences to choose from, K for each window.

    tokens [B,K,N], logprobs [B,K,N], length [B,K], total [B,K], looped [B,K]: as in Sequences; valid [B,K]: which of
    them count.
    """

    tokens: jax.Array
    logprobs: jax.Array
    length: jax.Array
    total: jax.Array
    looped: jax.Array
    valid: jax.Array

    @classmethod
    def of(cls, sequences: Sequences, group: int) -> Candidates:
        """All rows, as `group` for each window."""
        s = sequences
        rows = (s.tokens, s.logprobs, s.length, s.total, s.looped, s.total > -jnp.inf)
        return cls(*(x.reshape(-1, group, *x.shape[1:]) for x in rows))

    def take(self, index: jax.Array) -> Candidates:
        """The candidates that index [B,K'] names, window by window."""
        pick = jax.vmap(lambda x, i: x[i])
        return jax.tree.map(lambda x: pick(x, index), self)


def sample_step(
    sequences: Sequences, logits: jax.Array, step: jax.Array, temperature: jax.Array, keys: jax.Array, eot: int
) -> tuple[jax.Array, Sequences]:
    """logits [R,V], temperature [R], keys [R] -> the next tokens [R] and the longer sequences.

    A row that may choose nothing ends.
    """
    best = first_best(logits)

    def draw() -> jax.Array:
        scaled = logits / jnp.where(temperature > 0, temperature, 1.0)[:, None]
        drawn = jax.vmap(jax.random.categorical)(jax.vmap(jax.random.fold_in, (0, None))(keys, step), scaled)
        return jnp.where(temperature > 0, drawn, best)

    token = jax.lax.cond(jnp.any(temperature > 0), draw, lambda: best).astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    nothing = chosen == -jnp.inf
    token = jnp.where(nothing, eot, token)
    logprob = jnp.where(nothing, 0.0, chosen - jax.nn.logsumexp(logits, axis=-1))
    return token, sequences.append(step, token, logprob, eot)


def first_best(logits: jax.Array) -> jax.Array:
    """logits [R,V] -> where each row's maximum is first [R]: argmax, which XLA's CPU compiler makes a slow loop of."""
    tokens = jnp.arange(logits.shape[1])
    at_top = logits == logits.max(axis=-1, keepdims=True)
    return jnp.where(at_top, tokens, logits.shape[1] - 1).min(axis=-1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BeamState:
    """The unfinished sequences (B*G rows), and those that have ended: C slots a window, count [B] of them filled."""

    beams: Sequences
    ended: Candidates
    count: jax.Array

    @classmethod
    def init(cls, sequences: Sequences, beam: Beam) -> BeamState:
        """All beams of a window are the same at first, so that only one of them may count."""
        first = jnp.arange(sequences.limit.shape[0]) % beam.group == 0
        windows = sequences.limit.shape[0] // beam.group
        slots = windows * beam.max_candidates
        empty = jax.tree.map(lambda x: jnp.zeros((slots, *x.shape[1:]), x.dtype), sequences)
        return cls(
            replace(sequences, total=jnp.where(first, 0.0, -jnp.inf)),
            Candidates.of(empty, beam.max_candidates),
            jnp.zeros(windows, jnp.int32),
        )

    def end_loops(self, loops: jax.Array) -> BeamState:
        """Windows of which the best beam loops, or did so before it became the best, are done; loops [R]."""
        looped = self.beams.looped | loops
        windows = self.count.shape[0]
        best = jnp.repeat(looped.reshape(windows, -1)[:, 0], looped.shape[0] // windows)  # beam_step puts it first
        return replace(self, beams=replace(self.beams, looped=looped, done=self.beams.done | best))


def beam_step(
    state: BeamState, logits: jax.Array, step: jax.Array, beam: Beam, eot: int
) -> tuple[jax.Array, jax.Array, BeamState]:
    """logits [R,V] -> the next tokens [R], the rows [R] that they continue, the new state.

    Of the G*(G+1) best continuations of a window, in order, those that end are put aside and the first G others go on;
    an end that comes after them is forgotten. As openai-whisper's BeamSearchDecoder, but a done window stands still.
    A beam that may choose nothing ends.
    """
    group = beam.group
    # Without the barrier XLA merges the slices below into the top k and sorts the whole vocabulary instead.
    top, token = jax.lax.optimization_barrier(jax.lax.top_k(logits, group + 1))
    nothing = top[:, :1] == -jnp.inf
    token = jnp.where(nothing, eot, token)
    logprob = top - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    score = state.beams.total[:, None] + jnp.where(
        nothing, jnp.where(jnp.arange(group + 1) == 0, 0.0, -jnp.inf), logprob
    )
    score, order = jax.lax.top_k(score.reshape(-1, group * (group + 1)), group * (group + 1))
    token = jnp.take_along_axis(token.reshape(order.shape), order, axis=1)
    source = order // (group + 1)

    ends = token == eot
    goes_on = jnp.argsort(ends, axis=1, stable=True)[:, :group]
    going_before = jnp.cumsum(~ends, axis=1) - ~ends
    done = state.beams.done.reshape(-1, group)[:, :1]
    newly_ended = ends & (going_before < group) & (score > -jnp.inf) & ~done
    ended, count = _put_aside(state, source, score, newly_ended)

    row = (jnp.arange(source.shape[0])[:, None] * group + jnp.take_along_axis(source, goes_on, axis=1)).reshape(-1)
    row = jnp.where(state.beams.done, jnp.arange(row.shape[0]), row)
    next_token = jnp.take_along_axis(token, goes_on, axis=1).reshape(-1)
    total = jnp.take_along_axis(score, goes_on, axis=1).reshape(-1)
    beams = jax.tree.map(lambda x: x[row], state.beams)
    beams = replace(
        beams.append(step, next_token, total - beams.total, eot), total=jnp.where(beams.done, beams.total, total)
    )
    full = jnp.repeat(count >= beam.max_candidates, group)
    return next_token, row, BeamState(replace(beams, done=beams.done | full), ended, count)


def _put_aside(
    state: BeamState, source: jax.Array, score: jax.Array, newly_ended: jax.Array
) -> tuple[Candidates, jax.Array]:
    """The continuations [B,J] marked newly_ended fill the free slots of `state.ended`, best first."""
    slots = state.ended.total.shape[1]
    slot = state.count[:, None] + jnp.cumsum(newly_ended, axis=1) - 1
    fills = newly_ended[:, None, :] & (slot[:, None, :] == jnp.arange(slots)[:, None])  # [B,C,J]
    filled, which = fills.any(axis=-1), fills.argmax(axis=-1)

    group = state.beams.total.shape[0] // source.shape[0]
    new = Candidates.of(state.beams, group).take(jnp.take_along_axis(source, which, axis=1))
    total = jnp.take_along_axis(score, which, axis=1)
    # The end's own log-probability is known from the sum alone; it is in `total`, not in `logprobs`.
    new = replace(new, total=total, valid=jnp.ones_like(new.valid))

    def choose(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(filled.reshape(*filled.shape, *[1] * (a.ndim - 2)), a, b)

    count = jnp.minimum(state.count + newly_ended.sum(axis=1), slots)
    return jax.tree.map(choose, new, state.ended), count


def beam_candidates(state: BeamState, beam: Beam) -> Candidates:
    """The ended sequences, and as many of the best unfinished ones as are lacking to `group`."""
    unfinished = Candidates.of(state.beams, beam.group)
    _, order = jax.lax.top_k(unfinished.total, beam.group)
    unfinished = unfinished.take(order)
    lacking = jnp.arange(beam.group) < beam.group - state.count[:, None]
    unfinished = replace(unfinished, valid=unfinished.valid & lacking)
    ended = replace(state.ended, valid=jnp.arange(beam.max_candidates) < state.count[:, None])
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), ended, unfinished)
