"""`NgramModel`: an n-gram model over tokens, for `lm`.

Of the tokens before it, only the longest contexts that the model knows decide about a token (Katz, 1987):

    log P(token | context) = logprob(context token), if the model has it
                             backoff(context) + log P(token | context without its first token) otherwise
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from whisper_nnx.runtime.programs import exportable
from whisper_nnx.text.arpa import Ngrams, read_arpa

if TYPE_CHECKING:
    from whisper_nnx.text.tokenizer import Tokenizer

_SMALLEST = 1024  # entries of an array
CHUNK = 256  # continuations of a context that are read at once
_WIDTH = 64  # children that are compared at once
_MISSING = -100 * np.log(10)  # of <unk>, where a file has none, as in KenLM


@exportable
@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class NgramModel:
    """An n-gram model as arrays: contexts as a trie, the latest token first, and what continues each of them.

    Nodes of the trie are numbered level by level, so that the children of each follow each other; node 0 is the empty
    context. Programs depend on V, C, N and `order`; C and N are powers of two, of which the last entries are unused.

    Attributes:
      logprob: [V+1], of the tokens without context; the last one is <unk>'s.
      known: [V], whether tokens are in the model; the others are <unk>.
      child: [C], the first child of each node; those of node n end before child[n + 1].
      token: [C], by which each node is reached from its parent; ascending among children. V is <unk>, V + 1 is <s>.
      backoff: [C], of each context.
      first: [C], the first continuation of each context; those of node n end before first[n + 1].
      next_token, next_logprob: [N], of the continuations.
      order: the length of the longest n-gram.
    """

    logprob: jax.Array
    known: jax.Array
    child: jax.Array
    token: jax.Array
    backoff: jax.Array
    first: jax.Array
    next_token: jax.Array
    next_logprob: jax.Array
    order: int = field(metadata={"static": True})

    @classmethod
    def from_arpa(cls, path: str | os.PathLike[str], tokenizer: Tokenizer) -> NgramModel:
        """Reads an ARPA file of n-grams over token ids, or over tokens as vocab.json writes them.

        Raises:
          ValueError: not an ARPA file, a damaged one, or one over something else than the tokenizer's text tokens.
          OSError: it cannot be read.
        """
        ngrams, words = read_arpa(path, tokenizer)
        if words is not None:
            raise ValueError(f"{os.fspath(path)} is a model of words; read it with WordNgramModel.from_arpa")
        try:
            return cls.from_ngrams(ngrams, tokenizer.vocab_size)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from None

    @classmethod
    def from_ngrams(cls, ngrams: Sequence[Ngrams], vocab_size: int) -> NgramModel:
        """From the n-grams of each length from 1 up, in which <unk> is `vocab_size` and <s> the id after it.

        Raises ValueError for n-grams that occur twice.
        """
        size, words = vocab_size, vocab_size + 2
        unigrams = ngrams[0]
        dense = np.full(words, np.nan, np.float32)
        dense[unigrams.ids[:, 0]] = unigrams.logprob
        unknown = np.float32(_MISSING) if np.isnan(dense[size]) else dense[size]
        known = ~np.isnan(dense[:size])
        dense = np.where(np.isnan(dense), unknown, dense)

        tables = Tables.from_ngrams(ngrams, words)
        return cls(
            logprob=jnp.asarray(dense[: size + 1]),
            known=jnp.asarray(known),
            **tables.contexts(),
            **tables.continuations("next_token", "next_logprob"),
            order=len(ngrams),
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """tokens [R,N], the latest last, -1 before the first -> log P(next token) [R,V]."""
        size = len(self.known)
        nodes = self._contexts(tokens)
        weights = self.backoff[nodes]
        longer = weights.sum(axis=0) - jnp.cumsum(weights, axis=0)  # of the contexts longer than each
        scores = self.logprob + weights.sum(axis=0)[:, None]
        for node, weight in zip(nodes, longer, strict=True):
            scores = self._continued(scores, node, weight)
        return jnp.where(self.known, scores[:, :size], scores[:, size:])

    def _contexts(self, tokens: jax.Array) -> jax.Array:
        """The nodes [order-1,R] of the latest token, the latest two, and so on."""
        size = len(self.known)
        latest = tokens[:, ::-1][:, : self.order - 1].T
        words = jnp.where(latest < 0, size + 1, jnp.where(self.known[latest], latest, size))
        return find_contexts(self.child, self.token, words, size + 2)

    def _continued(self, scores: jax.Array, node: jax.Array, weight: jax.Array) -> jax.Array:
        """scores [R,V+1] with those of the continuations of nodes [R]; weight [R]: added to their log-probabilities."""
        rows, nowhere = jnp.arange(len(node))[:, None], scores.shape[1]
        begin, end = span(self.first, node)

        def put(loop: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            done, scores = loop
            edge = (begin + done)[:, None] + jnp.arange(CHUNK)
            token = jnp.where(edge < end[:, None], at(self.next_token, edge), nowhere)
            score = at(self.next_logprob, edge) + weight[:, None]
            return done + CHUNK, scores.at[rows, token].set(score, mode="drop")

        return jax.lax.while_loop(lambda loop: (begin + loop[0] < end).any(), put, (jnp.int32(0), scores))[1]


class Tables(NamedTuple):
    """n-grams as contexts and what continues them, on the host; nodes as in `NgramModel`.

    parent, token, backoff [C]: of each context. node, following, values [N]: the continuations, in ascending order.
    """

    parent: np.ndarray
    token: np.ndarray
    backoff: np.ndarray
    node: np.ndarray
    following: np.ndarray
    values: np.ndarray

    @classmethod
    def from_ngrams(cls, ngrams: Sequence[Ngrams], words: int) -> Tables:
        """words: the number of ids, of which the last two are <unk> and <s>. Raises ValueError for equal n-grams."""
        # Contexts: what has a backoff weight, and what continuations follow.
        contexts = [n.ids[n.backoff != 0] for n in ngrams[:-1]] + [n.ids[:, :-1] for n in ngrams[1:]]
        nodes, parent, token = _number(contexts, words)
        own, before = nodes[: len(ngrams) - 1], nodes[len(ngrams) - 1 :]
        backoff = np.zeros(len(parent), np.float32)
        for n, node in zip(ngrams, own, strict=False):
            backoff[node] = n.backoff[n.backoff != 0]
        following, node = np.concatenate([[0], *(n.ids[:, -1] for n in ngrams[1:])]), np.concatenate([[0], *before])
        values = np.concatenate([[0.0], *(n.logprob for n in ngrams[1:])]).astype(np.float32)
        kept = (following < words - 1) & (node > 0)
        following, node, values = following[kept], node[kept], values[kept]
        order = np.lexsort((following, node))
        following, node, values = following[order], node[order], values[order]
        if ((following[1:] == following[:-1]) & (node[1:] == node[:-1])).any():
            raise ValueError("an n-gram occurs twice")
        return cls(parent, token, backoff, node, following, values)

    def contexts(self) -> dict[str, jax.Array]:
        """The arrays [C] of the trie, by name."""
        count = len(self.parent)
        return {
            "child": padded(np.searchsorted(self.parent, np.arange(count)), count, count),
            "token": padded(self.token, count, 0),
            "backoff": padded(self.backoff, count, 0.0),
        }

    def continuations(self, following: str, values: str) -> dict[str, jax.Array]:
        """The first continuation of each context [C], and the arrays [N] under these names."""
        count = len(self.parent)
        return {
            "first": padded(np.searchsorted(self.node, np.arange(count)), count, len(self.node)),
            following: padded(self.following, len(self.node), 0),
            values: padded(self.values, len(self.node), 0.0),
        }


def find_contexts(child: jax.Array, token: jax.Array, words: jax.Array, most: int) -> jax.Array:
    """The nodes [k,R] of the first, the first two, ... of words [k,R], the latest first; `most`: children of a node.

    Where there is no such node, an unused one, which has neither children nor continuations.
    """

    def find(node: jax.Array, word: jax.Array) -> tuple[jax.Array, jax.Array]:
        begin, end = span(child, node)
        place = first_place(lambda index: at(token, index) < word[:, None], begin, end, most)
        found = jnp.where((place < end) & (at(token, place) == word), place, len(token) - 1)
        return found, found

    return jax.lax.scan(find, jnp.zeros(words.shape[1], jnp.int32), words)[1]


def first_place(is_below: Callable[[jax.Array], jax.Array], begin: jax.Array, end: jax.Array, most: int) -> jax.Array:
    """The first places, from `begin` to `end`, that are not below what is searched; ascending, of at most `most`."""
    place, stride = begin, _WIDTH
    while stride <= most:
        stride *= _WIDTH
    while stride > 1:  # the place is among `stride` ones
        stride //= _WIDTH
        index = place[..., None] + stride * jnp.arange(1, _WIDTH) - 1
        place += stride * ((index < end[..., None]) & is_below(index)).sum(axis=-1)
    return place


def _number(contexts: Sequence[np.ndarray], words: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """The nodes of contexts [M,k] of several k, all nodes' parents, and their tokens; parents come first."""
    nodes = [np.zeros(len(ids), np.int64) for ids in contexts]
    parents, tokens, count = [np.array([-1])], [np.array([0])], 1
    for depth in range(1, max((ids.shape[1] for ids in contexts), default=0) + 1):
        deep = [i for i, ids in enumerate(contexts) if ids.shape[1] >= depth]
        keys = [nodes[i] * words + contexts[i][:, -depth] for i in deep]
        level = np.unique(np.concatenate(keys))
        for i, key in zip(deep, keys, strict=True):
            nodes[i] = count + np.searchsorted(level, key)
        parents.append(level // words)
        tokens.append(level % words)
        count += len(level)
    return nodes, np.concatenate(parents), np.concatenate(tokens)


def padded(values: np.ndarray, used: int, fill: float) -> jax.Array:
    """Of the next power of two above `used`."""
    size = max(_SMALLEST, 1 << used.bit_length())
    kind = np.float32 if values.dtype.kind == "f" else np.int32
    return jnp.asarray(np.concatenate([values, np.full(size - len(values), fill)]).astype(kind))


def at(values: jax.Array, index: jax.Array) -> jax.Array:
    return values.at[index].get(mode="clip")


def span(first: jax.Array, node: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where what belongs to nodes [R] begins and ends."""
    return at(first, node), at(first, node + 1)
