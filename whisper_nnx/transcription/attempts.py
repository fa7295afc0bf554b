"""An attempt to decode a window: its options as inputs of the token loop, and what that returns as a result."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from whisper_nnx.decoding.fusion import identity_of
from whisper_nnx.decoding.loop import DecodingBatch, padded_positions
from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.decoding.strategies import Beam, Candidates, Sampling, Strategy
from whisper_nnx.model.config import WhisperConfig
from whisper_nnx.text.tokenizer import Tokenizer
from whisper_nnx.transcription.biasing import trie_of
from whisper_nnx.transcription.grammars import grammar_program, grammar_rule, least_tokens
from whisper_nnx.transcription.suppression import NO_LIMITS, check_choice, limits_of, require_timestamps, rules_of


@dataclass(frozen=True)
class Attempt:
    """How a window is decoded: options with a language, and the seed of the samples.

    grammar_program: see `grammars.grammar_program`; bias_size: of the trie of its phrases. `Attempt.of` finds both.
    """

    options: DecodingOptions
    seed: int = 0
    grammar_program: tuple[int, ...] = ()
    bias_size: int = 0

    @classmethod
    def of(cls, config: WhisperConfig, tokenizer: Tokenizer, options: DecodingOptions, seed: int = 0) -> Attempt:
        trie = trie_of(tokenizer, options)
        grammar = grammar_program(tokenizer, config.vocab_size, options)
        return cls(options, seed, grammar, trie.size if trie else 0)

    @property
    def program(self) -> tuple[Any, ...]:
        """What is the same in all windows that are decoded together: the strategy, and the kinds of rules."""
        o = self.options
        suppressed = o.suppress_tokens, o.suppress_blank, o.suppress_regex, o.tinydiarize
        kinds = limits_of(o) != NO_LIMITS, self.grammar_program, o.grammar_penalty is None, self.bias_size
        return strategy_of(o), suppressed, *kinds, identity_of(o.lm)


@dataclass(frozen=True)
class Alternative:
    """A candidate of a window's transcript; avg_logprob as in DecodingResult."""

    tokens: tuple[int, ...]
    text: str
    avg_logprob: float


@dataclass(frozen=True)
class DecodingResult:
    """Transcript of a window.

    audio_features [T,D]. language_probs: by code, None unless the language was detected. avg_logprob: mean over tokens
    and the end of text, as in openai-whisper. token_logprobs: one per token, after the rules. compression_ratio: of the
    text, by zlib; high if it repeats itself. looped: stopped because a phrase occurred max_repeats times in a row.
    alternatives: the n_best candidates if n_best is above 1, best first; the first is the transcript.
    """

    audio_features: jax.Array
    language: str
    language_probs: dict[str, float] | None = None
    tokens: tuple[int, ...] = ()
    text: str = ""
    avg_logprob: float = np.nan
    no_speech_prob: float = np.nan
    temperature: float = np.nan
    compression_ratio: float = np.nan
    token_logprobs: tuple[float, ...] = ()
    looped: bool = False
    alternatives: tuple[Alternative, ...] = ()


def row_seed(*numbers: int) -> int:
    """Hashes several numbers to a seed. Raises ValueError for a negative one."""
    if min(numbers) < 0:
        raise ValueError(f"seed={min(numbers)} must be 0 or more")
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def strategy_of(options: DecodingOptions) -> Strategy:
    """The decoding strategy of these options."""
    if options.beam_size is not None:
        return Beam(options.beam_size, options.max_candidates)
    return Sampling(options.best_of or 1)


def loop_inputs(config: WhisperConfig, tokenizer: Tokenizer, attempts: Sequence[Attempt | None]) -> DecodingBatch:
    """Inputs of one program. Idle rows (None) have a limit of 0 tokens."""
    special, n_ctx = tokenizer.special, config.max_target_positions
    options = [one.options if one else None for one in attempts]
    first = next(o for o in options if o is not None)
    least = [least_tokens(tokenizer, config.vocab_size, o) if o else 0 for o in options]
    initial = [
        initial_ids(o, tokenizer, n_ctx, some) if o else InitialIds([special.sot], 0, [])
        for o, some in zip(options, least, strict=True)
    ]
    padded = np.full((len(options), padded_positions(n_ctx)), special.eot, np.int32)
    for row, (ids, _, _) in zip(padded, initial, strict=True):
        row[: len(ids)] = ids
    limits = [_most_tokens(o, i.ids, n_ctx) if o else 0 for o, i in zip(options, initial, strict=True)]
    grammar = None
    if first.constraint is not None:
        grammar = grammar_rule(tokenizer, config, options, limits)
    return DecodingBatch(
        initial_ids=padded,
        initial_length=np.array([len(i.ids) for i in initial], np.int32),
        sot_index=np.array([i.sot_index for i in initial], np.int32),
        limit=np.array(limits, np.int32),
        temperature=np.array([(o or first).temperature for o in options], np.float32),
        seed=np.array([one.seed if one else 0 for one in attempts], np.uint32),
        rules=rules_of(tokenizer, config, options, [i.prefix for i in initial], grammar),
    )


class InitialIds(NamedTuple):
    """The ids before the first sampled one; the index of the start sequence; the prefix, part of the transcript."""

    ids: list[int]
    sot_index: int
    prefix: list[int]


def check_window(tokenizer: Tokenizer, config: WhisperConfig, options: DecodingOptions) -> None:
    """Raises ValueError if the options leave a window no first token, or no text of its grammar fits in a window."""
    check_choice(tokenizer, config.vocab_size, options)
    grammar, n_ctx = options.constraint, config.max_target_positions
    if grammar is None:
        return
    least = least_tokens(tokenizer, config.vocab_size, options)
    without_prompt = replace(options, prompt=None, language=options.language or "en")  # any language is one id
    most = _most_tokens(options, initial_ids(without_prompt, tokenizer, n_ctx).ids, n_ctx)
    if least > most:
        raise ValueError(f"{grammar.shown} takes at least {least} tokens, more than the {most} of a window; shorten it")


def _most_tokens(options: DecodingOptions, initial: Sequence[int], n_ctx: int) -> int:
    """The most tokens to sample after the initial ids."""
    most = options.max_new_tokens or options.sample_len or n_ctx // 2
    return min(most, n_ctx - len(initial) + 1)  # the last one sampled is not fed


def prompt_room(following: Sequence[int], n_ctx: int, least: int = 0) -> int:
    """The most tokens of previous text before the start and the prefix, after which at least `least` are sampled."""
    return max(0, min(n_ctx // 2 - 1, n_ctx - len(following) - max(2, least)))


def initial_ids(options: DecodingOptions, tokenizer: Tokenizer, n_ctx: int, least: int = 0) -> InitialIds:
    """The ids that precede the sampled tokens of a window, which are at least `least`.

    Previous text takes up to half the context, less what the prefix and `least` need beyond their half; both lose their
    beginning. If sample_len is given, the prefix leaves room for that many tokens within half the context.
    """
    special, half = tokenizer.special, n_ctx // 2
    require_timestamps(options, special)
    start = list(tokenizer.sot_sequence(options.language, options.task, not options.without_timestamps))
    prefix = _ids(options.prefix, tokenizer)
    if prefix:
        room = half - options.sample_len if options.sample_len and options.sample_len < half else half - 1
        prefix = prefix[-room:]
        if not options.without_timestamps and not tokenizer.is_timestamp(prefix[0]):
            prefix = [special.timestamp_begin, *prefix]
    room = prompt_room([*start, *prefix], n_ctx, least)
    prompt = _ids(options.prompt, tokenizer)[-room:] if room else []
    previous = [special.sot_prev, *prompt] if prompt else []
    return InitialIds([*previous, *start, *prefix], len(previous), prefix)


def _ids(text: str | tuple[int, ...] | None, tokenizer: Tokenizer) -> list[int]:
    if isinstance(text, str):
        return tokenizer.encode(" " + text.strip()) if text.strip() else []
    for token in text or ():
        if not 0 <= token < tokenizer.vocab_size:
            raise ValueError(f"token {token} in a prompt or prefix is outside the vocabulary of {tokenizer.vocab_size}")
    return list(text or ())


def best_of(tokenizer: Tokenizer, options: DecodingOptions, candidates: Candidates) -> dict[str, Any]:
    """The best of one window's candidates [K,...], as fields of its DecodingResult."""
    lengths, totals = candidates.length.tolist(), candidates.total.tolist()
    scores = (candidates.total + candidates.raised).tolist()

    def score(k: int) -> float:
        alpha, n = options.length_penalty, lengths[k]
        # max: the reference divides by zero for an empty sequence
        return scores[k] / (max(n, 1) if alpha is None else ((5 + n) / 6) ** alpha)

    def alternative(k: int) -> Alternative:
        tokens = tuple(candidates.tokens[k, : lengths[k]].tolist())
        text = tokenizer.decode(i for i in tokens if i != tokenizer.special.sot_lm)  # a speaker turn is not text
        return Alternative(tokens, text.strip(), totals[k] / (lengths[k] + 1))

    valid = [k for k in range(len(lengths)) if candidates.valid[k]]
    ranked = sorted(valid, key=score, reverse=True) or [0]
    best, *others = map(alternative, ranked[: options.n_best])
    return {
        "tokens": best.tokens,
        "text": best.text,
        "avg_logprob": best.avg_logprob,
        "temperature": options.temperature,
        "compression_ratio": compression_ratio(best.text),
        "token_logprobs": tuple(candidates.logprobs[ranked[0], : len(best.tokens)].tolist()),
        "looped": bool(candidates.stopped[ranked[0]]),
        "alternatives": (best, *others) if options.n_best > 1 else (),
    }


def compression_ratio(text: str) -> float:
    """Length of the text in UTF-8 over that of its zlib compression: above 2.4, the text is usually a loop."""
    raw = text.encode("utf-8")
    return len(raw) / len(zlib.compress(raw))
