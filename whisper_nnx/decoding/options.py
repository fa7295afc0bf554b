"""`DecodingOptions`: how one 30 s window is decoded. openai-whisper's options have their meaning there."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from whisper_nnx.decoding.phrases import BiasPhrase, parse_phrases
from whisper_nnx.grammar.grammar import Grammar, automaton_of, read_grammar
from whisper_nnx.runtime.options import explained, option
from whisper_nnx.text.languages import language_or_none

TASKS = ("transcribe", "translate", "lang_id")
_OR_NONE = ("sample_len", "max_new_tokens", "best_of", "beam_size", "max_repeats")
_WHOLE = {**dict.fromkeys(_OR_NONE, 1), "max_repeats": 2, "n_best": 1, "no_repeat_ngram_size": 0}  # -> minimum
_GRAMMARS = ("grammar", "choices", "regex", "json_schema")


_option = partial(option, scope="window", group="decoding")
_of_attempts = partial(_option, python_only="FallbackOptions has it, for each attempt")
_grammar = partial(_option, group="grammar")
_of_windows = partial(_option, python_only="meant for single windows and experiments")

BIAS_WEIGHT = 1.0


@explained
@dataclass(frozen=True)
class DecodingOptions:
    """The options of one window; validated, hashable. openai-whisper's options have the same defaults and meaning.

    Raises:
      ValueError: invalid or contradictory options, with the value and the remedy.
    """

    task: str = field(
        default="transcribe",
        metadata=_option(
            "write a transcript, or its translation to English",
            group="task",
            kind="task",
            evaluate=False,
            more='"transcribe", "translate", or "lang_id" (detect the language only).',
        ),
    )
    language: str | None = field(
        default=None,
        metadata=_option(
            "spoken language: de, de-AT, German (default: auto)",
            group="task",
            kind="language",
            more='None and "auto" detect it.',
        ),
    )
    temperature: float = field(
        default=0.0,
        metadata=_of_attempts(
            "0 takes the most probable token; above 0, tokens are sampled from softmax(logits / temperature)"
        ),
    )
    sample_len: int | None = field(
        default=None, metadata=_of_windows("most tokens to sample (default: half the context), a prefix included")
    )
    best_of: int | None = field(
        default=None,
        metadata=_of_attempts("independent samples, of which the most probable is kept; needs a temperature above 0"),
    )
    beam_size: int | None = field(default=None, metadata=_of_attempts("beams of the search; needs temperature 0"))
    patience: float | None = field(
        default=None, metadata=_of_attempts("finished beams to wait for, times beam_size (arXiv:2204.05424)")
    )
    length_penalty: float | None = field(
        default=None,
        metadata=_option(
            "alpha of the length penalty in ranking, 0 to 1 (default: divide by the length)", more="arXiv:1609.08144."
        ),
    )
    prompt: str | tuple[int, ...] | None = field(
        default=None,
        metadata=_of_windows(
            "text or ids that precede the window",
            accepts="str | Sequence[int] | None",
            more="Recordings have `initial_prompt`.",
        ),
    )
    prefix: str | tuple[int, ...] | None = field(
        default=None,
        metadata=_of_windows("text or ids that the transcript starts with", accepts="str | Sequence[int] | None"),
    )
    suppress_tokens: str | tuple[int, ...] | None = field(
        default="-1",
        metadata=_option(
            "token ids never to sample: 1,2,3; -1 stands for most symbols",
            kind="ids",
            accepts="str | Sequence[int] | None",
            more="Most symbols are the tokenizer's non-speech tokens. Tokens that are not part of a transcript (task, "
            "start, previous text) are always suppressed, also with None or an empty value.",
        ),
    )
    suppress_blank: bool = field(
        default=True, metadata=_of_windows("the first token may be neither a space nor the end of text")
    )
    without_timestamps: bool = field(default=False, metadata=_option("write text only, in segments of whole windows"))
    max_initial_timestamp: float | None = field(
        default=1.0, metadata=_of_windows("latest first timestamp, in s; None for no limit")
    )
    fp16: bool | None = field(
        default=None,
        metadata=_option(
            "accepted for openai-whisper's users",
            python_only="the command's own fp16 chooses the dtype of the model",
            more="The model's dtype decides; a warning says where the two differ.",
        ),
    )
    suppress_regex: str | None = field(
        default=None,
        metadata=_option(
            "never sample tokens whose text matches this regular expression",
            more="The whole text of a token has to match, as in whisper.cpp.",
        ),
    )
    max_new_tokens: int | None = field(
        default=None,
        metadata=_option(
            "most tokens to sample per window (default: half the model's context)",
            more="Whatever precedes them: unlike sample_len, it shortens no prefix.",
        ),
    )
    max_repeats: int | None = field(
        default=None,
        metadata=_option(
            "retry a window in which a phrase occurs so many times in a row",
            more="A row ends, and its result is `looped`, where up to 16 text tokens were sampled so many times in a "
            "row, with or without timestamps between them. Beams end together, when the most probable one loops.",
        ),
    )
    repetition_penalty: float = field(
        default=1.0,
        metadata=_option(
            "above 1 makes text tokens that the window already has less probable",
            more="Divides the logit, where it is positive, of text tokens in the prefix or sampled in this window, "
            "else multiplies it (arXiv:1909.05858, as in transformers and CTranslate2). 1 has no effect. This rule and "
            "no_repeat_ngram_size come before all others; log-probabilities are those after them.",
        ),
    )
    no_repeat_ngram_size: int = field(
        default=0,
        metadata=_option(
            "never sample the same N tokens in a row twice in a window; 0: no rule",
            more="A text token is not sampled if it would complete N tokens (timestamps included) that occur in this "
            "order in the prefix or in what was sampled in this window. Timestamps and the end of text are never ruled "
            "out.",
        ),
    )
    bias: tuple[BiasPhrase, ...] | None = field(
        default=None,
        metadata=_option(
            "words to prefer, separated by commas, or a file: phrase<TAB>weight<TAB>variant... a line",
            kind="phrases",
            accepts="str | Sequence[str | tuple[Any, ...] | Mapping[str, Any]] | None",
            more="In Python a list of phrases, tuples (phrase, weight, variants), or mappings with text, weight and "
            "variants. Each token that begins or continues a phrase gets a bonus, which is taken back when the "
            "phrase is left unfinished. Variants are other spellings, which are written as they are decoded. "
            "Log-probabilities, and what thresholds say of them, are those without the bonuses.",
        ),
    )
    bias_weight: float = field(
        default=BIAS_WEIGHT,
        metadata=_option(
            "bonus of each token of a phrase in bias that has no weight of its own",
            more="Added to the logit.",
        ),
    )
    lm: Callable[[Any], Any] | str | None = field(
        default=None,
        hash=False,  # it may hold arrays
        metadata=_option(
            "a language model to prefer text by: an ARPA file (also .gz) of n-grams over words or tokens",
            kind="lm",
            accepts="Callable[[Any], Any] | str | os.PathLike[str] | None",
            more="In Python also any function that JAX can trace, or a callable pytree of arrays: from the window's "
            "text tokens [R,64], the latest one last and -1 before the first, to logits [R,V] of the next ones. Text "
            "tokens get lm_weight times their log-probability as a bonus, as with bias; timestamps and the end of text "
            "get what text gets on average. A program is compiled for each function, and for the structure and shapes "
            "of a pytree, of which others may follow.",
        ),
    )
    lm_weight: float = field(
        default=0.1, metadata=_option("weight of the language model's log-probabilities; 0: no effect")
    )
    n_best: int = field(
        default=1,
        metadata=_of_attempts(
            "candidates that become the result's `alternatives`, best first; needs as many beams or samples"
        ),
    )
    tinydiarize: bool = field(
        default=False,
        metadata=_option(
            "mark speaker changes (needs a tinydiarize checkpoint)",
            group="task",
            after="diarize",
            evaluate=False,
            more="By its token startoflm, as in whisper.cpp.",
        ),
    )

    grammar: str | None = field(
        default=None,
        metadata=_grammar(
            "what the text of each window must match, in GBNF as whisper.cpp reads it: a file or text",
            kind="grammar",
            accepts="str | os.PathLike[str] | None",
            more="Text, or the path of a file as a `Path`. Rules that contain themselves, other than at one end, need "
            "llguidance.",
        ),
    )
    grammar_rule: str = field(default="root", metadata=_grammar("the rule of --grammar that a text must match"))
    grammar_penalty: float | None = field(
        default=None,
        metadata=_grammar(
            "make text outside the grammar improbable by so much, not impossible (whisper.cpp: 100)",
            more="Subtracted from the logits of text tokens; the end of text and timestamps are free, and after a "
            "token that does not match, the grammar no longer counts.",
        ),
    )
    choices: tuple[str, ...] | None = field(
        default=None,
        metadata=_grammar(
            "the only texts that a window may have: yes,no", kind="texts or none", accepts="Sequence[str] | None"
        ),
    )
    regex: str | None = field(
        default=None, metadata=_grammar("a regular expression that the text of each window must match as a whole")
    )
    json_schema: str | None = field(
        default=None,
        metadata=_grammar(
            "a JSON schema that the text of each window must match (needs outlines-core)",
            accepts="str | Mapping[str, Any] | None",
        ),
    )

    def __post_init__(self):
        self._normalize_grammar()
        for name in ("prompt", "prefix", "suppress_tokens"):
            value = getattr(self, name)
            if isinstance(value, Iterable) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(int(i) for i in value))
        object.__setattr__(self, "bias", parse_phrases(self.bias))
        if isinstance(self.lm, os.PathLike):
            object.__setattr__(self, "lm", os.fspath(self.lm))
        object.__setattr__(self, "suppress_tokens", _parse_ids(self.suppress_tokens))
        object.__setattr__(self, "language", language_or_none(self.language))
        for name, least in _WHOLE.items():
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least, name in _OR_NONE))
        self._validate()
        self._validate_strategy()
        self._validate_grammar()

    def _validate(self):
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} is not one of {', '.join(TASKS)}")
        if self.fp16 not in (None, True, False):
            raise ValueError(f"fp16={self.fp16!r} must be True, False or None")
        if self.length_penalty is not None and not 0 <= self.length_penalty <= 1:
            raise ValueError(f"length_penalty={self.length_penalty} must be between 0 and 1, or None")
        if self.max_initial_timestamp is not None and not self.max_initial_timestamp >= 0:
            raise ValueError(f"max_initial_timestamp={self.max_initial_timestamp} must be 0 s or more, or None")
        if self.sample_len is not None and self.max_new_tokens is not None:
            raise ValueError(
                f"sample_len={self.sample_len} and max_new_tokens={self.max_new_tokens} limit the same thing; drop one"
            )
        if not (self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)):
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be above 0 and finite; 1 disables it")
        if not (self.bias_weight > 0 and math.isfinite(self.bias_weight)):
            raise ValueError(
                f"bias_weight={self.bias_weight} must be above 0 and finite; without bias it has no effect"
            )
        if isinstance(self.lm, str) and not os.path.isfile(self.lm):
            raise ValueError(f"lm={self.lm!r} is not a file; give an ARPA file of n-grams")
        if not (self.lm is None or isinstance(self.lm, str) or callable(self.lm)):
            raise ValueError(f"lm={self.lm!r} must be an ARPA file, or a function in JAX: tokens [R,N] -> logits [R,V]")
        if not (self.lm_weight >= 0 and math.isfinite(self.lm_weight)):
            raise ValueError(f"lm_weight={self.lm_weight} must be 0 or more and finite")
        try:
            re.compile(self.suppress_regex or "")
        except (re.error, TypeError) as error:
            raise ValueError(
                f"suppress_regex={self.suppress_regex!r} is not a valid regular expression: {error}"
            ) from None

    def _validate_strategy(self):
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature={self.temperature} must be 0 or more and finite")
        if self.beam_size is not None and self.best_of is not None:
            raise ValueError(f"beam_size={self.beam_size} and best_of={self.best_of} exclude each other; drop one")
        if self.beam_size is not None and self.temperature > 0:
            raise ValueError(
                f"beam_size={self.beam_size} needs temperature 0, got {self.temperature}; drop one of them"
            )
        if self.best_of is not None and self.temperature == 0:
            raise ValueError(f"best_of={self.best_of} needs a temperature above 0: at 0 all samples are the same")
        if self.patience is not None and self.beam_size is None:
            raise ValueError(f"patience={self.patience} belongs to beam search; give beam_size too")
        if self.patience is not None and not (self.patience > 0 and math.isfinite(self.patience)):
            raise ValueError(f"patience={self.patience} must be above 0 and finite")
        if self.beam_size is not None and self.max_candidates < 1:
            raise ValueError(f"patience={self.patience} with beam_size={self.beam_size} keeps no candidate; raise it")
        if self.n_best > (self.beam_size or self.best_of or 1):
            raise ValueError(
                f"n_best={self.n_best} needs beam_size or best_of of at least {self.n_best}, "
                f"got {self.beam_size} and {self.best_of}"
            )

    def _normalize_grammar(self):
        if isinstance(self.grammar, os.PathLike):
            object.__setattr__(self, "grammar", read_grammar(self.grammar))
        if isinstance(self.json_schema, Mapping):
            object.__setattr__(self, "json_schema", json.dumps(self.json_schema))
        if isinstance(self.choices, str):
            raise ValueError(f"choices={self.choices!r} must be several texts; give a list")
        if self.choices is not None:
            object.__setattr__(self, "choices", tuple(self.choices))

    def _validate_grammar(self):
        given = [name for name in _GRAMMARS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} both state what a text must match; drop one")
        if not given:
            if self.grammar_penalty is not None or self.grammar_rule != "root":
                name = "grammar_rule" if self.grammar_penalty is None else "grammar_penalty"
                raise ValueError(f"{name}={getattr(self, name)!r} needs a grammar; give one, or drop it")
            return
        if self.grammar_penalty is not None and not (self.grammar_penalty > 0 and math.isfinite(self.grammar_penalty)):
            raise ValueError(f"grammar_penalty={self.grammar_penalty} must be above 0 and finite, or None to forbid")
        if self.grammar_rule != "root" and self.grammar is None:
            raise ValueError(f"grammar_rule={self.grammar_rule!r} is of a grammar, not of {given[0]}; drop it")
        if self.grammar_penalty is None:
            for name, harm in (
                ("no_repeat_ngram_size", f"may leave {given[0]} no next token"),
                ("max_repeats", f"may end a text of {given[0]} too early"),
            ):
                if getattr(self, name):
                    raise ValueError(f"{name}={getattr(self, name)} {harm}; drop it, or set grammar_penalty")
            if self.patience is not None and self.patience < 1:
                raise ValueError(
                    f"patience={self.patience} may keep a beam that is not yet a whole text of {given[0]}; "
                    "give 1 or more"
                )
        if self.choices is not None and not (
            self.choices and all(isinstance(x, str) and x.strip() for x in self.choices)
        ):
            raise ValueError(f"choices={self.choices!r} must be texts, at least one, and none of them empty")
        automaton_of(self.constraint)

    @property
    def constraint(self) -> Grammar | None:
        """The grammar that the text must match."""
        name = next((name for name in _GRAMMARS if getattr(self, name) is not None), None)
        return None if name is None else Grammar(name, getattr(self, name), self.grammar_rule)

    @property
    def max_candidates(self) -> int:
        """How many finished sequences end a beam search."""
        return round((self.beam_size or 1) * (1.0 if self.patience is None else self.patience))


def whole_number(name: str, value: Any, least: int, or_none: bool = False) -> int | None:
    """Returns value as an int, or None if allowed. Raises ValueError unless it is a whole number >= least."""
    if value is None and or_none:
        return None
    try:
        if not isinstance(value, bool | str) and value == int(value) >= least:
            return int(value)
    except (TypeError, ValueError, OverflowError):  # from int(), if it is not a finite number
        pass
    raise ValueError(f"{name}={value!r} must be a whole number of at least {least}{', or None' if or_none else ''}")


def _parse_ids(ids: str | tuple[int, ...] | None) -> tuple[int, ...]:
    if not isinstance(ids, str):
        return ids or ()
    try:
        return tuple(int(part) for part in ids.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"suppress_tokens={ids!r} must be comma-separated ids, such as '-1' or '220,50257'") from None
