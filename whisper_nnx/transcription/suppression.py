"""What the options of windows forbid: suppressed tokens, the rules of the decoding loop, and what is left to sample."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from whisper_nnx.audio.features import POSITIONS_PER_SECOND
from whisper_nnx.decoding.bias import BiasRule
from whisper_nnx.decoding.fusion import FusionRule, check_lm
from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.decoding.rules import NO_LIMIT, RepetitionRule, Rule, SuppressRule, TimestampRule
from whisper_nnx.model.config import WhisperConfig
from whisper_nnx.text.special_tokens import SpecialTokens
from whisper_nnx.text.tokenizer import Tokenizer
from whisper_nnx.transcription.biasing import trie_of

NO_LIMITS = (1.0, 0, None)


def limits_of(options: DecodingOptions) -> tuple[float, int, int | None]:
    """What `RepetitionRule` does; `NO_LIMITS` needs none."""
    return options.repetition_penalty, options.no_repeat_ngram_size, options.max_repeats


def rules_of(
    tokenizer: Tokenizer,
    config: WhisperConfig,
    options: Sequence[DecodingOptions | None],
    prefixes: Sequence[Sequence[int]],
    grammar: Rule | None = None,
) -> tuple[Rule, ...]:
    """The rules for R rows with their options (None: idle) and prefixes, in the order in which they are applied.

    What the options suppress is the same in all rows. A grammar comes before the timestamps, which look at the text
    that is left; where it only takes a penalty, after them, as in whisper.cpp.
    """
    special, first = tokenizer.special, next(o for o in options if o is not None)
    rules: list[Rule] = []
    limits = [limits_of(o) if o else NO_LIMITS for o in options]
    if {*limits} != {NO_LIMITS}:
        penalty, ngram, repeats = zip(*limits, strict=True)
        size = config.max_target_positions
        rules.append(
            RepetitionRule.from_prefixes(prefixes, special, size=size, penalty=penalty, ngram=ngram, repeats=repeats)
        )
    never, at_start = suppressed_tokens(tokenizer, config.vocab_size, first)
    latest = special.timestamp_begin + config.max_source_positions  # the end of the window
    never[latest + 1 : special.timestamp_end + 1] = True
    rules.append(SuppressRule.from_masks(never, at_start, len(options)))
    every = [o or first for o in options]
    latest_s = [o.max_initial_timestamp for o in every]
    rules.append(
        TimestampRule.from_prefixes(
            prefixes,
            special,
            enabled=[not o.without_timestamps for o in every],
            max_initial=[NO_LIMIT if s is None else timestamp_steps(s) for s in latest_s],
        )
    )
    if grammar is not None:
        rules.insert(len(rules) - (first.grammar_penalty is None), grammar)
    tries = [trie_of(tokenizer, o) if o else None for o in options]
    if any(tries):
        rules.append(BiasRule.from_tries(tries, config.vocab_size))
    if first.lm is not None:
        assert not isinstance(first.lm, str)  # `with_lm` has read it
        weights = [o.lm_weight if o else 0.0 for o in options]
        rules.append(FusionRule.from_prefixes(prefixes, special, weight=weights, lm=first.lm))
    return tuple(rules)


def suppressed_tokens(tokenizer: Tokenizer, vocab_size: int, options: DecodingOptions) -> tuple[np.ndarray, np.ndarray]:
    """Masks [V] of what is never sampled, and of what is not sampled first."""
    special, ids = tokenizer.special, options.suppress_tokens or ()
    if bad := [i for i in ids if not -1 <= int(i) < vocab_size]:
        raise ValueError(f"suppress_tokens names {bad[0]}, outside of the vocabulary of {vocab_size} tokens; drop it")
    never = np.ones(vocab_size, bool)
    known = np.asarray(tokenizer.known_ids)[:vocab_size]
    never[: len(known)] = ~known  # a padded vocabulary has rows without a token
    never[[int(i) for i in ids if int(i) >= 0]] = True
    if -1 in ids and options.constraint is None:  # a grammar itself states which symbols may be written
        never[list(tokenizer.non_speech_tokens)] = True
    if options.suppress_regex is not None:
        never[_matching_tokens(tokenizer, options.suppress_regex)] = True
    tasks = [special.transcribe, special.translate, special.sot, special.sot_prev, special.no_speech]
    if not options.tinydiarize:
        tasks.append(special.sot_lm)
    elif special.sot_lm is None:
        raise ValueError(
            "tinydiarize=True: this checkpoint has no <|startoflm|> to mark the turns of speakers; drop it"
        )
    never[[i for i in tasks if i is not None]] = True
    if never.all():
        raise ValueError(f"suppress_tokens leaves none of the {vocab_size} tokens to sample; drop some")
    first = np.zeros(vocab_size, bool)
    if options.suppress_blank and (options.constraint is None or options.grammar_penalty is not None):
        first[[*tokenizer.blank_tokens, special.eot]] = True
    return never, first


def check_choice(tokenizer: Tokenizer, vocab_size: int, options: DecodingOptions) -> None:
    """Raises ValueError if the options leave a window no first token, or prefer more than there is room for."""
    special = tokenizer.special
    trie_of(tokenizer, options)
    if callable(options.lm):
        check_lm(options.lm, vocab_size)
    require_timestamps(options, special)
    never, first = suppressed_tokens(tokenizer, vocab_size, options)
    allowed = ~(never | first)
    if not options.without_timestamps:
        latest_s = options.max_initial_timestamp
        last = special.timestamp_end if latest_s is None else special.timestamp_begin + timestamp_steps(latest_s)
        allowed = allowed[special.timestamp_begin : min(last, special.timestamp_end) + 1]
    if not options.prefix and not allowed.any():
        what = "token" if options.without_timestamps else "timestamp"
        fix = "" if options.without_timestamps else ", or set without_timestamps=True"
        raise ValueError(f"suppress_tokens leaves no {what} that a window could start with; drop some{fix}")


def require_timestamps(options: DecodingOptions, special: SpecialTokens) -> None:
    """Raises ValueError where timestamps are to be sampled and the vocabulary has none."""
    if not options.without_timestamps and special.timestamp_end < special.timestamp_begin:
        raise ValueError("this checkpoint's vocabulary has no timestamps; set without_timestamps=True")


def timestamp_steps(seconds: float) -> int:
    """Of a timestamp."""
    return round(min(seconds * POSITIONS_PER_SECOND, NO_LIMIT))


@lru_cache(maxsize=8)
def _matching_tokens(tokenizer: Tokenizer, pattern: str) -> list[int]:
    """Ids of the text tokens that match as a whole, as whisper.cpp has it (std::regex_match)."""
    whole = re.compile(pattern)
    return [i for i in tokenizer.text_tokens(range(tokenizer.vocab_size)) if whole.fullmatch(tokenizer.decode([i]))]
