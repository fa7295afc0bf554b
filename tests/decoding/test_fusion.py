"""A language model beside the decoder: against plain Python, and decoding with it."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.oracle import ROWS, PlainDecoder, is_text
from tests.small import quick_compilation, small_config, small_mel, small_model, small_tokenizer  # noqa: F401
from whisper_nnx import transcribe
from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.transcription.windows import decode, decode_windows, encode_windows

TOKENIZER = small_tokenizer()
SPECIAL, V = TOKENIZER.special, small_config().vocab_size
START = [SPECIAL.sot, dict(SPECIAL.languages)["de"], SPECIAL.transcribe]
TABLE = np.random.default_rng(0).normal(0, 4, (V + 1, V)).astype(np.float32)  # the last row: of the first token
TEXT = np.array([is_text(token, SPECIAL) for token in range(V)])


def bigrams(tokens):
    return jnp.asarray(TABLE)[tokens[:, -1]]


GERMAN = DecodingOptions(language="de")
FUSED = replace(GERMAN, lm=bigrams, lm_weight=0.7)


@pytest.fixture(scope="module")
def model():
    return small_model(decoder_layers=1)


@pytest.fixture(scope="module")
def mel():
    return small_mel(ROWS)


@pytest.fixture(scope="module")
def encoded(model, mel):
    return encode_windows(model, mel)


def softmax(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def plain_greedy(decoder: PlainDecoder, weight: float) -> tuple[tuple[int, ...], float]:
    tokens, total = [], 0.0
    while len(tokens) < decoder.limit:
        logprobs = decoder.logprobs(tokens)
        earlier = [token for token in tokens if is_text(token, SPECIAL)]
        scores = np.full(V, np.nan)
        scores[TEXT] = np.log(softmax(TABLE[earlier[-1] if earlier else -1][TEXT]))
        own = logprobs[TEXT] if (logprobs[TEXT] > -np.inf).any() else np.zeros(TEXT.sum())
        scores[~TEXT] = (softmax(own) * scores[TEXT]).sum()
        best = int(np.argmax(logprobs + weight * scores))
        total += logprobs[best]
        if best == SPECIAL.eot:
            break
        tokens.append(best)
    return tuple(tokens), total


def test_greedy_text_equals_the_plain_decoder(model, mel):
    results = decode(model, mel, FUSED)
    for result, window in zip(results, mel, strict=True):
        tokens, total = plain_greedy(PlainDecoder(model, window, FUSED, START), FUSED.lm_weight)
        assert result.tokens == tokens
        np.testing.assert_allclose(result.avg_logprob, total / (len(tokens) + 1), atol=1e-4)
    assert [r.tokens for r in results] != [r.tokens for r in decode(model, mel, GERMAN)]


def lm_logprob(tokens) -> float:
    text = [token for token in tokens if is_text(token, SPECIAL)]
    pairs = zip([-1, *text], text, strict=False)
    return float(np.mean([np.log(softmax(TABLE[a][TEXT]))[np.cumsum(TEXT)[b] - 1] for a, b in pairs]))


def test_beams_prefer_text_that_the_language_model_finds_probable(model, encoded, compilations):
    def run(*options):
        return decode_windows(model, encoded, options, range(ROWS))

    beams = replace(GERMAN, beam_size=3, without_timestamps=True)
    free = run(*[beams] * ROWS)
    fused = run(*[replace(beams, lm=bigrams, lm_weight=1.0)] * ROWS)
    assert np.mean([lm_logprob(r.tokens) for r in fused]) > np.mean([lm_logprob(r.tokens) for r in free]) + 1
    compilations.clear()
    mixed = run(beams, replace(beams, lm=bigrams, lm_weight=1.0), replace(beams, lm=bigrams, lm_weight=0.0), None)
    assert compilations == []
    assert [r.tokens for r in mixed[:3]] == [free[0].tokens, fused[1].tokens, free[2].tokens]


def test_a_language_model_of_another_vocabulary_is_refused(model, mel):
    with pytest.raises(ValueError, match=rf"lm returns .* must return logits \[2,{V}\]"):
        decode(model, mel, GERMAN, lm=lambda tokens: bigrams(tokens)[:, :-1])


@jax.tree_util.register_dataclass
@dataclass
class Bigrams:
    """A language model as a pytree, which has no hash."""

    table: jax.Array

    def __call__(self, tokens):
        return self.table[tokens[:, -1]]


class Embedded(nnx.Module):
    def __init__(self, table):
        self.table = nnx.Param(jnp.asarray(table))

    def __call__(self, tokens):
        return self.table[...][tokens[:, -1]]


def looked_up(table, tokens):
    return table[tokens[:, -1]]


@pytest.mark.parametrize("make", [Bigrams, partial(jax.tree_util.Partial, looked_up), Embedded])
def test_the_arrays_of_a_language_model_are_inputs_of_the_program(model, encoded, compilations, make):
    def run(lm):
        return [r.tokens for r in decode_windows(model, encoded, [replace(FUSED, lm=lm)] * ROWS, range(ROWS))]

    other = jnp.asarray(TABLE[:, ::-1])
    expected = [run(bigrams), run(lambda tokens: other[tokens[:, -1]])]
    found = [run(make(jnp.asarray(TABLE)))]
    compilations.clear()
    found.append(run(make(other)))
    assert compilations == []
    assert found == expected
    assert expected[0] != expected[1]


def test_recordings_with_language_models_of_their_own(model):
    """Rows of one loop share a language model; others are decoded apart."""
    noise = np.random.default_rng(0).normal(0, 0.1, (4, 16_000)).astype(np.float32)
    models = [Bigrams(jnp.asarray(TABLE)), Bigrams(jnp.asarray(TABLE[:, ::-1])), None, bigrams]
    options = {"language": "de", "temperature": 0.0, "no_speech_threshold": None, "lm_weight": 3.0}
    sources = [{"audio": audio, "lm": lm} for audio, lm in zip(noise, models, strict=True)]
    together = [one["text"] for one in transcribe(model, sources, batch_size=3, **options)]
    assert together == [transcribe(model, source, **options)["text"] for source in sources]
    assert len({*together[:3]}) == 3
