"""Decodes 30 s windows: mel in, text out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack, cast

import jax
import jax.numpy as jnp
import numpy as np

from whisper_nnx import ops
from whisper_nnx.audio.features import fingerprint
from whisper_nnx.decoding.language import language_probs
from whisper_nnx.decoding.loop import Generated, generate
from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.decoding.speculative import GREEDY, generate_speculative
from whisper_nnx.model.cache import KeysValues, padded_audio, to_cache
from whisper_nnx.model.sharding import mesh_of
from whisper_nnx.model.whisper import AudioEncoder, TextDecoder, Whisper, warn_of_precision
from whisper_nnx.runtime.devices import fetch, put_rows, rounded_up
from whisper_nnx.runtime.flat import Flat
from whisper_nnx.runtime.forking import refuse_after_fork
from whisper_nnx.runtime.programs import exportable, program
from whisper_nnx.text.languages import to_language_code
from whisper_nnx.text.tokenizer import Tokenizer
from whisper_nnx.transcription.attempts import Attempt, DecodingResult, best_of, check_window, loop_inputs, row_seed
from whisper_nnx.transcription.drafts import DraftModel, draft_of
from whisper_nnx.transcription.language_models import window_with_lm

if TYPE_CHECKING:
    from whisper_nnx.transcription.changes import DecodingChanges


@exportable
class EncodedWindows(NamedTuple):
    """Encoder output [B,T,D] of B windows, and each decoder layer's cross-attention keys and values.

    Decoding and alignment both use this, so that a window is encoded once. draft: as `cross`, of a draft model.
    """

    features: jax.Array
    cross: tuple[KeysValues, ...]
    draft: tuple[KeysValues, ...] = ()

    @property
    def windows(self) -> int:
        """B, also where the encoder output was discarded."""
        return self.cross[0].k.shape[0]


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
    options = window_with_lm(
        tokenizer_of(model), replace(options or DecodingOptions(), **cast(dict[str, Any], changes))
    )
    if options.task != "lang_id":
        check_window(tokenizer_of(model), model.config, options)
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


class FlatWhisper:
    """A model as a batch uses it: a snapshot, whose programs are called in a fraction of the time (see `Flat`)."""

    def __init__(self, model: Whisper):
        self.config, self.tokenizer = model.config, tokenizer_of(model)
        self.encoder, self.decoder = Flat(model.encoder), Flat(model.decoder)
        draft = draft_of(model)
        self.draft = draft.flat if isinstance(draft, DraftModel) else draft


def tokenizer_of(model: Whisper) -> Tokenizer:
    """The tokenizer. Raises TypeError unless model is a Whisper, ValueError without one, RuntimeError after a fork."""
    refuse_after_fork()
    if not hasattr(model, "tokenizer"):
        raise TypeError(f"model is of type {type(model).__name__}, not a Whisper; load it with load_model")
    if model.tokenizer is None:
        raise ValueError("this model has no tokenizer; give tokenizer=FOLDER when it is loaded, or set model.tokenizer")
    return model.tokenizer


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
    cross = decoder.cross_attention(padded_audio(features))
    return EncodedWindows(features, to_cache(cross, decoder.kv_cache_dtype, features.shape[1]))


def _filled_up(model: Whisper, windows: jax.Array) -> jax.Array:
    """Repeats the last window until a mesh can divide them evenly."""
    idle = rounded_up(len(windows), mesh_of(model)) - len(windows)
    return jnp.concatenate([windows, *[windows[-1:]] * idle]) if idle else windows


def encode_windows(model: Whisper, windows: jax.Array) -> EncodedWindows:
    """Encodes windows: log-mel [B,M,T], or encoder output [B,T,D], to which only keys and values are added."""
    config, mesh, draft = model.config, mesh_of(model), draft_of(model)
    if mesh is not None:
        windows = put_rows(windows, mesh)
    if windows.shape[-2:] == (config.max_source_positions, config.d_model):
        return _with_cross_attention(model.decoder, windows.astype(model.decoder.dtype))
    encoded = _encode(model.encoder, model.decoder, windows)
    if not isinstance(draft, DraftModel):
        return encoded
    if draft.encoder is not None:
        return encoded._replace(draft=_encode(draft.encoder, draft.decoder, windows).cross)
    features = encoded.features.astype(draft.decoder.dtype)
    return encoded._replace(draft=_with_cross_attention(draft.decoder, features).cross)


def detect_languages(model: Whisper, encoded: EncodedWindows) -> list[dict[str, float]]:
    """{code: probability} of the languages, for each window. Raises ValueError for an English-only model."""
    return named_probs(model, fetch(start_detection(model, encoded)))


def start_detection(model: Whisper, encoded: EncodedWindows) -> jax.Array:
    """Probabilities of the languages [B, languages], on the device, for `named_probs`. Raises as `detect_languages`."""
    tokenizer = tokenizer_of(model)
    if not tokenizer.is_multilingual or not tokenizer.special.languages:
        raise ValueError("this model is English-only and cannot detect languages; use a multilingual checkpoint")
    return language_probs(model.decoder, encoded.cross, tokenizer.special)


def named_probs(model: Whisper, probs: np.ndarray) -> list[dict[str, float]]:
    """{code: probability} for each row of probabilities."""
    codes = [code for code, _ in tokenizer_of(model).special.languages]
    return [dict(zip(codes, map(float, row), strict=True)) for row in probs]


def most_probable(probs: dict[str, float]) -> str:
    """The code with the highest probability."""
    return max(probs, key=lambda code: probs[code])


def decode_windows(
    model: Whisper, encoded: EncodedWindows, options: Sequence[DecodingOptions | None], seeds: Sequence[int]
) -> list[DecodingResult | None]:
    """Decodes encoded windows, each with its own options and seed; a row without options is idle.

    Rows that need different programs (beams, samples, other suppressed tokens) are decoded one program after the other
    while the rest is idle, so that only the number of rows decides what is compiled.
    """
    tokenizer = tokenizer_of(model)
    known, probs = _with_languages(model, encoded, options)
    results: list[DecodingResult | None] = [None] * len(options)
    attempts: list[Attempt | None] = [None] * len(options)
    together: dict[Any, list[int]] = defaultdict(list)
    for row, o in enumerate(known):
        if o is not None:
            results[row] = DecodingResult(encoded.features[row], o.language or "en", probs.get(row))
            if o.task != "lang_id":
                attempts[row] = one = Attempt.of(model.config, tokenizer, o, seeds[row])
                together[one.program].append(row)
    for rows in together.values():
        own = [one if row in rows else None for row, one in enumerate(attempts)]
        for row, found in results_of(model, own, fetch(generate_windows(model, encoded, own))).items():
            results[row] = replace(found, audio_features=encoded.features[row], language_probs=probs.get(row))
    return results


def generate_windows(model: Whisper, encoded: EncodedWindows, attempts: Sequence[Attempt | None]) -> Generated:
    """Decodes windows with one program, on the device; idle rows have no attempt."""
    special, draft = tokenizer_of(model).special, draft_of(model)
    batch = loop_inputs(model.config, tokenizer_of(model), attempts)
    if all(one is None or takes_draft(model, one) for one in attempts):
        decoder = draft.decoder if isinstance(draft, DraftModel) else None
        return generate_speculative(model.decoder, encoded.cross, batch, decoder, encoded.draft, special)
    strategy, *_ = next(one for one in attempts if one).program
    return generate(model.decoder, encoded.cross, batch, strategy, special)


def takes_draft(model: Whisper, attempt: Attempt) -> bool:
    """Whether an attempt is decoded with the model's draft: it has one, and the attempt is greedy."""
    strategy, *_ = attempt.program
    return draft_of(model) is not None and strategy == GREEDY and attempt.options.temperature == 0


def results_of(model: Whisper, attempts: Sequence[Attempt | None], generated: Generated) -> dict[int, DecodingResult]:
    """Results of the rows that have an attempt, without audio_features, from what `fetch` returned."""
    tokenizer, results = tokenizer_of(model), dict[int, DecodingResult]()
    for row, one in enumerate(attempts):
        if one is not None:
            best = best_of(tokenizer, one.options, jax.tree.map(lambda x, row=row: x[row], generated.candidates))
            about: dict[str, Any] = {"no_speech_prob": float(generated.no_speech_prob[row]), **best}
            results[row] = DecodingResult(NO_FEATURES, one.options.language or "en", **about)
    return results


NO_FEATURES: Any = np.zeros((0, 0), np.float32)


def _with_languages(
    model: Whisper, encoded: EncodedWindows, options: Sequence[DecodingOptions | None]
) -> tuple[list[DecodingOptions | None], dict[int, dict[str, float]]]:
    """Options in which every language is known, and the probabilities of rows whose language was detected."""
    tokenizer = tokenizer_of(model)
    options = [replace(o, language=to_language_code(o.language)) if o and o.language else o for o in options]
    for o in options:
        if o:
            _require_languages(tokenizer, o)
    unknown = [r for r, o in enumerate(options) if o and (o.language is None or o.task == "lang_id")]
    if not tokenizer.is_multilingual or not unknown:
        return [o and replace(o, language=o.language or "en") for o in options], {}
    detected = detect_languages(model, encoded)
    probs = {row: detected[row] for row in unknown}
    return [
        o and (replace(o, language=most_probable(probs[r])) if r in probs else o) for r, o in enumerate(options)
    ], probs


def _require_languages(tokenizer: Tokenizer, o: DecodingOptions) -> None:
    if not tokenizer.is_multilingual and (o.task != "transcribe" or o.language not in (None, "en")):
        raise ValueError(
            f"this model is English-only: it cannot do task={o.task!r}, language={o.language!r}; "
            "use a multilingual checkpoint"
        )
