"""`GrammarRule`: the token automaton of a grammar, in the loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from whisper_nnx.decoding.rules import PER_ROW, PER_WINDOW, Rule
from whisper_nnx.grammar.tokens import REJECTED, TokenAutomaton
from whisper_nnx.runtime.programs import exportable


@exportable
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GrammarRule(Rule):
    """Excludes tokens that a grammar does not allow, or takes a penalty from their logits.

    The tables are those of B windows, not of their R rows.

    Attributes:
      table: [B,S,C] int16, distance: [B,S] int16, token_class: [B,V] int16: of a `TokenAutomaton`.
      penalty: [B], subtracted from the logits; infinite to exclude tokens.
      state: [R], after the tokens so far.
      left: [R], how many tokens the row may still have: in that many, the text must be able to end.
    """

    table: Any = field(metadata=PER_WINDOW)
    distance: Any = field(metadata=PER_WINDOW)
    token_class: Any = field(metadata=PER_WINDOW)
    penalty: Any = field(metadata=PER_WINDOW)
    state: Any = field(metadata=PER_ROW)
    left: Any = field(metadata=PER_ROW)

    @classmethod
    def from_automata(
        cls, automata: Sequence[TokenAutomaton], penalty: Sequence[float], state: Sequence[int], left: Sequence[int]
    ) -> GrammarRule:
        """Creates the rule on the host for B windows; the automata are of one size."""
        return cls(
            table=np.stack([one.table for one in automata]),
            distance=np.stack([one.distance for one in automata]),
            token_class=np.stack([one.token_class for one in automata]),
            penalty=np.array(penalty, np.float32),
            state=np.array(state, np.int32),
            left=np.array(left, np.int32),
        )

    @property
    def _window(self) -> jax.Array:
        """Of each row."""
        rows, windows = len(self.state), len(self.penalty)
        return jnp.arange(rows) // (rows // windows)

    def repeat(self, group: int) -> GrammarRule:
        return self.changed(lambda x: jnp.repeat(x, group, axis=0), owners=("row",))

    def apply(self, logits: jax.Array) -> jax.Array:
        window = self._window
        following = self.table[window, self.state]  # [R,C]
        distance = jnp.take_along_axis(self.distance[window], jnp.maximum(following, 0).astype(jnp.int32), axis=1)
        rejected = (following < 0) | (distance >= self.left[:, None])
        cost = jnp.where(rejected, self.penalty[window][:, None], 0.0)
        return logits - jnp.take_along_axis(cost, self.token_class[window].astype(jnp.int32), axis=1)

    def append(self, token: jax.Array) -> GrammarRule:
        window = self._window
        following = self.table[window, self.state, self.token_class[window, token]].astype(jnp.int32)
        return replace(self, state=jnp.where(following < 0, REJECTED, following), left=self.left - 1)
