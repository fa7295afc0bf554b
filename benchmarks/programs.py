"""What accelerators run, by name, with abstract arguments: the one place that names the project's jitted functions.

Args of every function here: a model whose weights may be abstract, and B, the number of windows. Each returns a jitted
function and its arguments, static ones by name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from whisper_nnx import ops
from whisper_nnx.decoding.loop import (
    PREFILL_CHUNK,
    DecodingBatch,
    advance,
    begin,
    generate,
    idle_rows,
    move_up,
    padded_positions,
)
from whisper_nnx.decoding.rules import SuppressRule, TimestampRule
from whisper_nnx.decoding.strategies import Beam, Sampling, Strategy
from whisper_nnx.model.cache import KeysValues, KVCache
from whisper_nnx.model.whisper import TextDecoder, Whisper
from whisper_nnx.text.special_tokens import SpecialTokens
from whisper_nnx.timing import token_times as timing
from whisper_nnx.timing.alignment_heads import alignment_heads
from whisper_nnx.transcription import windows

BEAMS = 5
GROUP = 16  # windows that begin together
TEXT = 128  # ids of a window that is aligned

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]  # a jitted function, its arguments, and its static ones
_ints = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)


def encode(model: Whisper, batch: int) -> Call:
    """Mel to encoder output and the audio keys and values of all layers."""
    config = model.config
    mel = jax.ShapeDtypeStruct((batch, config.num_mel_bins, 2 * config.max_source_positions), jnp.float32)
    return windows._encode.jitted, (model.encoder, model.decoder, mel), {}


def _cross(model: Whisper, batch: int) -> tuple[KeysValues, ...]:
    function, args, _ = encode(model, batch)
    cross: tuple[KeysValues, ...] = jax.eval_shape(function, *args).cross
    return cross


def align(model: Whisper, batch: int) -> Call:
    """Word times of texts of 128 ids."""
    text = timing.AlignedText(*map(_ints, ((batch, TEXT), (batch,), (batch, TEXT), (batch,), (batch,))))
    is_text = jax.ShapeDtypeStruct((model.config.vocab_size,), jnp.bool_)
    heads = {"heads": alignment_heads(model.config)}
    return timing.token_times.jitted, (model.decoder, _cross(model, batch), text, is_text), heads


def _advance(decoder: TextDecoder, cache: KVCache, ids: jax.Array, rows: jax.Array | None) -> tuple[jax.Array, KVCache]:
    """ids [R,n] -> the most probable next tokens [R]; beams first go on from `rows` [R]."""
    hidden, cache = decoder.step(ids, cache if rows is None else cache.reorder(rows))
    return ops.argmax(decoder.logits(hidden[:, -1])), cache


def _pass(ids: int, beams: int, model: Whisper, batch: int) -> Call:
    size, rows = padded_positions(model.config.max_target_positions), batch * beams
    held = jax.eval_shape(lambda cross: KVCache.init(cross, size).repeat(beams), _cross(model, batch))
    source = _ints((rows,)) if beams > 1 else None
    return jax.jit(_advance, donate_argnums=1), (model.decoder, held, _ints((rows, ids)), source), {}


def special_tokens(vocab_size: int) -> SpecialTokens:
    """The ids of OpenAI's multilingual vocabularies."""
    languages, eot = vocab_size - 51_766, 50_257
    names = ("translate", "transcribe", "sot_lm", "sot_prev", "no_speech", "no_timestamps")
    rest = {name: eot + 2 + languages + i for i, name in enumerate(names)}
    begin = eot + 2 + languages + len(names)
    codes = tuple((str(i), eot + 2 + i) for i in range(languages))
    return SpecialTokens(eot, eot + 1, **rest, timestamp_begin=begin, timestamp_end=begin + 1500, languages=codes)


def _decoding(strategy: Strategy, model: Whisper, batch: int) -> Call:
    """The prompt and the whole token loop, with the rules of the defaults."""
    inputs, static = _inputs(strategy, model, batch)
    return generate.jitted, (model.decoder, _cross(model, batch), inputs), static


def _inputs(strategy: Strategy, model: Whisper, batch: int) -> tuple[DecodingBatch, dict[str, Any]]:
    special, nothing = special_tokens(model.config.vocab_size), np.zeros(model.config.vocab_size, bool)
    limits = {"enabled": [True] * batch, "max_initial": [50] * batch}
    timestamps = TimestampRule.from_prefixes([[]] * batch, special, **limits)
    rules = (SuppressRule.from_masks(nothing, nothing, batch), timestamps)
    rows = np.zeros(batch, np.int32)
    ids = np.zeros((batch, padded_positions(model.config.max_target_positions)), np.int32)
    inputs = DecodingBatch(ids, rows, rows, rows, rows.astype(np.float32), rows.astype(np.uint32), rules)
    return inputs, {"strategy": strategy, "special": special}


def _rows(strategy: Strategy, model: Whisper, batch: int) -> Any:
    inputs, static = _inputs(strategy, model, batch)
    size = inputs.initial_ids.shape[1]
    build = partial(idle_rows.jitted, size=size, **static)
    return jax.eval_shape(build, model.decoder, _cross(model, batch), inputs.rules)


def _begin(strategy: Strategy, model: Whisper, batch: int) -> Call:
    """The prompts of 16 windows, which take the places of others."""
    inputs, static = _inputs(strategy, model, GROUP)
    going = jax.ShapeDtypeStruct((batch,), jnp.bool_)
    args = _cross(model, GROUP), inputs, _ints((GROUP,)), _rows(strategy, model, batch), going
    return begin.jitted, (model.decoder, *args), static


def _continue(strategy: Strategy, model: Whisper, batch: int) -> Call:
    """The token loop until some rows are done."""
    wanted = jax.ShapeDtypeStruct((batch,), jnp.bool_)
    args = _cross(model, batch), _rows(strategy, model, batch), wanted, _ints(()), _ints(())
    return advance.jitted, (model.decoder, *args), _inputs(strategy, model, 1)[1]


def _move_up(strategy: Strategy, model: Whisper, batch: int) -> Call:
    """What is still read of the text's keys and values, moved to the front."""
    going = jax.ShapeDtypeStruct((batch,), jnp.bool_)
    return move_up.jitted, (_rows(strategy, model, batch), going, _ints(())), {}


PROGRAMS: dict[str, Callable[[Whisper, int], Call]] = {
    "encode": encode,
    "prompt": partial(_pass, PREFILL_CHUNK, 1),
    "step": partial(_pass, 1, 1),
    "beam": partial(_pass, 1, BEAMS),
    "align": align,
    "begin": partial(_begin, Sampling()),
    "advance": partial(_continue, Sampling()),
    "advance beam": partial(_continue, Beam(BEAMS, BEAMS)),
    "move up": partial(_move_up, Sampling()),
    "generate": partial(_decoding, Sampling()),
    "generate beam": partial(_decoding, Beam(BEAMS, BEAMS)),
}
