"""How the next token is chosen: `Sampling` (greedy at temperature 0) and `Beam`, over R = B*G rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from whisper_nnx import ops
from whisper_nnx.runtime.programs import exportable


class State(Protocol):
    """What a strategy carries from step to step: a pytree."""

    @property
    def done(self) -> jax.Array:
        """Whether rows [R] have ended."""

    def stop(self, rows: jax.Array) -> State:
        """Ends the rows [R] that a rule stops."""

    def idle(self, rows: jax.Array) -> State:
        """Ends the rows [R] that nothing is to be decoded in."""


class Strategy(Protocol):
    """How the next token is chosen; hashable, since it is static. `group`: rows per window."""

    @property
    def group(self) -> int: ...

    def init(self, limit: jax.Array, size: int, temperature: jax.Array, seed: jax.Array, eot: int) -> Any:
        """The state before the first token of B windows: limit, temperature, seed [B]; room for `size` tokens."""

    def step(
        self, state: Any, logits: jax.Array, bonus: jax.Array | None, eot: int
    ) -> tuple[jax.Array, jax.Array | None, Any]:
        """logits [R,V] -> the next tokens [R], the rows [R] that they continue (None: their own), the new state.

        bonus [R,V]: added to the logits in the choice, not in log-probabilities.
        """

    def result(self, state: Any) -> Candidates:
        """The candidates found."""


@exportable
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sequences:
    """R sequences, to which each step appends a token, unless they have ended. They need not begin together.

    tokens [R,N], logprobs [R,N]: chosen tokens and their log-probabilities after the rules. length [R]: tokens before
    the end of text. total [R]: sum of the log-probabilities, including the end's. raised [R]: sum of the bonuses of
    chosen tokens. limit [R]: the most tokens to sample. done [R]: ended, or at its limit. stopped [R]: stopped by a
    rule.
    """

    tokens: jax.Array
    logprobs: jax.Array
    length: jax.Array
    total: jax.Array
    raised: jax.Array
    limit: jax.Array
    done: jax.Array
    stopped: jax.Array

    @classmethod
    def init(cls, limit: jax.Array, size: int, eot: int) -> Sequences:
        """Empty sequences; limit [R], room for `size` tokens."""
        rows = limit.shape[0]
        zeros = jnp.zeros((rows, size), jnp.float32)
        tokens = jnp.full((rows, size), eot, jnp.int32)
        length, total = jnp.zeros(rows, jnp.int32), zeros[:, 0]
        return cls(tokens, zeros, length, total, total, limit, limit <= 0, jnp.zeros(rows, bool))

    @property
    def score(self) -> jax.Array:
        """What sequences are ranked by [R]."""
        return self.total + self.raised

    def append(self, token: jax.Array, logprob: jax.Array, bonus: jax.Array, eot: int) -> Sequences:
        """Appends token [R], its logprob [R] and bonus [R] in rows that are not done."""
        active = ~self.done
        token, logprob = jnp.where(active, token, eot), jnp.where(active, logprob, 0.0)
        length = self.length + (active & (token != eot))
        here = active[:, None] & (jnp.arange(self.tokens.shape[1]) == self.length[:, None])
        return replace(
            self,
            tokens=jnp.where(here, token[:, None], self.tokens),
            logprobs=jnp.where(here, logprob[:, None], self.logprobs),
            length=length,
            total=self.total + logprob,
            raised=self.raised + jnp.where(active, bonus, 0.0),
            done=self.done | (token == eot) | (length >= self.limit),
        )

    def stop(self, rows: jax.Array) -> Sequences:
        """Ends the rows [R] that a rule stops."""
        return replace(self, stopped=self.stopped | rows, done=self.done | rows)

    def idle(self, rows: jax.Array) -> Sequences:
        return replace(self, done=self.done | rows)


@exportable
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Candidates:
    """Sequences to choose from, K for each window.

    tokens [B,K,N], logprobs [B,K,N], length [B,K], total [B,K], raised [B,K], stopped [B,K]: as in Sequences. valid
    [B,K]: whether it is a candidate.
    """

    tokens: jax.Array
    logprobs: jax.Array
    length: jax.Array
    total: jax.Array
    raised: jax.Array
    stopped: jax.Array
    valid: jax.Array

    @property
    def score(self) -> jax.Array:
        """What they are ranked by [B,K]."""
        return self.total + self.raised

    @classmethod
    def from_sequences(cls, sequences: Sequences, group: int) -> Candidates:
        """All rows as candidates, `group` per window."""
        s = sequences
        rows = (s.tokens, s.logprobs, s.length, s.total, s.raised, s.stopped, s.total > -jnp.inf)
        return cls(*(x.reshape(-1, group, *x.shape[1:]) for x in rows))

    def take(self, index: jax.Array) -> Candidates:
        """Selects candidates by index [B,K'] within each window."""
        pick = jax.vmap(lambda x, i: x[i])
        return jax.tree.map(lambda x: pick(x, index), self)


@exportable
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Samples:
    """Independent sequences; temperature [R], the data of random keys [R,2]."""

    sequences: Sequences
    temperature: jax.Array
    keys: jax.Array

    @property
    def done(self) -> jax.Array:
        return self.sequences.done

    def stop(self, rows: jax.Array) -> Samples:
        return replace(self, sequences=self.sequences.stop(rows))

    def idle(self, rows: jax.Array) -> Samples:
        return replace(self, sequences=self.sequences.idle(rows))


@dataclass(frozen=True)
class Sampling:
    """`group` independent samples per window; at temperature 0 the most probable token."""

    group: int = 1

    def init(self, limit: jax.Array, size: int, temperature: jax.Array, seed: jax.Array, eot: int) -> Samples:
        keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), self.group))(seed).reshape(-1)
        limit, temperature = (jnp.repeat(x, self.group) for x in (limit, temperature))
        return Samples(Sequences.init(limit, size, eot), temperature, jax.random.key_data(keys))

    def step(
        self, state: Samples, logits: jax.Array, bonus: jax.Array | None, eot: int
    ) -> tuple[jax.Array, jax.Array | None, Samples]:
        """Samples a token; a row whose logits are all -inf ends."""
        preferred = _raised(logits, bonus)
        best, temperature = ops.argmax(preferred), state.temperature

        def draw() -> jax.Array:
            scaled = preferred / jnp.where(temperature > 0, temperature, 1.0)[:, None]
            keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(state.keys), state.sequences.length)
            return jnp.where(temperature > 0, jax.vmap(jax.random.categorical)(keys, scaled), best)

        token = jax.lax.cond(jnp.any(temperature > 0), draw, lambda: best).astype(jnp.int32)
        chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
        nothing = chosen == -jnp.inf
        gained = _bonus_of(bonus, token[:, None])[:, 0]
        token = jnp.where(nothing, eot, token)
        logprob = jnp.where(nothing, 0.0, chosen - jax.nn.logsumexp(logits, axis=-1))
        sequences = state.sequences.append(token, logprob, jnp.where(nothing, 0.0, gained), eot)
        return token, None, replace(state, sequences=sequences)

    def result(self, state: Samples) -> Candidates:
        return Candidates.from_sequences(state.sequences, self.group)


@exportable
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BeamState:
    """Unfinished sequences (B*G rows), and ended ones: C slots per window, of which count [B] are filled."""

    beams: Sequences
    ended: Candidates
    count: jax.Array

    @property
    def done(self) -> jax.Array:
        return self.beams.done

    def stop(self, rows: jax.Array) -> BeamState:
        """Ends a window when its best beam is stopped, or was stopped before it became the best."""
        stopped = self.beams.stopped | rows
        windows = self.count.shape[0]
        best = jnp.repeat(stopped.reshape(windows, -1)[:, 0], stopped.shape[0] // windows)  # `Beam.step` puts it first
        return replace(self, beams=replace(self.beams, stopped=stopped, done=self.beams.done | best))

    def idle(self, rows: jax.Array) -> BeamState:
        return replace(self, beams=self.beams.idle(rows))


@dataclass(frozen=True)
class Beam:
    """The `group` most probable unfinished sequences of each window, until `max_candidates` have ended."""

    group: int
    max_candidates: int

    def init(self, limit: jax.Array, size: int, temperature: jax.Array, seed: jax.Array, eot: int) -> BeamState:
        """All beams of a window start equal, so all but the first have probability 0."""
        windows, sequences = limit.shape[0], Sequences.init(jnp.repeat(limit, self.group), size, eot)
        first = jnp.arange(windows * self.group) % self.group == 0
        slots = windows * self.max_candidates
        empty = jax.tree.map(lambda x: jnp.zeros((slots, *x.shape[1:]), x.dtype), sequences)
        return BeamState(
            replace(sequences, total=jnp.where(first, 0.0, -jnp.inf).astype(jnp.float32)),
            Candidates.from_sequences(empty, self.max_candidates),
            jnp.zeros(windows, jnp.int32),
        )

    def step(
        self, state: BeamState, logits: jax.Array, bonus: jax.Array | None, eot: int
    ) -> tuple[jax.Array, jax.Array | None, BeamState]:
        """Ranks the G*(G+1) best continuations of a window; those that end become candidates.

        The first G others continue; an end that ranks below them is dropped. As openai-whisper's BeamSearchDecoder,
        but a finished window does not change. A beam whose logits are all -inf ends.
        """
        group = self.group
        # Without a barrier XLA merges the slices below into the top k and sorts the whole vocabulary instead; with one
        # for both, its CPU compiler aborts on a mesh (jaxlib 0.10.2).
        top, token = map(jax.lax.optimization_barrier, jax.lax.top_k(_raised(logits, bonus), group + 1))
        chosen = top if bonus is None else jnp.take_along_axis(logits, token, axis=1)
        gained = _bonus_of(bonus, token)
        nothing = top[:, :1] == -jnp.inf
        token = jnp.where(nothing, eot, token)
        logprob = chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        logprob = jnp.where(nothing, jnp.where(jnp.arange(group + 1) == 0, 0.0, -jnp.inf), logprob)
        total = state.beams.total[:, None] + logprob
        raised = state.beams.raised[:, None] + jnp.where(nothing, 0.0, gained)
        score, order = jax.lax.top_k((total + raised).reshape(-1, group * (group + 1)), group * (group + 1))
        token, total, raised = (
            jnp.take_along_axis(x.reshape(order.shape), order, axis=1) for x in (token, total, raised)
        )
        source = order // (group + 1)

        ends = token == eot
        kept = jnp.argsort(ends, axis=1, stable=True)[:, :group]
        ranked_above = jnp.cumsum(~ends, axis=1) - ~ends
        done = state.beams.done.reshape(-1, group)[:, :1]
        newly_ended = ends & (ranked_above < group) & (score > -jnp.inf) & ~done
        ended, count = _add_ended(state, source, total, raised, newly_ended)

        row = (jnp.arange(source.shape[0])[:, None] * group + jnp.take_along_axis(source, kept, axis=1)).reshape(-1)
        row = jnp.where(state.beams.done, jnp.arange(row.shape[0]), row)
        next_token, total, raised = (jnp.take_along_axis(x, kept, axis=1).reshape(-1) for x in (token, total, raised))
        beams = jax.tree.map(lambda x: x[row], state.beams)
        beams = replace(
            beams.append(next_token, total - beams.total, raised, eot),
            total=jnp.where(beams.done, beams.total, total),
            raised=jnp.where(beams.done, beams.raised, raised),
        )
        full = jnp.repeat(count >= self.max_candidates, group)
        return next_token, row, BeamState(replace(beams, done=beams.done | full), ended, count)

    def result(self, state: BeamState) -> Candidates:
        """The ended sequences; if there are fewer than `group`, the best unfinished ones fill up."""
        unfinished = Candidates.from_sequences(state.beams, self.group)
        _, order = jax.lax.top_k(unfinished.score, self.group)
        unfinished = unfinished.take(order)
        lacking = jnp.arange(self.group) < self.group - state.count[:, None]
        unfinished = replace(unfinished, valid=unfinished.valid & lacking)
        ended = replace(state.ended, valid=jnp.arange(self.max_candidates) < state.count[:, None])
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), ended, unfinished)


def _add_ended(
    state: BeamState, source: jax.Array, total: jax.Array, raised: jax.Array, newly_ended: jax.Array
) -> tuple[Candidates, jax.Array]:
    """Fills the free slots of `state.ended` with the continuations [B,J] marked newly_ended, best first."""
    slots = state.ended.total.shape[1]
    slot = state.count[:, None] + jnp.cumsum(newly_ended, axis=1) - 1
    fills = newly_ended[:, None, :] & (slot[:, None, :] == jnp.arange(slots)[:, None])  # [B,C,J]
    filled, which = fills.any(axis=-1), fills.argmax(axis=-1)

    group = state.beams.total.shape[0] // source.shape[0]
    new = Candidates.from_sequences(state.beams, group).take(jnp.take_along_axis(source, which, axis=1))
    total, raised = (jnp.take_along_axis(x, which, axis=1) for x in (total, raised))
    # The end's own log-probability is part of `total` only, not of `logprobs`.
    new = replace(new, total=total, raised=raised, valid=jnp.ones_like(new.valid))

    def choose(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(filled.reshape(*filled.shape, *[1] * (a.ndim - 2)), a, b)

    count = jnp.minimum(state.count + newly_ended.sum(axis=1), slots)
    return jax.tree.map(choose, new, state.ended), count


def _raised(logits: jax.Array, bonus: jax.Array | None) -> jax.Array:
    return logits if bonus is None else logits + bonus


def _bonus_of(bonus: jax.Array | None, tokens: jax.Array) -> jax.Array:
    """Those of tokens [R,n]."""
    return jnp.zeros(tokens.shape) if bonus is None else jnp.take_along_axis(bonus, tokens, axis=1)
