"""The grammars of windows: their automata over a tokenizer's vocabulary, and the rule of the decoding loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from whisper_nnx.decoding.grammar import GrammarRule
from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.grammar.grammar import automaton_of
from whisper_nnx.grammar.tokens import REJECTED, START, TokenAutomaton, Vocabulary, token_automaton
from whisper_nnx.text.tokenizer import Tokenizer
from whisper_nnx.transcription.suppression import suppressed_tokens

# The options that decide an automaton.
_DECIDING = (
    *("grammar", "grammar_rule", "choices", "regex", "json_schema"),
    *("suppress_tokens", "suppress_regex", "tinydiarize", "without_timestamps"),
)


def grammar_program(tokenizer: Tokenizer, vocab_size: int, options: DecodingOptions) -> tuple[int, ...]:
    """What decides the program of a window's grammar: the size of its tables; () without a grammar.

    Raises ValueError for a grammar that these options leave no text.
    """
    automaton = _automaton_of_options(tokenizer, vocab_size, options)
    return () if automaton is None else automaton.size


def least_tokens(tokenizer: Tokenizer, vocab_size: int, options: DecodingOptions) -> int:
    """How many tokens the shortest text of the grammar takes after the prefix, with a timestamp where there is none.

    0 without a grammar and with a penalty. Raises ValueError for a prefix that no text of the grammar begins with.
    """
    automaton, grammar = _automaton_of_options(tokenizer, vocab_size, options), options.constraint
    if automaton is None or grammar is None or options.grammar_penalty is not None:
        return 0
    state = _state(automaton, tokenizer, options)
    if state == REJECTED:
        raise ValueError(f"prefix={options.prefix!r} is not the beginning of a text of {grammar.shown}; drop it")
    return int(automaton.distance[state]) + (not options.without_timestamps and not options.prefix)


def grammar_rule(
    tokenizer: Tokenizer,
    vocab_size: int,
    options: Sequence[DecodingOptions | None],
    limits: Sequence[int],
) -> GrammarRule:
    """The rule of windows that all have grammars, of one size, except idle ones (None); limits: of sampled tokens."""
    first = next(o for o in options if o is not None)
    every = [o or first for o in options]
    automata = [automaton for o in every if (automaton := _automaton_of_options(tokenizer, vocab_size, o)) is not None]
    penalty = [math.inf if o.grammar_penalty is None else o.grammar_penalty for o in every]
    state = [_state(automaton, tokenizer, o) for automaton, o in zip(automata, every, strict=True)]
    return GrammarRule.from_automata(automata, penalty, state, limits)


def _state(automaton: TokenAutomaton, tokenizer: Tokenizer, options: DecodingOptions) -> int:
    """The state after the prefix."""
    prefix = options.prefix or ()
    ids = tokenizer.encode(" " + prefix.strip()) if isinstance(prefix, str) else list(prefix)
    return automaton.after(tokenizer.text_tokens(ids) if options.without_timestamps else ids) if prefix else START


def _automaton_of_options(tokenizer: Tokenizer, vocab_size: int, options: DecodingOptions) -> TokenAutomaton | None:
    if options.constraint is None:
        return None
    penalty = None if options.grammar_penalty is None else 1.0
    deciding: dict[str, Any] = {name: getattr(options, name) for name in _DECIDING}
    return _token_automaton(tokenizer, vocab_size, DecodingOptions(**deciding, grammar_penalty=penalty))


@lru_cache(maxsize=32)
def _token_automaton(tokenizer: Tokenizer, vocab_size: int, options: DecodingOptions) -> TokenAutomaton:
    grammar, strict, never = options.constraint, options.grammar_penalty is None, frozenset[int]()
    assert grammar is not None
    if strict:  # what is suppressed leads to no text
        never = frozenset(suppressed_tokens(tokenizer, vocab_size, options)[0].nonzero()[0].tolist())
    automaton, vocabulary = automaton_of(grammar), _vocabulary(tokenizer, never)
    special = tokenizer.special
    times = () if options.without_timestamps else range(special.timestamp_begin, special.timestamp_end + 1)
    others = [*times, *([] if special.sot_lm is None else [special.sot_lm])]
    try:
        return token_automaton(automaton, vocabulary, vocab_size, special.eot, others, strict=strict)
    except ValueError as error:
        raise ValueError(f"{grammar.shown}: {error}") from None


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer, never: frozenset[int]) -> Vocabulary:
    ids = [i for i in tokenizer.text_tokens(range(tokenizer.vocab_size)) if i not in never]
    return Vocabulary(dict(zip(ids, tokenizer.token_bytes(ids), strict=True)))
