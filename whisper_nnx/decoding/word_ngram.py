"""`WordNgramModel`: an n-gram model over words, for `lm`.

The probabilities of words give those of their tokens. With S(prefix), the sum of P(word | words before) over the words
whose tokens begin with this prefix,

    log P(token | prefix) = log S(prefix token) - log S(prefix)

so that the tokens of a word and its end together have the log-probability of the word, in each of its spellings. Tokens
that begin no known word are <unk>, those that continue an unknown word have probability 1, and punctuation only ends
words.

S is the sum of the words' probabilities without context, times backoff weights. To it come the continuations of each
known context, with the difference between their probability and that by the shorter context, which is stored.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from whisper_nnx.decoding.ngram import CHUNK, Tables, at, find_contexts, first_place, padded, span
from whisper_nnx.runtime.programs import exportable
from whisper_nnx.text.arpa import Ngrams, read_arpa
from whisper_nnx.text.spellings import TokenKinds, spell

if TYPE_CHECKING:
    from whisper_nnx.text.tokenizer import Tokenizer

_UNKNOWN = -1  # depth within a word that the model does not know
_LEAST = 1e-37  # of float32, about


@exportable
@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class WordNgramModel:
    """An n-gram model over words as arrays: contexts as in `NgramModel`, and spellings in the order of their tokens.

    A prefix of words is a range of spellings. Programs depend on V, `order` and the powers of two C, N, S and T, of
    which the last entries are unused.

    Attributes:
      child, token, backoff, first: [C], as in `NgramModel`, over words. All spellings continue the empty context.
      next_spelling: [N], of the continuations of each context; ascending.
      more: [N], how much more probable it is than in the shorter context, times the backoff weight.
      start: [V+1], the probability without context that a word begins with each token; that of <unk>.
      begin: [S], where the tokens of each spelling begin; those of spelling s end before begin[s + 1].
      tokens: [T], of all spellings. <unk> is the last spelling, with the token V.
      word: [S], of each spelling.
      unknown: [], the word <unk>; <s> is the next one.
      spelling_count: [], without <unk>.
      spaced, mark, begun: [V], the fields `spaced`, `mark` and `begin` of `TokenKinds`.
      order: the length of the longest n-gram.
    """

    child: jax.Array
    token: jax.Array
    backoff: jax.Array
    first: jax.Array
    next_spelling: jax.Array
    more: jax.Array
    start: jax.Array
    begin: jax.Array
    tokens: jax.Array
    word: jax.Array
    unknown: jax.Array
    spelling_count: jax.Array
    spaced: jax.Array
    mark: jax.Array
    begun: jax.Array
    order: int = field(metadata={"static": True})

    is_normalized = True  # FusionRule takes what this returns as log-probabilities

    @classmethod
    def from_arpa(cls, path: str | os.PathLike[str], tokenizer: Tokenizer) -> WordNgramModel:
        """Reads an ARPA file of n-grams over words.

        Raises:
          ValueError: not an ARPA file, a damaged one, or one over tokens.
          OSError: it cannot be read.
        """
        ngrams, words = read_arpa(path, tokenizer)
        if words is None:
            raise ValueError(f"{os.fspath(path)} is a model of tokens; read it with NgramModel.from_arpa")
        try:
            return cls.from_ngrams(ngrams, words, tokenizer)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from None

    @classmethod
    def from_ngrams(cls, ngrams: Sequence[Ngrams], words: Sequence[str], tokenizer: Tokenizer) -> WordNgramModel:
        """From the n-grams of each length from 1 up, in which <unk> is len(words) and <s> the id after it.

        Raises ValueError for n-grams that occur twice, and where no word can be written in tokens.
        """
        size, vocab_size = len(words), tokenizer.vocab_size
        spellings = spell(words, tokenizer)
        if not spellings:
            raise ValueError("it has no word that the tokenizer can write")
        logprob = np.full(size + 2, np.nan)
        logprob[ngrams[0].ids[:, 0]] = ngrams[0].logprob
        if np.isnan(logprob[size]):
            logprob[size] = np.nanmin(logprob[:size])  # a file without <unk>: as its least probable word
        tables = Tables.from_ngrams(ngrams, size + 2)
        more = np.exp(tables.values, dtype=float) - np.exp(_shorter(tables, logprob))

        word = np.array([*(one.word for one in spellings), size])
        counts = [*(len(one.tokens) for one in spellings), 1]
        tokens = np.array([token for one in spellings for token in one.tokens] + [vocab_size])
        begin = np.concatenate([[0], np.cumsum(counts)])
        alone = np.exp(logprob[word])
        start = np.zeros(vocab_size + 1)
        np.add.at(start, tokens[begin[:-1]], alone)
        tables = _over_spellings(tables, more, word, alone)
        kinds = TokenKinds.of(tokenizer)
        return cls(
            **tables.contexts(),
            **tables.continuations("next_spelling", "more"),
            start=jnp.asarray(start, jnp.float32),
            begin=padded(begin, len(begin), len(tokens)),
            tokens=padded(tokens, len(tokens), 0),
            word=padded(word, len(begin), size),
            unknown=jnp.int32(size),
            spelling_count=jnp.int32(len(spellings)),
            spaced=jnp.asarray(kinds.spaced),
            mark=jnp.asarray(kinds.mark),
            begun=jnp.asarray(kinds.begin),
            order=len(ngrams),
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """tokens [R,N], the latest last, -1 before the first -> log P(next token) [R,V]."""
        low, high, depth, words = self._read(tokens)
        rows, size, zero = len(tokens), len(self.spaced), jnp.zeros_like(depth)
        within, free = (depth > 0)[:, None], (depth == 0)[:, None]

        # What continues the word, [R,V], and what ends it.
        nodes, weights = self._contexts(words)
        low, high = jnp.where(depth > 0, low, 0), jnp.where(depth > 0, high, 0)
        inner = self._add(jnp.zeros((rows, size + 1)), nodes, weights, low, high, self._token_of(depth))
        count = jnp.full(rows, self.spelling_count)
        unknown = self._add(jnp.zeros((rows, 1)), nodes, weights, count, count + 1, jnp.zeros_like)
        prefix = _log(inner.sum(axis=1, keepdims=True))
        leave = jnp.where(within, jnp.minimum(_log(unknown) - prefix, 0), 0)
        end = jnp.where(inner[:, size:] > 0, jnp.minimum(_log(inner[:, size:]) - prefix, 0), leave)

        # What begins the next word. Marks get what words get on average, which the word after them gives back.
        nodes, weights = self._contexts(jnp.where(free, words, self._ended(words, low, depth)))
        outer = weights[0, :, None] * self.start
        outer = self._add(outer, nodes[1:], weights[1:], zero, count + 1, self._token_of(zero))
        begun = outer[:, :size] > 0
        logs = _log(jnp.where(begun, outer[:, :size], outer[:, size:]))
        known = jnp.where(begun, outer[:, :size], 0)
        # Where no word can follow (SRILM: backoff -99), all of them are as improbable as `_log` has it.
        total = known.sum(axis=1, keepdims=True)
        expected = jnp.where(
            total > 0, (known * logs).sum(axis=1, keepdims=True) / jnp.maximum(total, _LEAST), _log(total)
        )
        outer = jnp.where(self.mark & ~begun, expected, logs)
        after_mark = free & (tokens[:, -1:] >= 0)

        marked = jnp.where(self.mark, end + expected, leave)
        inside = jnp.where(inner[:, :size] > 0, _log(inner[:, :size]) - prefix, marked)
        scores = jnp.where(free | self.spaced, end + outer[:, self.begun], inside)
        return scores - jnp.where(after_mark, expected, 0)

    def _read(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """The state after tokens [R,N]: the range of spellings [R] of the word at the end, and of how many tokens [R].

        Between words these are all spellings, and no token. Also the words [R,order-1] before it.
        """
        zero = jnp.zeros(len(tokens), jnp.int32)
        all_spellings = zero + self.spelling_count
        begins = (tokens >= 0) & self.spaced[tokens] & ~self.mark[tokens]
        later = jnp.cumsum(begins[:, ::-1], axis=1)[:, ::-1]  # words from each token on
        needed = jnp.maximum((later >= self.order).sum(axis=1) - 1, (tokens < 0).sum(axis=1))
        words = jnp.full((len(tokens), self.order - 1), self.unknown + 1)
        state: Any = (needed.min(), zero, all_spellings, zero, words)

        def step(state: Any) -> Any:
            place, low, high, depth, words = state
            token = tokens[:, place]
            spaced, used = self.spaced[token], token >= 0
            key = jnp.where(spaced | (depth == 0), self.begun[token], token)
            inside = jnp.where(spaced, 0, depth)
            below, above = self._narrowed(
                jnp.where(spaced, 0, low), jnp.where(spaced, all_spellings, high), inside, key
            )
            found = (below < above) & (inside >= 0)
            marked = ~found & self.mark[token]
            ends = used & (spaced | marked) & (depth != 0)
            words = jnp.where(ends[:, None], self._ended(words, low, depth), words)
            new = jnp.where(found, below, 0), jnp.where(found, above, all_spellings)
            deeper = jnp.where(found, inside + 1, jnp.where(marked, 0, _UNKNOWN))
            low, high = jnp.where(used, new[0], low), jnp.where(used, new[1], high)
            return place + 1, low, high, jnp.where(used, deeper, depth), words

        return jax.lax.while_loop(lambda state: state[0] < tokens.shape[1], step, state)[1:]

    def _key(self, spelling: jax.Array, depth: jax.Array) -> jax.Array:
        """The tokens of spellings after `depth` ones; -1 where they end."""
        place = at(self.begin, spelling) + depth
        return jnp.where(place < at(self.begin, spelling + 1), at(self.tokens, place), -1)

    def _narrowed(
        self, low: jax.Array, high: jax.Array, depth: jax.Array, token: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The range of the spellings in ranges [R] of which the token after `depth` ones [R] is this one [R]."""
        token = token[:, None] + jnp.arange(2)
        low, high = (jnp.broadcast_to(one[:, None], token.shape) for one in (low, high))
        place = first_place(
            lambda index: self._key(index, depth[:, None, None]) < token[..., None], low, high, len(self.begin)
        )
        return place[:, 0], place[:, 1]

    def _ended(self, words: jax.Array, low: jax.Array, depth: jax.Array) -> jax.Array:
        """words [R,order-1] with the word at the end."""
        is_whole = (depth > 0) & (self._key(low, depth) < 0)
        word = jnp.where(is_whole, at(self.word, low), self.unknown)
        return jnp.concatenate([words, word[:, None]], axis=1)[:, 1:]

    def _contexts(self, words: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The nodes [order,R] of no word, the latest word, ..., and the backoff weights of all longer ones."""
        nodes = find_contexts(self.child, self.token, words[:, ::-1].T, len(self.token))
        nodes = jnp.concatenate([jnp.zeros((1, len(words)), jnp.int32), nodes])
        weights = self.backoff[nodes]
        return nodes, jnp.exp(weights.sum(axis=0) - jnp.cumsum(weights, axis=0))

    def _token_of(self, depth: jax.Array) -> Callable[[jax.Array], jax.Array]:
        """From spellings [...,R,n] to their tokens after `depth` ones [R]; V where they end."""

        def token_of(spelling: jax.Array) -> jax.Array:
            key = self._key(spelling, depth[:, None])
            return jnp.where(key < 0, len(self.spaced), key)

        return token_of

    def _add(
        self,
        sums: jax.Array,
        nodes: jax.Array,
        weights: jax.Array,
        low: jax.Array,
        high: jax.Array,
        column_of: Callable[[jax.Array], jax.Array],
    ) -> jax.Array:
        """sums [R,n] and, for each of nodes [k,R], weight [k,R] times `more` of its continuations from low to high [R].

        column_of: from spellings [k,R,m] to where in `sums` they belong.
        """
        rows, nowhere = jnp.arange(sums.shape[0])[:, None], sums.shape[1]
        every = span(self.first, nodes)

        def place_of(limit: jax.Array) -> jax.Array:
            limits = jnp.broadcast_to(limit, nodes.shape)[..., None]
            return first_place(lambda index: at(self.next_spelling, index) < limits, *every, len(self.more))

        begin, end = place_of(low), place_of(high)

        def put(loop: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            done, sums = loop
            edge = (begin + done)[..., None] + jnp.arange(CHUNK)
            column = jnp.where(edge < end[..., None], column_of(at(self.next_spelling, edge)), nowhere)
            return done + CHUNK, sums.at[rows, column].add(at(self.more, edge) * weights[..., None], mode="drop")

        return jax.lax.while_loop(lambda loop: (begin + loop[0] < end).any(), put, (jnp.int32(0), sums))[1]


def _log(values: jax.Array) -> jax.Array:
    return jnp.log(jnp.maximum(values, _LEAST))


def _shorter(tables: Tables, logprob: np.ndarray) -> np.ndarray:
    """log P [N] of the continuations in the context without its first word, with its backoff weight."""
    keys = tables.node * len(logprob) + tables.following
    node, found = tables.node, np.zeros(len(keys))
    while (left := node > 0).any():
        found[left] += tables.backoff[node[left]]
        node = np.where(left, tables.parent[node], node)
        wanted = node * len(logprob) + tables.following
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        known = left & (node > 0) & (keys[place] == wanted)
        found[known] += tables.values[place[known]]
        node = np.where(known, 0, node)
        empty = left & ~known & (node == 0)
        found[empty] += logprob[tables.following[empty]]
    return found


def _over_spellings(tables: Tables, more: np.ndarray, word: np.ndarray, alone: np.ndarray) -> Tables:
    """Tables whose continuations are spellings; those of the empty context have the probabilities `alone` [S].

    more: [N], of the continuations. word: [S], of each spelling.
    """
    by_word = np.argsort(word, kind="stable")
    begin, end = (np.searchsorted(word[by_word], tables.following, side) for side in ("left", "right"))
    counts = end - begin
    which = np.repeat(np.arange(len(counts)), counts)
    spelling = by_word[begin[which] + np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)]
    node = tables.node[which]
    order = np.lexsort((spelling, node))
    return tables._replace(
        node=np.concatenate([np.zeros(len(word), node.dtype), node[order]]),
        following=np.concatenate([np.arange(len(word)), spelling[order]]),
        values=np.concatenate([alone, more[which[order]]]).astype(np.float32),
    )
