"""The jitted part of decoding: prefill, then one token a step for all rows.

`generate` decodes windows from beginning to end. `begin` and `advance` do so while rows come and go: the loop is left
when some rows are done, and continued after others have begun in their places.

Whatever may differ between calls (prompt lengths, temperatures, languages, limits) is traced. Only the strategy, the
kinds of the rules and the vocabulary's special ids are static, so one compiled program serves all calls.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from whisper_nnx import ops
from whisper_nnx.decoding.rules import Rule
from whisper_nnx.decoding.strategies import Candidates, Strategy
from whisper_nnx.model.cache import KeysValues, KVCache, to_cache
from whisper_nnx.model.whisper import TextDecoder
from whisper_nnx.runtime.devices import divided, placed, put_rows_of
from whisper_nnx.runtime.programs import exportable, program
from whisper_nnx.text.special_tokens import SpecialTokens

PREFILL_CHUNK = 32  # ids fed at once; longer prompts take several passes of the same shape


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodingBatch:
    """How B windows are decoded.

    Attributes:
      initial_ids: [B,P], prompt, start sequence and prefix, padded on the right to `padded_positions`, the size of the
        cache.
      initial_length: [B], number of initial ids without the padding.
      sot_index: [B], position of `<|startoftranscript|>` among them.
      limit: [B], the most tokens to sample, including the end of text.
      temperature: [B], sampling temperature.
      seed: [B] uint32, sampling seed.
      rules: applied to the logits in this order; log-probabilities are those after all of them. The compiled program
        contains these rules only.
    """

    initial_ids: Any
    initial_length: Any
    sot_index: Any
    limit: Any
    temperature: Any
    seed: Any
    rules: tuple[Rule, ...] = ()


@exportable
class Generated(NamedTuple):
    """Candidates of each window, and no_speech_prob [B]: that token's probability after `<|startoftranscript|>`."""

    candidates: Candidates
    no_speech_prob: jax.Array


def padded_positions(max_positions: int) -> int:
    """Size of the cache for a model with that many text positions: rounded up to whole prefill chunks."""
    return -(-max_positions // PREFILL_CHUNK) * PREFILL_CHUNK


def prefill(
    decoder: TextDecoder, cross: tuple[KeysValues, ...], batch: DecodingBatch
) -> tuple[KVCache, jax.Array, jax.Array]:
    """Feeds the initial ids -> (cache, hidden [B,D] at `<|startoftranscript|>`, hidden [B,D] at the last id).

    The last ids of all rows are fed together, so that shorter rows have their padding before them.
    """
    rows, size = batch.initial_ids.shape
    cache = KVCache.init(cross, size)
    chunks = -(-batch.initial_length.max() // PREFILL_CHUNK)
    padding = chunks * PREFILL_CHUNK - batch.initial_length
    at_sot = padding + batch.sot_index

    def feed(carry: tuple[KVCache, jax.Array, jax.Array]) -> tuple[KVCache, jax.Array, jax.Array]:
        cache, found, _ = carry
        at = cache.end + jnp.arange(PREFILL_CHUNK) - padding[:, None]
        ids = jnp.take_along_axis(batch.initial_ids, jnp.clip(at, 0, size - 1), axis=1)
        kept = jnp.clip(cache.end + PREFILL_CHUNK - padding, 0, PREFILL_CHUNK)
        hidden, longer = decoder.step(ids, cache, kept)
        place = at_sot - cache.end
        here = jnp.take_along_axis(hidden, jnp.clip(place, 0, PREFILL_CHUNK - 1)[:, None, None], axis=1)[:, 0]
        found = jnp.where(((place >= 0) & (place < PREFILL_CHUNK))[:, None], here, found)
        return longer, found, hidden[:, -1]

    nothing = jnp.zeros((rows, decoder.embed_tokens.features), decoder.dtype)
    carry = (cache, nothing, nothing)
    return jax.lax.while_loop(lambda carry: carry[0].end < chunks * PREFILL_CHUNK, feed, carry)


@exportable
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """B windows in the loop, R = B*G rows, each at a token of its own.

    Attributes:
      hidden: [R,D], at the last token.
      cache: without the audio's keys and values, which do not change. Outside the loop, its `end` is [B].
      rules: as they are before the next token.
      state: of the strategy.
      no_speech_prob: [B], as in `Generated`.
    """

    hidden: Any
    cache: KVCache
    rules: tuple[Rule, ...]
    state: Any
    no_speech_prob: Any


def prefilled(
    decoder: TextDecoder,
    cross: tuple[KeysValues, ...],
    batch: DecodingBatch,
    strategy: Strategy,
    special: SpecialTokens,
) -> Rows:
    """Feeds the initial ids of B windows."""
    cache, at_sot, at_last = prefill(decoder, cross, batch)
    group, size = strategy.group, batch.initial_ids.shape[1]
    return Rows(
        jnp.repeat(at_last, group, axis=0),
        replace(cache.repeat(group), cross_attention=()),
        tuple(rule.repeat(group) for rule in batch.rules),
        strategy.init(batch.limit, size, batch.temperature, batch.seed, special.eot),
        _no_speech_prob(decoder.logits(at_sot), special),
    )


def run(
    decoder: TextDecoder,
    cross: tuple[KeysValues, ...],
    rows: Rows,
    strategy: Strategy,
    special: SpecialTokens,
    leave_at: jax.Array | int | None = None,
    most_steps: jax.Array | int | None = None,
) -> Rows:
    """Samples tokens until all rows are done, or `leave_at` more windows are, or for `most_steps` steps."""
    unembed = decoder.unembedding(len(rows.hidden))
    already = _done(rows.state, strategy).sum()

    def goes_on(loop: tuple[jax.Array, Rows]) -> jax.Array:
        step, rows = loop
        going = ~rows.state.done.all()
        if leave_at is not None:
            going &= _done(rows.state, strategy).sum() < already + leave_at
        return going if most_steps is None else going & (step < most_steps)

    def step(loop: tuple[jax.Array, Rows]) -> tuple[jax.Array, Rows]:
        n, rows = loop
        token, source, rules, state = choose(unembed(rows.hidden), rows.rules, rows.state, strategy, special)
        cache = rows.cache if source is None else rows.cache.reorder(source)
        hidden, cache = decoder.step(token[:, None], replace(cache, cross_attention=cross))
        return n + 1, Rows(hidden[:, 0], replace(cache, cross_attention=()), rules, state, rows.no_speech_prob)

    cross = to_cache(cross)
    return jax.lax.while_loop(goes_on, step, (jnp.int32(0), rows))[1]


def choose(
    logits: jax.Array, rules: tuple[Rule, ...], state: Any, strategy: Strategy, special: SpecialTokens
) -> tuple[jax.Array, jax.Array | None, tuple[Rule, ...], Any]:
    """logits [R,V] -> the next tokens [R], the rows [R] that they continue (None: their own), rules and state."""
    logits, bonus = ruled(logits, rules)
    token, source, after = strategy.step(state, logits, bonus, special.eot)
    if source is not None:
        rules = tuple(rule.take(source) for rule in rules)
    rules = tuple(rule.append(token) for rule in rules)
    for rule in rules:
        if (stops := rule.stops()) is not None:
            after = after.stop(stops & ~state.done)
    return token, source, rules, after


def ruled(logits: jax.Array, rules: tuple[Rule, ...]) -> tuple[jax.Array, jax.Array | None]:
    """logits [R,V] -> those after all rules, and the sum of the rules' bonuses [R,V]; None: no rule has any."""
    for rule in rules:
        logits = rule.apply(logits)
    bonuses = [bonus for rule in rules if (bonus := rule.bonus(logits)) is not None]
    return logits, sum(bonuses[1:], bonuses[0]) if bonuses else None


def _done(state: Any, strategy: Strategy) -> jax.Array:
    """Which of B windows are done: all their rows are."""
    return state.done.reshape(-1, strategy.group).all(axis=1)


@program(static_argnames=("strategy", "special"), rows=("cross", "batch"))
def generate(
    decoder: TextDecoder,
    cross: tuple[KeysValues, ...],
    batch: DecodingBatch,
    strategy: Strategy,
    special: SpecialTokens,
) -> Generated:
    """Decodes B windows, given their cross-attention, with one strategy."""
    rows = run(decoder, cross, prefilled(decoder, cross, batch, strategy, special), strategy, special)
    return Generated(strategy.result(rows.state), rows.no_speech_prob)


@program(static_argnames=("size", "strategy", "special", "mesh"))
def idle_rows(
    decoder: TextDecoder,
    cross: tuple[KeysValues, ...],
    rules: tuple[Rule, ...],
    size: int,
    strategy: Strategy,
    special: SpecialTokens,
    mesh: Mesh | None = None,
) -> Rows:
    """Rows for B windows in which nothing has begun, on a mesh or a device of its own.

    rules: of any number of windows; size: `padded_positions`; mesh: that of `cross`, of which only shapes are used.
    """
    cache = KVCache.init(cross, size)
    windows = cache.length.shape[0]
    nothing = jnp.zeros(windows, jnp.int32)
    rows = Rows(
        jnp.zeros((windows * strategy.group, decoder.embed_tokens.features), decoder.dtype),
        _between_programs(cache.repeat(strategy.group), windows),
        (),
        strategy.init(nothing, size, nothing.astype(jnp.float32), nothing.astype(jnp.uint32), special.eot),
        jnp.zeros(windows, jnp.float32),
    )

    def zeros(x: jax.Array) -> jax.Array:
        return jnp.zeros((windows, *x.shape[1:]), x.dtype)

    place, place_heads = partial(placed, mesh=mesh), partial(placed, mesh=mesh, heads_axis=ops.current().heads_axis)
    buffers = jax.tree.map(place_heads, rows.cache.self_attention)
    rows, empty = jax.tree.map(place, rows), [rule.changed(zeros).repeat(strategy.group) for rule in rules]
    placed_rules = tuple(rule.changed(place) for rule in empty)
    return replace(rows, rules=placed_rules, cache=replace(rows.cache, self_attention=buffers))


@program(static_argnames=("strategy", "special"), donated=("rows",))
def begin(
    decoder: TextDecoder,
    cross: tuple[KeysValues, ...],
    batch: DecodingBatch,
    places: jax.Array,
    rows: Rows,
    going: jax.Array,
    strategy: Strategy,
    special: SpecialTokens,
) -> Rows:
    """Begins n windows in the places of others.

    Args:
      decoder: of the model.
      cross: audio keys and values of the n windows.
      batch: how they are decoded.
      places: [n], which of the B windows each of them replaces; -1: none, it is not decoded.
      rows: of B windows.
      going: [B], those that are not done.
      strategy: of all.
      special: the vocabulary's special ids.
    """
    static: dict[str, Any] = {"strategy": strategy, "special": special}
    new = divided(_prefilled_apart, ("cross", "batch"), tuple(static))(decoder, cross, batch, **static)
    return divided(_insert, ("rows", "going"))(rows, new, places, going)


def _prefilled_apart(
    decoder: TextDecoder,
    cross: tuple[KeysValues, ...],
    batch: DecodingBatch,
    strategy: Strategy,
    special: SpecialTokens,
) -> Rows:
    """`prefilled`, with the last initial ids at the cache's last position: parts of a mesh feed different numbers."""
    rows = prefilled(decoder, cross, batch, strategy, special)
    return replace(rows, cache=_between_programs(_turned(rows.cache, -rows.cache.end), len(batch.limit)))


def _turned(cache: KVCache, by: jax.Array) -> KVCache:
    """The cache with everything that many positions further in the ring."""
    buffers = jax.tree.map(lambda x: jnp.roll(x, by * cache.group, x.ndim - 2), cache.self_attention)
    return replace(cache, self_attention=buffers, source=jnp.roll(cache.source, by, axis=1))


def _insert(rows: Rows, new: Rows, places: jax.Array, going: jax.Array) -> Rows:
    """`rows` with those of `new` in their places. The initial ids are moved to end where all rows write next."""
    size, end, new_end = new.cache.source.shape[1], rows.cache.end[0], new.cache.end.max()
    # A ring that is not full yet has nothing before its first position; as a full one, it continues at its end.
    end = jnp.where(going.any(), jnp.where(end < new_end, end + size, end), new_end)
    end = jnp.where(end < 2 * size, end, end % size + size)
    new = replace(new, cache=_turned(new.cache, end))

    def put(old: Any, new: Any) -> Any:
        if isinstance(old, Rule):
            return new.changed(lambda own, old: put(old, own), old)
        return put_rows_of(old, new, places)

    rows = jax.tree.map(put, rows, new, is_leaf=lambda x: isinstance(x, Rule))
    return replace(rows, cache=replace(rows.cache, end=jnp.full_like(rows.cache.end, end)))


@program(static_argnames=("strategy", "special"), rows=("cross", "rows", "wanted"), donated=("rows",))
def advance(
    decoder: TextDecoder,
    cross: tuple[KeysValues, ...],
    rows: Rows,
    wanted: jax.Array,
    leave_at: jax.Array,
    most_steps: jax.Array,
    strategy: Strategy,
    special: SpecialTokens,
) -> tuple[Rows, Generated, jax.Array, jax.Array]:
    """Continues the `wanted` [B] windows -> (rows, what was generated so far, which are done [B], is_sparse [B]).

    is_sparse: whether less than half of the positions that were written are read by those that are not done; the same
    for all windows, on a mesh for those of a part.

    Leaves as soon as `leave_at` of them are done, on a mesh in each part of its axis `data`, or after `most_steps`.
    """
    state = rows.state.idle(jnp.repeat(~wanted, strategy.group))
    rows = replace(rows, state=state, cache=replace(rows.cache, end=rows.cache.end[0]))
    rows = run(decoder, cross, rows, strategy, special, leave_at, most_steps)
    generated = Generated(strategy.result(rows.state), rows.no_speech_prob)
    done, cache = _done(rows.state, strategy), rows.cache
    is_sparse = jnp.minimum(cache.end, cache.source.shape[1]) > 2 * jnp.maximum(_longest(cache, ~done), PREFILL_CHUNK)
    rows = replace(rows, cache=_between_programs(cache, len(wanted)))
    return rows, generated, done, jnp.broadcast_to(is_sparse, done.shape)


@program(rows=("rows", "going"), donated=("rows",))
def move_up(rows: Rows, going: jax.Array, least: jax.Array) -> Rows:
    """Moves what the `going` [B] windows read to the front of the cache, so that its `end` is that of the longest.

    least: the smallest `end`, that of the prompts that begin next: behind a longer one the ring would count as full.
    """
    end = jnp.maximum(_longest(rows.cache, going), least)
    cache = _turned(rows.cache, end - rows.cache.end[0])
    return replace(rows, cache=replace(cache, end=jnp.full_like(cache.end, end)))


def _longest(cache: KVCache, going: jax.Array) -> jax.Array:
    return jnp.where(jnp.repeat(going, cache.group), cache.length, 0).max()


def _between_programs(cache: KVCache, windows: int) -> KVCache:
    """The cache between programs: `end` as an array [B], which parts of a mesh have different ones of."""
    return replace(cache, cross_attention=(), end=jnp.full(windows, cache.end))


def _no_speech_prob(logits: jax.Array, special: SpecialTokens) -> jax.Array:
    """logits [B,V] at `<|startoftranscript|>` -> [B]; NaN where the vocabulary has no such token."""
    if special.no_speech is None:
        return jnp.full(logits.shape[:1], jnp.nan)
    # Gather the maximum by index, or XLA fuses the reduction into the matmul (10x slower on CPU).
    top = jnp.take_along_axis(logits, jnp.argmax(logits, axis=-1)[:, None], axis=-1)
    parts = jnp.exp(logits - top)
    return parts[:, special.no_speech] / parts.sum(axis=-1)
