"""`warmup`: all that `transcribe` will run, compiled before the first recording comes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

import jax.numpy as jnp
import numpy as np

from whisper_nnx.audio.features import POSITIONS_PER_SECOND
from whisper_nnx.audio.loading import SAMPLE_RATE
from whisper_nnx.model.sharding import mesh_of
from whisper_nnx.runtime.devices import rounded_up
from whisper_nnx.runtime.options import options_of
from whisper_nnx.timing.alignment_heads import alignment_heads
from whisper_nnx.timing.token_times import BUCKETS, align_tokens, bucket, text_ids
from whisper_nnx.timing.word_times import Layout, word_heads, word_times
from whisper_nnx.transcription.attempts import Attempt, strategy_of
from whisper_nnx.transcription.drafts import draft_of, with_draft
from whisper_nnx.transcription.grammars import least_tokens
from whisper_nnx.transcription.language_models import with_lm
from whisper_nnx.transcription.longform import LongformOptions
from whisper_nnx.transcription.options import TranscribeOptions
from whisper_nnx.transcription.row_decoder import Groups, compile_sizes
from whisper_nnx.transcription.stream import transcribe
from whisper_nnx.transcription.windows import encode_windows, tokenizer_of

if TYPE_CHECKING:
    from whisper_nnx.model.whisper import Whisper
    from whisper_nnx.transcription.changes import RecordingChanges

_TOKENS = 4


def warmup(
    model: Whisper,
    batch_sizes: Sequence[int] = (1,),
    options: TranscribeOptions | None = None,
    *,
    draft: Whisper | str | None = None,
    **changes: Unpack[RecordingChanges],
) -> None:
    """Compiles everything that `transcribe(model, ..., batch_size=..., **changes)` runs with these sizes and options.

    For a server, whose first users should not wait. It transcribes noise: a few tokens with each strategy that the
    temperatures may lead to, and word times if requested. With a persistent compilation cache, the next process only
    reads what this one has compiled.

    Args:
      model: a model with a tokenizer.
      batch_sizes: the sizes to compile for.
      options: as in `transcribe`.
      draft: as in `transcribe`.
      changes: as in `transcribe`.

    Raises:
      ValueError: options that `transcribe` refuses.
    """
    model = with_draft(model, draft)
    chosen = with_lm(tokenizer_of(model), TranscribeOptions.of(options, **changes))
    attempts = [chosen.fallback.options_at(t, chosen.window_options) for t in chosen.fallback.temperatures]
    drafted = draft_of(model) is not None  # which decodes at temperature 0 only, with the strategy of others
    tries = {(strategy_of(attempt), drafted and attempt.temperature == 0): attempt for attempt in attempts}
    described = options_of(LongformOptions, TranscribeOptions).values()
    whole: dict[str, Any] = {one.name: one.default for one in described if one.scope == "recording"}
    short = _short_texts(model, chosen)
    samples = model.config.max_source_positions * SAMPLE_RATE // POSITIONS_PER_SECOND  # of one window
    noise = np.random.default_rng(0).normal(0, 0.1, samples).astype(np.float32)
    batch_sizes = sorted({rounded_up(size, mesh_of(model)) for size in batch_sizes})
    for size in batch_sizes:
        for attempt in tries.values():
            own: dict[str, Any] = {"temperature": attempt.temperature, "n_best": attempt.n_best, "batch_size": size}
            for number in {min(size, max(2, group)) for group in (size, *Groups.of(model, size).sizes)}:
                for result in transcribe(model, [noise] * number, chosen, **whole, **short, **own):
                    if isinstance(result, Exception):
                        raise result
        if chosen.longform.timed:
            for group in Groups.of(model, size).sizes:
                _time_texts(model, group, chosen.longform)
    decoding = {name: value for name, value in short.items() if hasattr(chosen.decoding, name)}
    decoding["language"] = chosen.decoding.language or "en"
    alone = [Attempt.of(model.config, tokenizer_of(model), replace(one, **decoding)) for one in tries.values()]
    silence = jnp.zeros((1, model.config.num_mel_bins, 2 * model.config.max_source_positions))
    compile_sizes(model, encode_windows(model, silence), alone, batch_sizes)


def _short_texts(model: Whisper, chosen: TranscribeOptions) -> dict[str, Any]:
    """Options with which a window becomes a short text."""
    tokenizer, without_prefix = tokenizer_of(model), replace(chosen.decoding, prefix=None)
    special = tokenizer.special
    return {
        "no_speech_threshold": None,
        "logprob_threshold": None,
        "compression_ratio_threshold": None,
        "without_timestamps": True,
        "sample_len": max(_TOKENS, least_tokens(tokenizer, model.config.vocab_size, without_prefix)),
        "max_new_tokens": None,
        "max_repeats": chosen.window_options.max_repeats,
        "prefix": None,
        # Text alone, so that there are words to time.
        "suppress_tokens": (-1, special.eot, *range(special.timestamp_begin, special.timestamp_end + 1)),
    }


def _time_texts(model: Whisper, size: int, options: LongformOptions) -> None:
    """Times texts of all lengths that programs are compiled for."""
    config, tokenizer = model.config, tokenizer_of(model)
    eot, start = tokenizer.special.eot, (tokenizer.special.sot,)
    silence = jnp.zeros((size, config.num_mel_bins, 2 * config.max_source_positions))
    cross, positions = encode_windows(model, silence).cross, config.max_source_positions
    lengths = {bucket(n, config.max_target_positions) for n in (*BUCKETS, config.max_target_positions)}
    refined, chosen = options.refine_word_times, options.alignment_heads
    for length in sorted(lengths):
        text = tokenizer.encode("a") * (length - len(start) - 1)
        heads, is_text = alignment_heads(config, None if refined else chosen), text_ids(tokenizer)
        texts: dict[str, Any] = {"starts": [start] * size, "texts": [text] * size, "positions": [positions] * size}
        align_tokens(model.decoder, cross, config, **texts, eot=eot, heads=heads, is_text=is_text)
        if refined:
            rows, within = np.full(2 * length, -1, np.int32), np.zeros((2 * length, 2), np.float32)
            layouts = [Layout([*start, *text, eot], rows, within, [])] * size
            pauses = [np.zeros(positions, np.float32)] * size
            words: dict[str, Any] = {"layouts": layouts, "pauses": pauses, "heads": word_heads(config, chosen)}
            word_times(model.decoder, cross, config, eot=eot, **words)
