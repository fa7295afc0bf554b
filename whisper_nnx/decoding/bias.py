"""`BiasRule` prefers the phrases of a list: a token that begins or continues one gets a bonus.

A bonus is paid token by token and taken back when the phrase is left unfinished, so that only whole phrases gain in the
end. As in Aho and Corasick's automaton, a token that leaves a phrase may continue another one that began later.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from whisper_nnx.decoding.rules import PER_ROW, PER_WINDOW, Rule
from whisper_nnx.runtime.programs import exportable

_SMALLEST, _LARGEST = 128, 1 << 18  # sizes of a trie
_CHUNK = 32  # edges of a node that are read at once


class Trie(NamedTuple):
    """The phrases as an automaton over tokens; node 0 is its root, where no phrase has begun.

    Attributes:
      first: [S], the first edge of each node; those of node n end before first[n + 1]. Those of node 0 begin phrases.
      token: [S], of each edge; ascending within a node.
      target: [S], the node that each edge leads to.
      gain: [S], the bonus of each edge's token.
      pending: [S], what each node's other tokens take back: the bonuses of what is not a whole phrase yet.
    """

    first: np.ndarray
    token: np.ndarray
    target: np.ndarray
    gain: np.ndarray
    pending: np.ndarray

    @property
    def size(self) -> int:
        """S: a power of two, of which programs depend."""
        return len(self.first)

    @classmethod
    def from_phrases(cls, phrases: Iterable[tuple[Sequence[int], float]]) -> Trie:
        """From the tokens of each phrase and the bonus of each of its tokens. Raises ValueError for too many."""
        nodes = _Nodes(phrases)
        edges = nodes.edges()
        counts = [len(own) for own in edges]
        most = max(len(edges) + 1, sum(counts))
        if most > _LARGEST:
            raise ValueError(_too_many(most))
        size = max(_SMALLEST, 1 << (most - 1).bit_length())
        trie = cls(*(np.zeros(size, kind) for kind in (np.int32, np.int32, np.int32, np.float32, np.float32)))
        trie.first[:] = sum(counts)
        trie.first[: len(counts) + 1] = [0, *np.cumsum(counts)]
        for place, (token, target, gain) in enumerate(edge for own in edges for edge in own):
            trie.token[place], trie.target[place], trie.gain[place] = token, target, gain
        trie.pending[: len(edges)] = np.array(nodes.given) - np.array(nodes.kept)
        return trie


def _too_many(entries: int) -> str:
    return f"bias needs {entries} entries or more, of at most {_LARGEST}; give fewer or shorter phrases"


class _Nodes:
    """The nodes of a trie while it is made, parents first.

    Attributes:
      given: the sum of the bonuses on the way to each node.
      kept: the most that whole phrases on the way are worth, which is not taken back.
    """

    def __init__(self, phrases: Iterable[tuple[Sequence[int], float]]):
        self.children: list[dict[int, int]] = [{}]
        self.bonus, self.parent, self.depth, self.ends = [0.0], [0], [0], [False]
        for ids, bonus in phrases:
            node = 0
            for token in ids:
                if token not in self.children[node]:
                    self.children[node][token] = len(self.children)
                    self.children.append({})
                    self.bonus.append(bonus)
                    self.parent.append(node)
                    self.depth.append(self.depth[node] + 1)
                    self.ends.append(False)
                node = self.children[node][token]
                self.bonus[node] = max(self.bonus[node], bonus)
            self.ends[node] = node > 0
        self.order = sorted(range(len(self.children)), key=self.depth.__getitem__)
        self.given = [0.0] * len(self.order)
        self.kept = [0.0] * len(self.order)

    def edges(self) -> list[list[tuple[int, int, float]]]:
        """(token, target, gain) of each node, sorted; also those that continue a phrase which began later."""
        suffix = self._suffixes()  # the node of the longest other phrase that ends like the way here
        for node in self.order[1:]:
            self.given[node] = self.given[self.parent[node]] + self.bonus[node]
            self.kept[node] = self._worth(node, suffix)
        targets: list[dict[int, int]] = [{} for _ in self.order]
        count = 0
        for node in self.order:
            inherited = targets[suffix[node]] if suffix[node] else {}
            targets[node] = {**inherited, **self.children[node]}
            if (count := count + len(targets[node])) > _LARGEST:
                raise ValueError(_too_many(count))
        return [
            [(token, to, self._gain(node, to)) for token, to in sorted(own.items())] for node, own in enumerate(targets)
        ]

    def _suffixes(self) -> list[int]:
        suffix = [0] * len(self.order)
        for node in self.order:
            for token, child in self.children[node].items():
                if node:
                    at = suffix[node]
                    while at and token not in self.children[at]:
                        at = suffix[at]
                    suffix[child] = self.children[at].get(token, 0)
        return suffix

    def _ancestor(self, node: int, depth: int) -> int:
        while self.depth[node] > depth:
            node = self.parent[node]
        return node

    def _worth(self, node: int, suffix: list[int]) -> float:
        worth, at = self.kept[self.parent[node]], node
        while at:
            if self.ends[at]:
                before = self._ancestor(node, self.depth[node] - self.depth[at])
                worth = max(worth, self.kept[before] + self.given[at])
            at = suffix[at]
        return worth

    def _gain(self, node: int, target: int) -> float:
        """Pays what the way to the target is worth, beside what is kept of the way before it."""
        before = self._ancestor(node, self.depth[node] + 1 - self.depth[target])
        return self.kept[before] + self.given[target] - self.given[node]


@exportable
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BiasRule(Rule):
    """Prefers tokens that begin or continue a phrase, and takes their bonuses back when it is not finished.

    Log-probabilities are those without the bonuses. The tries are those of B windows, not of their R rows.

    Attributes:
      start: [B,V], the bonus of each token as the first of a phrase.
      first, token, target, gain, pending: [B,S], the fields of a `Trie`.
      node: [R], which node of it each row is at.
    """

    start: Any = field(metadata=PER_WINDOW)
    first: Any = field(metadata=PER_WINDOW)
    token: Any = field(metadata=PER_WINDOW)
    target: Any = field(metadata=PER_WINDOW)
    gain: Any = field(metadata=PER_WINDOW)
    pending: Any = field(metadata=PER_WINDOW)
    node: Any = field(metadata=PER_ROW)

    @classmethod
    def from_tries(cls, tries: Sequence[Trie | None], vocab_size: int) -> BiasRule:
        """Creates the rule on the host for B windows, with tries of one size; None: no phrases in this window."""
        size = next(trie.size for trie in tries if trie)
        nothing = Trie(*(np.zeros(size, kind) for kind in (np.int32, np.int32, np.int32, np.float32, np.float32)))
        start = np.zeros((len(tries), vocab_size), np.float32)
        for row, trie in zip(start, tries, strict=True):
            if trie:
                begins = slice(trie.first[0], trie.first[1])
                row[trie.token[begins]] = trie.gain[begins]
        arrays = {name: np.stack([getattr(trie or nothing, name) for trie in tries]) for name in Trie._fields}
        return cls(start=start, **arrays, node=np.zeros(len(tries), np.int32))

    @property
    def _group(self) -> int:
        return len(self.node) // len(self.start)

    def repeat(self, group: int) -> BiasRule:
        return self.changed(lambda x: jnp.repeat(x, group, axis=0), owners=("row",))

    def apply(self, logits: jax.Array) -> jax.Array:
        return logits

    def bonus(self, logits: jax.Array) -> jax.Array:
        rows, nowhere = jnp.arange(logits.shape[0])[:, None], logits.shape[1]
        begin, end = self._edges(self.node)
        end = jnp.where(self.node == 0, begin, end)  # `start` has those of the root

        def put(loop: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            done, bonus = loop
            edge = (begin + done)[:, None] + jnp.arange(_CHUNK)
            token = jnp.where(edge < end[:, None], self._at(self.token, edge), nowhere)
            return done + _CHUNK, bonus.at[rows, token].set(self._at(self.gain, edge), mode="drop")

        start = self.start if self._group == 1 else jnp.repeat(self.start, self._group, axis=0)
        bonus = start - self._at(self.pending, self.node[:, None])
        return jax.lax.while_loop(lambda loop: (begin + loop[0] < end).any(), put, (jnp.int32(0), bonus))[1]

    def append(self, token: jax.Array) -> BiasRule:
        onward = self._find(self.node, token)
        return replace(self, node=jnp.where(onward > 0, onward, self._find(jnp.zeros_like(self.node), token)))

    def _at(self, values: jax.Array, index: jax.Array) -> jax.Array:
        """values [B,S] at index [R,n] -> [R,n]."""
        window = jnp.arange(len(self.node))[:, None] // self._group
        return values.at[window, index].get(mode="clip")

    def _edges(self, node: jax.Array) -> tuple[jax.Array, jax.Array]:
        first = self._at(self.first, node[:, None] + jnp.arange(2))
        return first[:, 0], first[:, 1]

    def _find(self, node: jax.Array, token: jax.Array) -> jax.Array:
        """The targets [R] of the edges with these tokens [R], 0 where a node has no such edge."""
        begin, end = self._edges(node)

        def halve(_: Any, span: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = span
            middle = (low + high) // 2
            later = (low < high) & (self._at(self.token, middle[:, None])[:, 0] < token)
            return jnp.where(later, middle + 1, low), jnp.where(later, high, jnp.minimum(high, middle))

        place, _ = jax.lax.fori_loop(0, self.token.shape[1].bit_length(), halve, (begin, end))
        found = (place < end) & (self._at(self.token, place[:, None])[:, 0] == token)
        return jnp.where(found, self._at(self.target, place[:, None])[:, 0], 0)
