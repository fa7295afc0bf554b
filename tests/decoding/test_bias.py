"""Preferred phrases: the automaton against plain Python, and decoding with it."""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle import ROWS, PlainDecoder
from tests.small import quick_compilation, small_mel, small_model, small_tokenizer  # noqa: F401
from whisper_nnx import load_model, transcribe
from whisper_nnx.decoding.bias import BiasRule, Trie
from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.transcription.biasing import trie_of
from whisper_nnx.transcription.windows import decode, decode_windows, encode_windows

V, END = 12, 11  # END is in no phrase

bonus_of = jax.jit(BiasRule.bonus)
append = jax.jit(BiasRule.append)


def paid(phrases: Sequence[tuple[Sequence[int], float]], *texts: Sequence[int]) -> np.ndarray:
    """The bonus of each token of texts of one length [texts,N], each in a row of its own."""
    rule = BiasRule.from_tries([Trie.from_phrases(phrases)] * len(texts), V)
    bonuses, logits = [], jnp.zeros((len(texts), V))
    for tokens in np.array(texts, np.int32).T:
        bonuses.append(np.asarray(bonus_of(rule, logits))[np.arange(len(texts)), tokens])
        rule = append(rule, jnp.array(tokens))
    return np.array(bonuses).T


def worth(phrases: Sequence[tuple[Sequence[int], float]], text: Sequence[int]) -> float:
    """Of the most valuable phrases in a text that do not overlap."""
    best = [0.0] * (len(text) + 1)
    for end in range(1, len(text) + 1):
        best[end] = best[end - 1]
        for ids, bonus in phrases:
            if tuple(text[end - len(ids) : end]) == tuple(ids) and len(ids) <= end:
                best[end] = max(best[end], best[end - len(ids)] + bonus * len(ids))
    return best[-1]


phrase = st.lists(st.integers(0, 2), min_size=1, max_size=4)
LENGTH = 12


@settings(max_examples=100)
@given(st.lists(phrase, min_size=1, max_size=6), st.lists(st.integers(0, 3), min_size=LENGTH, max_size=LENGTH))
def test_a_text_gains_no_more_than_its_phrases(ids, text):
    phrases = [(one, 2.0) for one in ids]
    assert 0 <= paid(phrases, [*text, END]).sum() <= worth(phrases, text)


@settings(max_examples=100)
@given(st.lists(phrase, min_size=1, max_size=6))
def test_a_text_of_whole_phrases_gains_all_of_them(ids):
    phrases = [(one, 2.0) for one in ids]
    text = [token for one in ids for token in (*one, END)]
    padded = text + [END] * (6 * 5 - len(text))
    np.testing.assert_array_equal(paid(phrases, padded).sum(), worth(phrases, text))


def test_a_phrase_is_paid_token_by_token_and_unfinished_ones_are_taken_back():
    phrases = [([1, 2, 3], 2.0), ([1, 2, 4, 5], 1.0), ([7], 5.0)]
    found = paid(phrases, [1, 2, 3, 9, 9], [1, 2, 9, 9, 9], [1, 2, 4, 5, 9], [1, 2, 4, 7, 9], [1, 1, 2, 3, 1])
    expected = [[2, 2, 2, 0, 0], [2, 2, -4, 0, 0], [2, 2, 1, 1, 0], [2, 2, 1, 0, 0], [2, 0, 2, 2, 2]]
    np.testing.assert_array_equal(found, expected)


def test_a_finished_phrase_is_kept_where_a_longer_one_is_left():
    np.testing.assert_array_equal(paid([([1, 2], 3.0), ([1, 2, 3, 4], 1.0)], [1, 2, 3, 9]), [[3, 3, 1, -1]])


def test_a_phrase_that_began_within_another_one_is_continued():
    phrases = [([1, 2, 3], 2.0), ([2, 4], 1.0), ([2], 0.5)]
    np.testing.assert_array_equal(paid(phrases, [1, 2, 4, 9]), [[2, 2, -2, 0]])
    assert paid(phrases, [1, 2, 9]).sum() == 1  # of [2], whose token is worth as much as in [2, 4]


def test_a_node_with_more_children_than_are_read_at_once():
    trie = Trie.from_phrases([([0, token], 1.0) for token in range(100)])
    rule = append(BiasRule.from_tries([trie, None], 120), jnp.array([0, 0]))
    expected = np.zeros((2, 120))
    expected[0] = [1] * 100 + [-1] * 20
    np.testing.assert_array_equal(bonus_of(rule, jnp.zeros((2, 120))), expected)


def test_phrases_that_share_much_are_refused_before_they_take_memory():
    phrases = [([0, 1000 + n], 1.0) for n in range(600)] + [([2000 + n, 0, 5000 + n], 1.0) for n in range(600)]
    with pytest.raises(
        ValueError, match=r"bias needs 26\d{4} entries or more, of at most 262144; give fewer or shorter"
    ):
        Trie.from_phrases(phrases)


# Decoding with them.

TOKENIZER = small_tokenizer()
SPECIAL = TOKENIZER.special
GERMAN = DecodingOptions(language="de")
START = [SPECIAL.sot, dict(SPECIAL.languages)["de"], SPECIAL.transcribe]
WORDS = ("one", "the other", "two")


@pytest.fixture(scope="module")
def model():
    return small_model(decoder_layers=1)


@pytest.fixture(scope="module")
def mel():
    return small_mel(ROWS)


@pytest.fixture(scope="module")
def encoded(model, mel):
    return encode_windows(model, mel)


def count(results, words=WORDS) -> int:
    return sum(result.text.count(word) for result in results for word in words)


STRATEGIES = [{}, pytest.param({"temperature": 0.7, "best_of": 3}, marks=pytest.mark.slow), {"beam_size": 3}]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_phrases_appear_only_where_they_are_preferred(model, encoded, strategy):
    free = replace(GERMAN, **strategy)
    biased = replace(free, bias=WORDS, bias_weight=6.0)
    alone = decode_windows(model, encoded, [free] * ROWS, range(ROWS))
    beside = decode_windows(model, encoded, [free, biased, None, biased], range(ROWS))
    assert beside[0].tokens == alone[0].tokens
    assert count([alone[1], alone[3]]) == 0
    assert count([beside[1], beside[3]]) >= 3


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_rows_with_lists_of_their_own_are_decoded_together(model, encoded, strategy):
    lists = [("one",), ("the other", "two"), None, (("and", 9.0),)]
    options = [replace(GERMAN, **strategy, bias=bias, bias_weight=6.0) for bias in lists]
    together = decode_windows(model, encoded, options, range(ROWS))
    for row, own in enumerate(options):
        alone = decode_windows(model, encoded, [own if row == i else None for i in range(ROWS)], range(ROWS))
        assert together[row].tokens == alone[row].tokens
    assert len({result.tokens for result in together}) == ROWS


def plain_greedy(model, window, options: DecodingOptions):
    """Tokens, and the sum of their log-probabilities before the bonuses, from a cache-free decoder."""
    decoder, trie, tokens, total = PlainDecoder(model, window, options, START), trie_of(TOKENIZER, options), [], 0.0
    size = model.config.vocab_size
    while len(tokens) < decoder.limit:
        logprobs = decoder.logprobs(tokens)
        phrases = BiasRule.from_tries([trie], size)
        for token in tokens:
            phrases = append(phrases, jnp.array([token]))
        best = int(np.argmax(logprobs + np.asarray(bonus_of(phrases, jnp.zeros((1, size))))[0]))
        total += logprobs[best]
        if best == SPECIAL.eot:
            break
        tokens.append(best)
    return tuple(tokens), total


def test_log_probabilities_are_those_without_the_bonuses(model, mel):
    options = replace(GERMAN, bias=WORDS, bias_weight=6.0)
    for result, window in zip(decode(model, mel, options), mel, strict=True):
        tokens, total = plain_greedy(model, window, options)
        assert result.tokens == tokens
        np.testing.assert_allclose(result.avg_logprob, total / (len(tokens) + 1), atol=1e-4)


def test_beams_are_ranked_with_the_bonuses(model, mel):
    options = replace(GERMAN, beam_size=3, n_best=3, bias=WORDS, bias_weight=6.0)
    for result in decode(model, mel, options):
        probable = max(result.alternatives, key=lambda one: one.avg_logprob)
        assert count([result]) >= count([probable])
    assert any(r.avg_logprob < max(a.avg_logprob for a in r.alternatives) for r in decode(model, mel, options))


def test_lists_of_one_size_are_compiled_once(model, encoded, compilations):
    def run(*lists):
        options = [bias and replace(GERMAN, bias=bias, beam_size=2) for bias in lists]
        decode_windows(model, encoded, options, range(ROWS))

    run(("one",), ("two",), None, ("three four",))
    compilations.clear()
    run(("a", ("b", 3.0, ("c", "d"))), ("two",), ("other",), ("one",))
    run(None, ("a longer phrase", "another one"), None, ("x",))
    assert compilations == []


def test_spellings_of_a_phrase():
    def ids(**changes):
        trie = trie_of(TOKENIZER, DecodingOptions(**changes))
        assert trie is not None
        return {int(i) for i in trie.token[: trie.first[1]]}

    assert ids(bias="one") == {TOKENIZER.encode(" one")[0], TOKENIZER.encode(" One")[0]}
    assert ids(bias=[("Two", 1.0, ["one"])]) == {TOKENIZER.encode(text)[0] for text in (" Two", " one", " One")}
    assert ids(bias="東") == {TOKENIZER.encode(text)[0] for text in (" 東", "東")}


def test_recordings_with_lists_of_their_own_are_the_same_in_any_company(model):
    """Two rows take turns: lists of one size share their loop, the other recordings are decoded apart."""
    noise = np.random.default_rng(0).normal(0, 0.1, (4, 16_000)).astype(np.float32)
    options = {"language": "de", "temperature": 0.0, "no_speech_threshold": None, "bias_weight": 300.0}
    lists = [("one",), ("the other", "two"), None, ("on",)]
    sources = [{"audio": audio, "bias": bias} for audio, bias in zip(noise, lists, strict=True)]
    together = [one["text"] for one in transcribe(model, sources, batch_size=2, **options)]
    assert together == [transcribe(model, source, **options)["text"] for source in sources]
    for text, words in zip(together, lists, strict=True):
        assert words is None or any(word in text.lower() for word in words)
    assert "one" not in together[2].lower()


@pytest.mark.real
def test_a_rare_word_of_a_real_recording_is_found(real_tiny_en, real_speech):
    model, options = load_model(real_tiny_en), {"temperature": 0.0, "logprob_threshold": None}
    file = str(real_speech("en_lj_8s.wav"))
    free = transcribe(model, file, **options)["text"]
    biased = transcribe(model, file, bias="Kubernetes, thereunder, Zarathustra", bias_weight=4.0, **options)["text"]
    assert "there under" in free
    assert biased.replace("thereunder", "there under") == free
    assert "thereunder" in biased
