"""Decodes 30 s windows: mel in, text out."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack, cast

import jax
import jax.numpy as jnp
import numpy as np

from whisper_nnx import ops
from whisper_nnx.audio.features import fingerprint
from whisper_nnx.decoding.language import language_probs
from whisper_nnx.decoding.loop import DecodingBatch, generate, padded_positions
from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.decoding.strategies import Beam, Candidates, Sampling, Strategy
from whisper_nnx.model.cache import KeysValues, to_cache
from whisper_nnx.model.config import WhisperConfig
from whisper_nnx.model.sharding import mesh_of
from whisper_nnx.model.whisper import AudioEncoder, TextDecoder, Whisper, warn_of_precision
from whisper_nnx.runtime.devices import fetch, put_rows, rounded_up
from whisper_nnx.runtime.forking import refuse_after_fork
from whisper_nnx.runtime.programs import exportable, program
from whisper_nnx.text.languages import to_language_code
from whisper_nnx.text.tokenizer import Tokenizer
from whisper_nnx.transcription.suppression import check_choice, require_timestamps, rules_of

if TYPE_CHECKING:
    from whisper_nnx.transcription.changes import DecodingChanges


@exportable
class EncodedWindows(NamedTuple):
    """Encoder output [B,T,D] of B windows, and each decoder layer's cross-attention keys and values.

    Decoding and alignment both use this, so that a window is encoded once.
    """

    features: jax.Array
    cross: tuple[KeysValues, ...]


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


def decode(
    model: Whisper,
    mel: Any,
    options: DecodingOptions | None = None,
    *,
    seed: int = 0,
    **changes: Unpack[DecodingChanges],
) -> DecodingResult | list[DecodingResult]:
    """Decodes windows.

    Samples depend on `seed`, the row's number and its audio, not on the other rows.

    Args:
      model: a model with a tokenizer.
      mel: log-mel [M,T] or [B,M,T], or encoder output [T,D] or [B,T,D].
      options: how to decode; default: greedy, with timestamps, in the detected language.
      seed: for sampling at temperatures above 0.
      changes: fields of `DecodingOptions`, which replace those of `options`.

    Returns:
      One result for [M,T] or [T,D], a list of B results otherwise.

    Raises:
      ValueError: options or shapes that the model does not support.
    """
    refuse_after_fork()
    options = replace(options or DecodingOptions(), **cast(dict[str, Any], changes))
    if options.task != "lang_id":
        check_choice(tokenizer_of(model), model.config.vocab_size, options)
    warn_of_precision(model, options.fp16)
    mel = jnp.asarray(mel)
    windows = mel if mel.ndim == 3 else mel[None]
    if windows.ndim != 3 or not windows.shape[0]:
        raise ValueError(f"mel has shape {mel.shape}, expected [M,T], or [B,M,T] with at least one window")
    fingerprints = map(fingerprint, np.asarray(windows)) if options.temperature > 0 else [0] * len(windows)
    seeds = [row_seed(seed, row, number) for row, number in enumerate(fingerprints)]
    encoded = encode_windows(model, _filled_up(model, windows))
    idle = len(encoded.features) - len(seeds)
    decoded = decode_windows(model, encoded, [*[options] * len(seeds), *[None] * idle], [*seeds, *[0] * idle])
    results = [result for result in decoded if result is not None]
    return results if mel.ndim == 3 else results[0]


def detect_language(model: Whisper, mel: Any) -> tuple[Any, Any]:
    """Detects the language of windows.

    Args:
      model: a multilingual model with a tokenizer.
      mel: log-mel [M,T] or [B,M,T], or encoder output.

    Returns:
      The id of the most probable language token and {code: probability}; for a batch, a list of each.

    Raises:
      ValueError: an English-only model.
    """
    refuse_after_fork()
    mel = jnp.asarray(mel)
    special = tokenizer_of(model).special
    windows = mel if mel.ndim == 3 else mel[None]
    probs = detect_languages(model, encode_windows(model, _filled_up(model, windows)))[: len(windows)]
    ids = dict(special.languages)
    tokens = [ids[most_probable(row)] for row in probs]
    return (tokens, probs) if mel.ndim == 3 else (tokens[0], probs[0])


def tokenizer_of(model: Whisper) -> Tokenizer:
    """The tokenizer. Raises TypeError unless model is a Whisper, ValueError without one, RuntimeError after a fork."""
    refuse_after_fork()
    if not hasattr(model, "tokenizer"):
        raise TypeError(f"model is of type {type(model).__name__}, not a Whisper; load it with load_model")
    if model.tokenizer is None:
        raise ValueError("this model has no tokenizer; give tokenizer=FOLDER when it is loaded, or set model.tokenizer")
    return model.tokenizer


def row_seed(*numbers: int) -> int:
    """Hashes several numbers to a seed. Raises ValueError for a negative one."""
    if min(numbers) < 0:
        raise ValueError(f"seed={min(numbers)} must be 0 or more")
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@program(rows=("mel",))
def _encode(encoder: AudioEncoder, decoder: TextDecoder, mel: jax.Array) -> EncodedWindows:
    def encode(mel: jax.Array) -> EncodedWindows:
        return _with_cross_attention(decoder, encoder(mel))

    if len(mel) > 1 and ops.current().window_by_window:
        return jax.tree.map(lambda x: x[:, 0], jax.lax.map(lambda window: encode(window[None]), mel))
    return encode(mel)


@program(rows=("features",))
def _with_cross_attention(decoder: TextDecoder, features: jax.Array) -> EncodedWindows:
    """Adds cross-attention keys and values, in the dtype in which the token loop reads them."""
    return EncodedWindows(features, to_cache(decoder.cross_attention(features), decoder.kv_cache_dtype))


def _filled_up(model: Whisper, windows: jax.Array) -> jax.Array:
    """Repeats the last window until a mesh can divide them evenly."""
    idle = rounded_up(len(windows), mesh_of(model)) - len(windows)
    return jnp.concatenate([windows, *[windows[-1:]] * idle]) if idle else windows


def encode_windows(model: Whisper, windows: jax.Array) -> EncodedWindows:
    """Encodes windows: log-mel [B,M,T], or encoder output [B,T,D], to which only keys and values are added."""
    config, mesh = model.config, mesh_of(model)
    if mesh is not None:
        windows = put_rows(windows, mesh)
    if windows.shape[-2:] == (config.max_source_positions, config.d_model):
        return _with_cross_attention(model.decoder, windows.astype(model.decoder.dtype))
    return _encode(model.encoder, model.decoder, windows)


def detect_languages(model: Whisper, encoded: EncodedWindows) -> list[dict[str, float]]:
    """{code: probability} of the languages, for each window. Raises ValueError for an English-only model."""
    tokenizer = tokenizer_of(model)
    if not tokenizer.is_multilingual or not tokenizer.special.languages:
        raise ValueError("this model is English-only and cannot detect languages; use a multilingual checkpoint")
    probs = fetch(language_probs(model.decoder, encoded.cross, tokenizer.special))
    codes = [code for code, _ in tokenizer.special.languages]
    return [dict(zip(codes, map(float, row), strict=True)) for row in probs]


def most_probable(probs: dict[str, float]) -> str:
    """The code with the highest probability."""
    return max(probs, key=lambda code: probs[code])


def decode_windows(
    model: Whisper,
    encoded: EncodedWindows,
    options: Sequence[DecodingOptions | None],
    seeds: Sequence[int],
    *,
    meanwhile: Callable[[], None] | None = None,
) -> list[DecodingResult | None]:
    """Decodes encoded windows, each with its own options and seed; a row without options is idle.

    Rows that need different programs (beams, samples, other suppressed tokens) are decoded one program after the other
    while the rest is idle, so that only the number of rows decides what is compiled. `meanwhile` is called once, while
    the device decodes.
    """
    tokenizer = tokenizer_of(model)
    options, probs = _with_languages(model, encoded, options)
    together: dict[Any, list[int]] = defaultdict(list)
    results: list[DecodingResult | None] = [None] * len(options)
    for row, o in enumerate(options):
        if o is not None:
            results[row] = DecodingResult(encoded.features[row], o.language or "en", probs.get(row))
            if o.task != "lang_id":
                together[strategy_of(o), *_suppression(o)].append(row)
    for (strategy, *_), rows in together.items():
        batch = _batch(model.config, tokenizer, [o if r in rows else None for r, o in enumerate(options)], seeds)
        generated = generate(model.decoder, encoded.cross, batch, strategy, tokenizer.special)
        if meanwhile is not None:
            meanwhile()
            meanwhile = None
        candidates, no_speech = fetch(tuple(generated))
        for row in rows:
            known, o = results[row], options[row]
            assert known is not None
            assert o is not None
            chosen = _best(tokenizer, o, jax.tree.map(lambda x, row=row: x[row], candidates))
            results[row] = replace(known, no_speech_prob=float(no_speech[row]), **chosen)
    if meanwhile is not None:  # nothing was to be decoded
        meanwhile()
    return results


def _with_languages(
    model: Whisper, encoded: EncodedWindows, options: Sequence[DecodingOptions | None]
) -> tuple[list[DecodingOptions | None], dict[int, dict[str, float]]]:
    """Options in which every language is known, and the probabilities of rows whose language was detected."""
    tokenizer = tokenizer_of(model)
    options = [replace(o, language=to_language_code(o.language)) if o and o.language else o for o in options]
    for o in options:
        if o and not tokenizer.is_multilingual and (o.task != "transcribe" or o.language not in (None, "en")):
            raise ValueError(
                f"this model is English-only: it cannot do task={o.task!r}, language={o.language!r}; "
                "use a multilingual checkpoint"
            )
    unknown = [r for r, o in enumerate(options) if o and (o.language is None or o.task == "lang_id")]
    if not tokenizer.is_multilingual or not unknown:
        return [o and replace(o, language=o.language or "en") for o in options], {}
    detected = detect_languages(model, encoded)
    probs = {row: detected[row] for row in unknown}
    return [
        o and (replace(o, language=most_probable(probs[r])) if r in probs else o) for r, o in enumerate(options)
    ], probs


def strategy_of(options: DecodingOptions) -> Strategy:
    """The decoding strategy of these options."""
    if options.beam_size is not None:
        return Beam(options.beam_size, options.max_candidates)
    return Sampling(options.best_of or 1)


def _suppression(options: DecodingOptions) -> tuple[Any, ...]:
    """The options that decide which tokens are suppressed."""
    return options.suppress_tokens, options.suppress_blank, options.suppress_regex, options.tinydiarize


def _batch(
    config: WhisperConfig, tokenizer: Tokenizer, options: Sequence[DecodingOptions | None], seeds: Sequence[int]
) -> DecodingBatch:
    """Inputs of one program. Idle rows (options None) have a limit of 0 tokens."""
    special, n_ctx = tokenizer.special, config.max_target_positions
    first = next(o for o in options if o is not None)
    initial = [initial_ids(o, tokenizer, n_ctx) if o else InitialIds([special.sot], 0, []) for o in options]
    padded = np.full((len(options), padded_positions(n_ctx)), special.eot, np.int32)
    for row, (ids, _, _) in zip(padded, initial, strict=True):
        row[: len(ids)] = ids

    def limit(o: DecodingOptions | None, ids: Sequence[int]) -> int:
        if o is None:
            return 0
        most = o.max_new_tokens or o.sample_len or n_ctx // 2
        return min(most, n_ctx - len(ids) + 1)  # the last one sampled is not fed

    return DecodingBatch(
        initial_ids=padded,
        initial_length=np.array([len(i.ids) for i in initial], np.int32),
        sot_index=np.array([i.sot_index for i in initial], np.int32),
        limit=np.array([limit(o, i.ids) for o, i in zip(options, initial, strict=True)], np.int32),
        temperature=np.array([(o or first).temperature for o in options], np.float32),
        seed=np.array(seeds, np.uint32),
        rules=rules_of(tokenizer, config, options, [i.prefix for i in initial]),
    )


class InitialIds(NamedTuple):
    """The ids before the first sampled one; the index of the start sequence; the prefix, part of the transcript."""

    ids: list[int]
    sot_index: int
    prefix: list[int]


def initial_ids(options: DecodingOptions, tokenizer: Tokenizer, n_ctx: int) -> InitialIds:
    """The ids that precede the sampled tokens of a window.

    Previous text takes up to half the context, less what the prefix needs beyond its half; both lose their beginning.
    If sample_len is given, the prefix leaves room for that many tokens within half the context.
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
    room = min(half - 1, n_ctx - 2 - len(start) - len(prefix))
    prompt = _ids(options.prompt, tokenizer)[-room:] if room > 0 else []
    previous = [special.sot_prev, *prompt] if prompt else []
    return InitialIds([*previous, *start, *prefix], len(previous), prefix)


def _ids(text: str | tuple[int, ...] | None, tokenizer: Tokenizer) -> list[int]:
    if isinstance(text, str):
        return tokenizer.encode(" " + text.strip()) if text.strip() else []
    for token in text or ():
        if not 0 <= token < tokenizer.vocab_size:
            raise ValueError(f"token {token} in a prompt or prefix is outside the vocabulary of {tokenizer.vocab_size}")
    return list(text or ())


def _best(tokenizer: Tokenizer, options: DecodingOptions, candidates: Candidates) -> dict[str, Any]:
    """The best of one window's candidates [K,...], as fields of its DecodingResult."""
    lengths, totals = candidates.length.tolist(), candidates.total.tolist()

    def score(k: int) -> float:
        alpha, n = options.length_penalty, lengths[k]
        # max: the reference divides by zero for an empty sequence
        return totals[k] / (max(n, 1) if alpha is None else ((5 + n) / 6) ** alpha)

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
