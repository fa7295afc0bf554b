"""From an automaton over bytes to one over a vocabulary's tokens, as arrays of few different columns."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from whisper_nnx.grammar.automaton import ByteAutomaton

START, REJECTED = 0, 1  # states
MAX_CELLS = 1 << 23  # of a table, 16 MB
UNREACHABLE = np.iinfo(np.int16).max
_LEAST = 128  # states and classes, for which a program is compiled
_EOT_CLASS, _OTHER_CLASS = 1, 2  # 0: tokens that never match


@dataclass(frozen=True)
class TokenAutomaton:
    """States and classes of tokens, S and C of them, each rounded up to a power of two.

    Attributes:
      table: [S,C] int16, the next state, or -1 where a token does not match.
      distance: [S] int16, how many tokens it takes at least until the text may end.
      token_class: [V] int16.
    """

    table: np.ndarray
    distance: np.ndarray
    token_class: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        """S and C, which decide what is compiled."""
        return self.table.shape[0], self.table.shape[1]

    def after(self, tokens: list[int]) -> int:
        """The state after tokens from the start; `REJECTED` if they do not match."""
        state = START
        for token in tokens:
            state = int(self.table[state, self.token_class[token]])
            if state < 0:
                return REJECTED
        return state


class Vocabulary:
    """The bytes of tokens as a tree; of a tokenizer's text tokens, by id."""

    def __init__(self, text: Mapping[int, bytes]):
        nodes: dict[bytes, int] = {b"": 0}
        self.steps: list[tuple[int, int]] = [(0, 0)]  # of each node, the node before it and its byte
        self.node_of: dict[int, int] = {}
        for token, piece in text.items():
            for n in range(1, len(piece) + 1):
                if piece[:n] not in nodes:
                    nodes[piece[:n]] = len(self.steps)
                    self.steps.append((nodes[piece[: n - 1]], piece[n - 1]))
            if piece:
                self.node_of[token] = nodes[piece]


def token_automaton(
    automaton: ByteAutomaton, vocabulary: Vocabulary, size: int, eot: int, others: Collection[int], *, strict: bool
) -> TokenAutomaton:
    """The automaton over a vocabulary's tokens.

    Args:
      automaton: of the bytes.
      vocabulary: of the tokens that may be sampled.
      size: of the whole vocabulary, V.
      eot: the id of the end of text.
      others: ids that are no text and may stand beside it: timestamps.
      strict: whether tokens that do not match are excluded: then the end of text may come only where the grammar may
        end, and `others` only there or before the text. Otherwise both may come anywhere, and after a token that does
        not match, all others do.

    Raises:
      ValueError: the table would have too many cells, or these tokens cannot write any of the texts.
    """
    effects, class_of_node = _effects(automaton, vocabulary)
    states, classes = len(automaton.ends) + 2, len(effects) + 2
    shape = (_padded(states), _padded(classes))
    if shape[0] * shape[1] > MAX_CELLS:
        raise ValueError(
            f"needs a table of {shape[0]} states and {shape[1]} classes of tokens, more than the limit of "
            f"{MAX_CELLS} cells; simplify it"
        )
    table = np.full(shape, -1, np.int16)
    # State 0 of the bytes is two states here: before any text, and where a loop leads back to it.
    following = np.stack(effects, axis=1)  # [states of bytes, classes], 0 of them the dead one
    following = np.where(following >= 0, following + 2, -1)
    table[2:states, [0, *range(3, classes)]] = following
    ends = np.zeros(shape[0], bool)
    ends[2:states] = automaton.ends
    table[START], ends[START] = table[2], ends[2]
    token_class = np.zeros(size, np.int16)
    token_class[list(others)] = _OTHER_CLASS
    place = [0, *range(3, classes)]
    for token, node in vocabulary.node_of.items():
        token_class[token] = place[class_of_node[node]]
    token_class[eot] = _EOT_CLASS
    distance = _distances(table, ends)
    if distance[START] == UNREACHABLE:
        raise ValueError("cannot be written with the tokens that are not suppressed; suppress fewer")
    table = np.where((table >= 0) & (distance[table] < UNREACHABLE), table, -1).astype(np.int16)
    own = np.arange(shape[0])
    if strict:
        table[:, _EOT_CLASS] = np.where(ends, own, -1)
        table[:, _OTHER_CLASS] = np.where(ends | (own == START), own, -1)
    else:
        table[:, [_EOT_CLASS, _OTHER_CLASS]] = own[:, None]
        table[REJECTED] = REJECTED
        distance = np.zeros_like(distance)
    return TokenAutomaton(table, distance, token_class)


def _effects(automaton: ByteAutomaton, vocabulary: Vocabulary) -> tuple[list[np.ndarray], list[int]]:
    """The different effects of tokens on all states, [S] each, and which one each node of the vocabulary has.

    Tokens of equal effect share a class. Effect 0 matches in no state.
    """
    table, states = automaton.table, len(automaton.ends)
    _, byte_class = np.unique(table, axis=1, return_inverse=True)
    steps = np.append(table, np.full((1, 256), -1, table.dtype), axis=0)  # -1, the last row, stays
    effects = [np.full(states, -1, np.int32)]
    known = {effects[0].tobytes(): 0}
    first = np.arange(states, dtype=np.int32)
    known_steps: dict[tuple[int, int], int] = {}
    of_node, classes = [-1], byte_class.reshape(-1).tolist()  # of the root, which is no token: the identity
    for before, byte in vocabulary.steps[1:]:
        key = (of_node[before], classes[byte])
        if key not in known_steps:
            effect = steps[first if key[0] < 0 else effects[key[0]], byte]
            number = known.setdefault(effect.tobytes(), len(known))
            if number == len(effects):
                effects.append(effect)
                if len(effects) * states > 4 * MAX_CELLS:
                    raise ValueError(
                        f"has {states} states, which more than {len(effects)} classes of tokens lead from one to "
                        "another, too many; simplify it"
                    )
            known_steps[key] = number
        of_node.append(known_steps[key])
    used = sorted({0, *(of_node[node] for node in vocabulary.node_of.values())})
    place = {number: n for n, number in enumerate(used)}
    return [effects[number] for number in used], [place.get(number, 0) for number in of_node]


def _distances(table: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Tokens until the text may end, of each state."""
    distance = np.where(ends, 0, UNREACHABLE).astype(np.int16)
    padded = np.append(distance, np.int16(UNREACHABLE))  # -1 leads nowhere
    while True:
        nearest = padded[table].min(axis=1)
        new = np.minimum(padded[:-1], np.where(nearest < UNREACHABLE, nearest + 1, UNREACHABLE)).astype(np.int16)
        if (new == padded[:-1]).all():
            return new
        padded[:-1] = new


def _padded(n: int) -> int:
    """The size class: a power of two; small grammars are all of one class."""
    return max(_LEAST, 1 << (n - 1).bit_length())
