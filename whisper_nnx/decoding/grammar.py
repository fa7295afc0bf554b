"""Grammars in the loop: `GrammarRule` for token automata on the device, `ParserRule` for parsers on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from whisper_nnx.decoding.rules import PER_ROW, PER_WINDOW, STATIC, Rule, is_text
from whisper_nnx.grammar.parser import BITS, Parsers, TokenParser
from whisper_nnx.grammar.tokens import REJECTED, TokenAutomaton
from whisper_nnx.runtime.devices import DATA, MODEL, divides_heads, traced_mesh
from whisper_nnx.runtime.programs import exportable
from whisper_nnx.text.special_tokens import SpecialTokens

PARSERS = Parsers()


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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ParserRule(Rule):
    """As `GrammarRule`, for grammars that are not regular: each step asks the host which tokens may follow.

    It has no state there that a step would change: masks depend on the tokens so far. A text that does not end in time
    is cut off.

    Attributes:
      number: [R], of the grammar's `TokenParser`.
      penalty: [R], as in `GrammarRule`.
      tokens: [R,N], the text tokens so far, of which the first `length` [R] are valid.
      parsers: those in use. Its text has an address, so that programs with this rule are not stored.
    """

    number: Any = field(metadata=PER_WINDOW)
    penalty: Any = field(metadata=PER_WINDOW)
    tokens: Any = field(metadata=PER_ROW)
    length: Any = field(metadata=PER_ROW)
    special: SpecialTokens = field(metadata=STATIC)
    parsers: Parsers = field(default=PARSERS, metadata=STATIC)

    @classmethod
    def from_parsers(
        cls,
        parsers: Sequence[TokenParser],
        penalty: Sequence[float],
        prefixes: Sequence[Sequence[int]],
        special: SpecialTokens,
        *,
        size: int,
    ) -> ParserRule:
        """Creates the rule on the host for R rows that start with these text tokens; room for `size` tokens."""
        tokens = np.zeros((len(parsers), size), np.int32)
        for row, ids in zip(tokens, prefixes, strict=True):
            row[: len(ids)] = ids
        return cls(
            number=np.array(PARSERS.use(parsers), np.int32),
            penalty=np.array(penalty, np.float32),
            tokens=tokens,
            length=np.array([len(ids) for ids in prefixes], np.int32),
            special=special,
        )

    def apply(self, logits: jax.Array) -> jax.Array:
        rows, size = logits.shape
        mesh = traced_mesh(logits)
        if divides_heads(mesh) and mesh.manual_axes:
            raise ValueError(
                f"a grammar that is not regular cannot be used on a mesh of {mesh.shape[DATA]} x {mesh.shape[MODEL]} "
                f"devices ({DATA} x {MODEL}), which JAX gives no host callbacks; use one with {DATA} or {MODEL} alone"
            )
        words = -(-size // BITS)
        kind = jax.ShapeDtypeStruct((rows, words), jnp.uint32)
        masks = jax.pure_callback(partial(self.parsers.masks, words), kind, self.number, self.tokens, self.length)
        bits = (masks[:, :, None] >> jnp.arange(BITS, dtype=jnp.uint32)) & 1
        allowed = bits.reshape(rows, words * BITS)[:, :size].astype(bool)
        return logits - jnp.where(allowed, 0.0, self.penalty[:, None])

    def append(self, token: jax.Array) -> ParserRule:
        text = is_text(token, self.special)
        here = text[:, None] & (jnp.arange(self.tokens.shape[1]) == self.length[:, None])
        return replace(self, tokens=jnp.where(here, token[:, None], self.tokens), length=self.length + text)
