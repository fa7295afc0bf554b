"""Decoding of windows against a plain-Python decoder that asks the network anew for every token."""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from tests.oracle import ROWS, PlainDecoder
from tests.small import quick_compilation, small_config, small_mel, small_model, small_tokenizer  # noqa: F401
from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.decoding.strategies import Beam
from whisper_nnx.model.whisper import Whisper
from whisper_nnx.transcription import windows
from whisper_nnx.transcription.windows import decode, decode_windows, encode_windows

CONTEXT = small_config().max_target_positions
TOKENIZER = small_tokenizer()
SPECIAL = TOKENIZER.special
TASK_TOKENS = {
    SPECIAL.transcribe, SPECIAL.translate, SPECIAL.sot, SPECIAL.sot_prev, SPECIAL.sot_lm, SPECIAL.no_speech,
}  # fmt: skip
PROMPT = tuple(range(100, 140))
GERMAN = DecodingOptions(language="de")


@pytest.fixture(scope="module")
def model() -> Whisper:
    return small_model(decoder_layers=1)


@pytest.fixture(scope="module")
def mel() -> jax.Array:
    return small_mel(ROWS)


@pytest.fixture(scope="module")
def encoded(model, mel):
    return encode_windows(model, mel)


def start_of(language="de", task=SPECIAL.transcribe) -> list[int]:
    return [SPECIAL.sot, dict(SPECIAL.languages)[language], task]


def agree(result, expected: tuple[Sequence[int], float]) -> None:
    tokens, total = expected
    assert result.tokens == tuple(tokens)
    np.testing.assert_allclose(result.avg_logprob, total / (len(tokens) + 1), atol=1e-4)


def same(a, b) -> None:
    """Equal results; the last digits of float32 depend on the shape of the batch."""
    assert (a.tokens, a.text, a.language, a.temperature) == (b.tokens, b.text, b.language, b.temperature)
    numbers = [(r.avg_logprob, r.no_speech_prob, *r.token_logprobs) for r in (a, b)]
    np.testing.assert_allclose(*numbers, atol=1e-4)


# Greedy.


def test_greedy_tokens_equal_those_of_the_plain_decoder(model, mel):
    results = decode(model, mel, GERMAN)
    for result, window in zip(results, mel, strict=True):
        agree(result, PlainDecoder(model, window, GERMAN, start_of()).greedy())
    lengths = [len(result.tokens) for result in results]
    assert min(lengths) < CONTEXT // 2 == max(lengths)  # some end, some reach the limit


MIXED = [
    (DecodingOptions(language="fr", prompt=PROMPT[:2]), [SPECIAL.sot_prev, *PROMPT[:2], *start_of("fr")], ()),
    (
        DecodingOptions(language="en", task="translate", sample_len=7, prompt=PROMPT),
        [SPECIAL.sot_prev, *PROMPT[-23:], *start_of("en", SPECIAL.translate)],
        (),
    ),
    (
        DecodingOptions(language="es", without_timestamps=True, prefix=PROMPT[:3]),
        [*start_of("es"), SPECIAL.no_timestamps, *PROMPT[:3]],
        PROMPT[:3],
    ),
    (
        DecodingOptions(language="de", max_initial_timestamp=0.2, prompt=PROMPT[:9]),
        [SPECIAL.sot_prev, *PROMPT[:9], *start_of("de")],
        (),
    ),
]


def test_rows_with_options_of_their_own_equal_the_plain_decoder(model, mel, encoded):
    results = decode_windows(model, encoded, [options for options, _, _ in MIXED], range(ROWS))
    for result, window, (options, start, prefix) in zip(results, mel, MIXED, strict=True):
        plain = PlainDecoder(model, window, options, start, prefix)
        agree(result, plain.greedy())
        at_sot = plain.logits(start)[start.index(SPECIAL.sot)]
        np.testing.assert_allclose(result.no_speech_prob, jax.nn.softmax(at_sot)[SPECIAL.no_speech], rtol=1e-3)


def take(encoded, rows):
    """Some of the windows."""
    return jax.tree.map(lambda x: x[np.array(rows)], encoded)


def test_an_idle_row_changes_nothing_and_has_no_result(model, encoded):
    options = [o for o, _, _ in MIXED]
    busy = decode_windows(model, encoded, options, range(ROWS))
    some = decode_windows(model, encoded, [options[0], None, options[2], None], range(ROWS))
    assert some[1] is None
    assert some[3] is None
    same(some[0], busy[0])
    same(some[2], busy[2])


@pytest.mark.parametrize(
    "changes",
    [
        [{}, {"temperature": 0.7}, {"temperature": 1.3}, {"temperature": 0.2}],
        [{"temperature": 0.7, "best_of": 3}] * ROWS,
        [{"beam_size": 3}] * ROWS,
    ],
    ids=["greedy_and_sampled", "best_of", "beam"],
)
def test_a_row_of_a_batch_equals_the_row_alone(model, encoded, changes):
    options = [replace(o, **change) for (o, _, _), change in zip(MIXED, changes, strict=True)]
    seeds = [11, 12, 13, 14]
    together = decode_windows(model, encoded, options, seeds)
    for row in range(ROWS):
        (alone,) = decode_windows(model, take(encoded, [row]), [options[row]], [seeds[row]])
        same(alone, together[row])


def test_rows_of_different_strategies_are_decoded_each_by_its_own(model, mel, encoded):
    """In one call, though not in one batch."""
    beam, greedy = decode_windows(model, take(encoded, [1, 2]), [replace(GERMAN, beam_size=3), GERMAN], [0, 0])
    same(beam, decode(model, mel, GERMAN, beam_size=3)[1])
    same(greedy, decode(model, mel, GERMAN)[2])


# Beam search.


def test_beam_of_one_equals_greedy(model, mel):
    for beam, greedy in zip(decode(model, mel, GERMAN, beam_size=1), decode(model, mel, GERMAN), strict=True):
        same(beam, greedy)


@pytest.mark.parametrize("patience", [0.5, 1.0, 2.0])
def test_beam_search_equals_that_of_the_plain_decoder(model, mel, patience):
    options = replace(GERMAN, beam_size=3, patience=patience)
    results = decode(model, mel, options)
    for result, window in zip(results, mel, strict=True):
        agree(result, PlainDecoder(model, window, options, start_of()).beam())


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_length_penalty_ranks_what_a_beam_search_found(model, mel, alpha):
    options = replace(GERMAN, beam_size=3, length_penalty=alpha)
    for result, window in zip(decode(model, mel, options), mel, strict=True):
        agree(result, PlainDecoder(model, window, options, start_of()).beam())


def test_a_beam_search_with_a_single_first_choice_survives(model, mel):
    """max_initial_timestamp=0 leaves one token for three beams."""
    options = replace(GERMAN, beam_size=3, max_initial_timestamp=0.0, sample_len=5)
    for result, window in zip(decode(model, mel, options), mel, strict=True):
        agree(result, PlainDecoder(model, window, options, start_of()).beam())


# Sampling.


def goodness_of_fit(draws: Sequence[int], probs: np.ndarray) -> float:
    """p of a chi-square test; rare tokens count together."""
    often = probs * len(draws) >= 5
    seen = np.bincount(draws, minlength=len(probs))
    observed = [*seen[often], seen[~often].sum()]
    expected = [*probs[often] * len(draws), probs[~often].sum() * len(draws)]
    assert often.sum() > 3
    return stats.chisquare(observed, expected, sum_check=False).pvalue


def test_two_thousand_samples_are_distributed_as_the_softmax(model, mel, encoded):
    options = replace(GERMAN, temperature=0.7, without_timestamps=True, sample_len=2)
    plain = PlainDecoder(model, mel[0], options, [*start_of(), SPECIAL.no_timestamps])
    results = decode(model, jnp.repeat(encoded.features[:1], 2000, axis=0), options, seed=5)

    def expected(sampled):
        logits = plain.logprobs(sampled) / 0.7
        return np.exp(logits) / np.exp(logits).sum()

    first = [result.tokens[0] for result in results]
    assert goodness_of_fit(first, expected(())) > 0.01
    common = int(np.bincount(first).argmax())
    second = [(*result.tokens, SPECIAL.eot)[1] for result in results if result.tokens[0] == common]
    assert len(second) > 300
    assert goodness_of_fit(second, expected((common,))) > 0.01


def test_samples_follow_the_seed_and_differ_between_rows(model, mel):
    def sample(seed):
        return [r.tokens for r in decode(model, jnp.repeat(mel[:1], ROWS, axis=0), GERMAN, temperature=1.0, seed=seed)]

    assert sample(0) == sample(0)
    assert len({*sample(0), *sample(1)}) == 2 * ROWS


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.7}, {"temperature": 0.7, "best_of": 3}, {"beam_size": 3}])
def test_log_probabilities_are_those_behind_the_filters_whatever_the_temperature(model, mel, changes):
    options = replace(GERMAN, **changes)
    for result, window in zip(decode(model, mel, options), mel, strict=True):
        plain, tokens = PlainDecoder(model, window, options, start_of()), result.tokens
        expected = [plain.logprobs(tokens[:n])[token] for n, token in enumerate(tokens)]
        np.testing.assert_allclose(result.token_logprobs, expected, atol=1e-3)
        end = plain.logprobs(tokens)[SPECIAL.eot] if len(tokens) < plain.limit else 0.0
        np.testing.assert_allclose(sum(expected) + end, result.avg_logprob * (len(tokens) + 1), atol=1e-3)
        assert result.temperature == options.temperature


def test_best_of_keeps_the_most_probable_of_its_samples(model, mel, monkeypatch):
    seen = []

    def generate(*args, wrapped=windows.generate):
        seen.append(wrapped(*args))
        return seen[-1]

    monkeypatch.setattr(windows, "generate", generate)
    results = decode(model, mel, GERMAN, temperature=0.7, best_of=3)
    lengths, totals = np.asarray(seen[0].candidates.length), np.asarray(seen[0].candidates.total)
    best = (totals / lengths).argmax(axis=1)
    assert lengths.shape == (ROWS, 3)
    assert len(np.unique(totals)) == 3 * ROWS
    for row, result in enumerate(results):
        assert result.avg_logprob == pytest.approx(totals[row, best[row]] / (lengths[row, best[row]] + 1))


# Limits, prompts and prefixes.


def endless(**changes) -> DecodingOptions:
    return replace(GERMAN, suppress_tokens=(-1, SPECIAL.eot), without_timestamps=True, **changes)


@pytest.mark.parametrize(
    ("sample_len", "prompt", "expected"),
    [
        (None, None, CONTEXT // 2),
        (1, None, 1),
        (5, None, 5),
        (1000, None, CONTEXT - 4 + 1),
        (1000, PROMPT, CONTEXT - 4 - 24 + 1),
        (None, PROMPT, CONTEXT - 4 - 24 + 1),
    ],
)
def test_so_many_tokens_are_sampled_and_the_context_is_full_at_most(model, mel, sample_len, prompt, expected):
    options = endless(sample_len=sample_len, prompt=prompt)
    results = decode(model, mel, options)
    assert [len(result.tokens) for result in results] == [expected] * ROWS
    before = [SPECIAL.sot_prev, *PROMPT[-23:]] if prompt else []
    plain = PlainDecoder(model, mel[0], options, [*before, *start_of(), SPECIAL.no_timestamps])
    agree(results[0], plain.greedy())


def test_the_timestamp_rules_know_the_prefix(model, mel):
    options = replace(GERMAN, prefix="one")
    prefix = [SPECIAL.timestamp_begin, *TOKENIZER.encode(" one")]
    for result, window in zip(decode(model, mel, options), mel, strict=True):
        agree(result, PlainDecoder(model, window, options, [*start_of(), *prefix], prefix).greedy())


# What is never sampled, and the first timestamp.


@pytest.fixture(scope="module")
def eager_model(model) -> Whisper:
    """Task tokens have the highest logits."""
    eager = small_model(decoder_layers=1)
    wanted = eager.decoder.embed_tokens.embedding[np.array(sorted(TASK_TOKENS))].sum(axis=0)
    eager.decoder.layer_norm.bias[...] = 2 * wanted
    return eager


@pytest.mark.parametrize("suppress", [None, "", (), [], "5"])
def test_task_tokens_are_never_sampled_even_if_nothing_is_suppressed(eager_model, mel, suppress):
    plain = PlainDecoder(eager_model, mel[0], GERMAN, start_of())
    assert plain.logits(start_of())[-1].argmax() in TASK_TOKENS
    for result in decode(eager_model, mel, GERMAN, suppress_tokens=suppress, without_timestamps=True):
        assert result.tokens
        assert not TASK_TOKENS & {*result.tokens}


def test_ids_without_a_token_are_never_sampled(model, mel):
    eager = small_model(decoder_layers=1)
    eager.decoder.layer_norm.bias[...] = 2 * eager.decoder.embed_tokens.embedding[-5:].sum(axis=0)
    for result in decode(eager, mel, GERMAN, suppress_tokens=None, without_timestamps=True):
        assert max(result.tokens) <= SPECIAL.timestamp_end < eager.config.vocab_size - 5


def test_suppressed_tokens_are_not_sampled_and_the_callers_list_stays_as_it_was(model, mel):
    usual = {token for result in decode(model, mel, GERMAN, without_timestamps=True) for token in result.tokens}
    suppress = [-1, *sorted(usual - {SPECIAL.eot})]
    before = list(suppress)
    for result in decode(model, mel, GERMAN, without_timestamps=True, suppress_tokens=suppress):
        assert not usual & {*result.tokens}
        assert not {*TOKENIZER.non_speech_tokens} & {*result.tokens}
    assert suppress == before


def test_a_transcript_begins_with_neither_a_space_nor_its_end_unless_it_may(model, mel):
    eager = small_model(decoder_layers=1, end_bias=60.0)
    options = replace(GERMAN, without_timestamps=True)
    assert all(result.tokens == () for result in decode(eager, mel, options, suppress_blank=False))
    for result in decode(eager, mel, options):
        assert len(result.tokens) == 1
        assert result.text.strip() or result.tokens[0] not in TOKENIZER.encode(" ")


def test_max_initial_timestamp_zero_means_that_speech_starts_at_zero(model, mel):
    free = [result.tokens[0] for result in decode(model, mel, GERMAN, max_initial_timestamp=None)]
    assert max(free) > SPECIAL.timestamp_begin
    for result in decode(model, mel, GERMAN, max_initial_timestamp=0.0):
        assert result.tokens[0] == SPECIAL.timestamp_begin


@pytest.mark.parametrize("limit_s", [0.04, 0.5, 1.0, 1e9, None])
def test_max_initial_timestamp_is_in_seconds(model, mel, limit_s):
    options = replace(GERMAN, max_initial_timestamp=limit_s, sample_len=3)
    for result, window in zip(decode(model, mel, options), mel, strict=True):
        agree(result, PlainDecoder(model, window, options, start_of()).greedy())


def test_a_beam_step_does_not_sort_the_vocabulary():
    """XLA's CPU compiler recognizes the top k only where nothing is merged into it; sorting takes 100 times as long."""
    vocab_size, beam, limit = 5000, Beam(3, 3), jnp.full(2, 9)
    logits = jax.ShapeDtypeStruct((6, vocab_size), jnp.float32)

    def step(logits):
        return beam.step(beam.init(limit, 9, jnp.zeros(2), jnp.zeros(2, jnp.uint32), 0), logits, None, 0)

    program = jax.jit(step).lower(logits).compile().as_text()
    sorts = [line for line in program.splitlines() if " sort(" in line and str(vocab_size) in line]
    assert 'custom_call_target="TopK"' in program
    assert sorts == []
