"""Decoding with a draft gives the tokens of plain greedy decoding, whatever the draft proposes, in fewer passes."""

from collections import Counter
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.small import quick_compilation, small_mel, small_model  # noqa: F401
from whisper_nnx.decoding import speculative
from whisper_nnx.decoding.loop import PREFILL_CHUNK, generate
from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.decoding.speculative import GREEDY, PROPOSED, generate_speculative, propose_ngrams
from whisper_nnx.model.whisper import TextDecoder
from whisper_nnx.transcription.attempts import Attempt, loop_inputs
from whisper_nnx.transcription.windows import encode_windows

PROMPT = tuple(range(100, 120))
# Rows that differ in rules, lengths and ends; one starts so late that others fill the cache with gaps.
ROWS = [
    DecodingOptions(language="de"),
    DecodingOptions(language="de", repetition_penalty=1.3, max_repeats=3, without_timestamps=True),
    DecodingOptions(language="fr", no_repeat_ngram_size=2, prompt=PROMPT * 2, max_new_tokens=40),
    DecodingOptions(language="en", without_timestamps=True, prefix=(65, 66, 65), max_new_tokens=40),
]


@cache
def models():
    """A model, a draft with its encoder, and their windows; few rows end early."""
    model, draft = small_model(end_bias=2.0), small_model(end_bias=2.0, decoder_layers=1)
    return model, draft, encode_windows(model, small_mel(4)), encode_windows(draft, small_mel(4))


def arguments(rows: list[DecodingOptions], draft: str):
    model, small, encoded, of_draft = models()
    special = model.tokenizer.special
    cross, own = jax.tree.map(lambda x: x[: len(rows)], (encoded.cross, of_draft.cross))
    batch = loop_inputs(model.config, model.tokenizer, [Attempt(one) for one in rows])
    drafts = {"n-grams": (None, ()), "smaller": (small.decoder, own), "itself": (model.decoder, cross)}
    return (model.decoder, cross, batch, *drafts[draft], special)


@pytest.mark.parametrize("draft", ["n-grams", "smaller"])
@pytest.mark.parametrize("rows", [pytest.param(ROWS[3:], marks=pytest.mark.slow), ROWS], ids=["one", "four"])
def test_tokens_are_those_of_plain_greedy_decoding(rows, draft, monkeypatch):
    decoder, cross, batch, *rest, special = arguments(rows, draft)
    plain = generate(decoder, cross, batch, GREEDY, special)
    if len(rows) > 1:  # the cache is so small that rows must be closed up
        monkeypatch.setattr(speculative, "_MORE_POSITIONS", 0)
        assert PREFILL_CHUNK + plain.candidates.length.max() > batch.initial_ids.shape[1]
    drafted = jax.jit(lambda *given: generate_speculative.__wrapped__(*given, special))(decoder, cross, batch, *rest)
    size = plain.candidates.tokens.shape[-1]
    assert plain.candidates.length.max() > 16
    for name in ("tokens", "length", "stopped", "valid"):
        ours, theirs = getattr(drafted.candidates, name), getattr(plain.candidates, name)
        np.testing.assert_array_equal(ours[..., :size] if ours.ndim > 2 else ours, theirs, name)
    np.testing.assert_allclose(drafted.candidates.logprobs[..., :size], plain.candidates.logprobs, atol=1e-4)
    np.testing.assert_allclose(drafted.candidates.total, plain.candidates.total, atol=1e-3)
    np.testing.assert_allclose(drafted.no_speech_prob, plain.no_speech_prob, atol=1e-6)


def passes(monkeypatch, draft: str) -> tuple[Counter, int]:
    """How often the decoder was given how many positions, beside the prompt's, and how many tokens it sampled."""
    decoder, *rest = arguments(ROWS[3:], draft)
    counted, step = Counter(), TextDecoder.step

    def counting(self, ids, *more):
        if len(self.layers) == len(decoder.layers):
            jax.debug.callback(lambda: counted.update([ids.shape[1]]))
        return step(self, ids, *more)

    monkeypatch.setattr(TextDecoder, "step", counting)
    special = rest.pop()
    result = jax.jit(lambda *given: generate_speculative.__wrapped__(*given, special))(decoder, *rest)
    jax.effects_barrier()
    return counted, int(result.candidates.length[0, 0])


def test_one_pass_verifies_all_proposed_tokens(monkeypatch):
    """n-grams: where nothing is proposed, single tokens are fed, so that all passes together are fewer than tokens."""
    counted, tokens = passes(monkeypatch, "n-grams")
    assert tokens > 16
    assert counted[PROPOSED + 1] > 0
    assert counted[1] + counted[PROPOSED + 1] < tokens


@pytest.mark.slow
def test_a_draft_that_is_always_right_leaves_one_pass_for_all_it_proposed(monkeypatch):
    counted, tokens = passes(monkeypatch, "itself")
    assert counted[PROPOSED + 1] == -(-tokens // (PROPOSED + 1))


def plain_ngrams(text: list[int]) -> list[int]:
    """What follows the longest, latest match of the last tokens, which goes on in circles."""
    for size in (3, 2):
        for at in range(len(text) - 2, size - 2, -1):
            if text[at - size + 1 : at + 1] == text[len(text) - size :]:
                proposed = list(text)
                for _ in range(PROPOSED):
                    proposed.append(proposed[len(proposed) - (len(text) - 1 - at)])
                return proposed[len(text) :]
    return [-1] * PROPOSED


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_ngrams_continue_the_latest_longest_match(text):
    padded = np.pad(text, (0, 13 - len(text)), constant_values=1)
    proposed = jax.jit(propose_ngrams)(jnp.asarray(padded[None]), jnp.array([len(text)]))
    assert proposed[0].tolist() == plain_ngrams(text)
