"""The grammars of windows: automata or parsers over a tokenizer's vocabulary, and the rule of the decoding loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from whisper_nnx.decoding.grammar import GrammarRule, ParserRule
from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.grammar.grammar import automaton_of
from whisper_nnx.grammar.lark import Lark
from whisper_nnx.grammar.parser import TokenParser, llguidance_tokenizer, token_parser
from whisper_nnx.grammar.tokens import REJECTED, TokenAutomaton, Vocabulary, token_automaton
from whisper_nnx.model.config import WhisperConfig
from whisper_nnx.text.tokenizer import Tokenizer
from whisper_nnx.transcription.suppression import suppressed_tokens

# The options that decide an automaton.
_DECIDING = (
    *("grammar", "grammar_rule", "choices", "regex", "json_schema"),
    *("suppress_tokens", "suppress_regex", "tinydiarize", "without_timestamps"),
)


def grammar_program(tokenizer: Tokenizer, vocab_size: int, options: DecodingOptions) -> tuple[int, ...]:
    """What decides the program of a window's grammar: the size of its tables, (0,) for a parser; () without a grammar.

    Raises ValueError for a grammar that these options leave no text.
    """
    grammar = _grammar_of_options(tokenizer, vocab_size, options)
    if grammar is None:
        return ()
    return grammar.size if isinstance(grammar, TokenAutomaton) else (0,)


def least_tokens(tokenizer: Tokenizer, vocab_size: int, options: DecodingOptions) -> int:
    """How many tokens the shortest text of the grammar takes after the prefix, with a timestamp where there is none.

    0 without a grammar and with a penalty; of a parser, the text counts as 0. Raises ValueError for a prefix that no
    text of the grammar begins with.
    """
    found, grammar = _grammar_of_options(tokenizer, vocab_size, options), options.constraint
    if found is None or grammar is None or options.grammar_penalty is not None:
        return 0
    prefix = _prefix(tokenizer, options)
    if isinstance(found, TokenAutomaton):
        state = found.after(prefix)
        matches, least = state != REJECTED, int(found.distance[state])
    else:
        matches, least = found.after(tokenizer.text_tokens(prefix)) is not None, 0
    if not matches:
        raise ValueError(f"prefix={options.prefix!r} is not the beginning of a text of {grammar.shown}; drop it")
    return least + (not options.without_timestamps and not options.prefix)


def grammar_rule(
    tokenizer: Tokenizer,
    config: WhisperConfig,
    options: Sequence[DecodingOptions | None],
    limits: Sequence[int],
) -> GrammarRule | ParserRule:
    """The rule of windows that all have grammars, of one size, except idle ones (None); limits: of sampled tokens."""
    first = next(o for o in options if o is not None)
    every = [o or first for o in options]
    found = [_grammar_of_options(tokenizer, config.vocab_size, o) for o in every]
    penalty = [math.inf if o.grammar_penalty is None else o.grammar_penalty for o in every]
    prefixes = [_prefix(tokenizer, o) for o in every]
    if parsers := [one for one in found if isinstance(one, TokenParser)]:
        texts = [tokenizer.text_tokens(ids) for ids in prefixes]
        size = config.max_target_positions
        return ParserRule.from_parsers(parsers, penalty, texts, tokenizer.special, size=size)
    automata = [one for one in found if isinstance(one, TokenAutomaton)]
    state = [automaton.after(ids) for automaton, ids in zip(automata, prefixes, strict=True)]
    return GrammarRule.from_automata(automata, penalty, state, limits)


def _prefix(tokenizer: Tokenizer, options: DecodingOptions) -> list[int]:
    prefix = options.prefix or ()
    ids = tokenizer.encode(" " + prefix.strip()) if isinstance(prefix, str) else list(prefix)
    return tokenizer.text_tokens(ids) if options.without_timestamps else ids


def _grammar_of_options(
    tokenizer: Tokenizer, vocab_size: int, options: DecodingOptions
) -> TokenAutomaton | TokenParser | None:
    if options.constraint is None:
        return None
    penalty = None if options.grammar_penalty is None else 1.0
    deciding: dict[str, Any] = {name: getattr(options, name) for name in _DECIDING}
    return _over_tokens(tokenizer, vocab_size, DecodingOptions(**deciding, grammar_penalty=penalty))


@lru_cache(maxsize=32)
def _over_tokens(tokenizer: Tokenizer, vocab_size: int, options: DecodingOptions) -> TokenAutomaton | TokenParser:
    grammar, strict, never = options.constraint, options.grammar_penalty is None, frozenset[int]()
    assert grammar is not None
    if strict:  # what is suppressed leads to no text
        never = frozenset(suppressed_tokens(tokenizer, vocab_size, options)[0].nonzero()[0].tolist())
    special = tokenizer.special
    times = () if options.without_timestamps else range(special.timestamp_begin, special.timestamp_end + 1)
    others = [*times, *([] if special.sot_lm is None else [special.sot_lm])]
    form = automaton_of(grammar)
    try:
        if isinstance(form, Lark):
            tokens = _for_llguidance(tokenizer, never, vocab_size)
            return token_parser(form, grammar.shown, tokens, vocab_size, special.eot, others, strict=strict)
        return token_automaton(form, _vocabulary(tokenizer, never), vocab_size, special.eot, others, strict=strict)
    except ValueError as error:
        raise ValueError(f"{grammar.shown}: {error}") from None


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer, never: frozenset[int]) -> Vocabulary:
    return Vocabulary(_text_tokens(tokenizer, never))


@lru_cache(maxsize=4)
def _for_llguidance(tokenizer: Tokenizer, never: frozenset[int], vocab_size: int) -> Any:
    return llguidance_tokenizer(_text_tokens(tokenizer, never), vocab_size, tokenizer.special.eot)


def _text_tokens(tokenizer: Tokenizer, never: frozenset[int]) -> dict[int, bytes]:
    ids = [i for i in tokenizer.text_tokens(range(tokenizer.vocab_size)) if i not in never]
    return dict(zip(ids, tokenizer.token_bytes(ids), strict=True))
