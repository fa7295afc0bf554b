"""Decoding of windows equals openai-whisper's, token for token, in float32.

avg_logprob is allowed 1e-3, as is every probability: sums over some thirty tokens of float32 log-probabilities that two
implementations round differently were seen to differ by up to 1e-5.
"""

import functools
from collections.abc import Callable, Iterable

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import whisper

from tests.small import quick_compilation  # noqa: F401
from whisper_nnx import DecodingOptions, decode, detect_language
from whisper_nnx.decoding.rules import RepetitionRule

pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file.*tiktoken:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning"),  # numpy.argsort of a torch tensor
]

OPTIONS = {
    "greedy, language detected": {},
    "greedy on more windows": {},
    "beam 5, patience 2": {"language": "en", "beam_size": 5, "patience": 2.0},
    "beam 3, patience below 1": {"language": "en", "beam_size": 3, "patience": 0.5},
    "translate": {"language": "de", "task": "translate"},
    "without timestamps": {"language": "fr", "without_timestamps": True},
    "prompt": {"language": "en", "prompt": "one two three four"},
    "prompt of ids beyond half the context": {"language": "en", "prompt": list(range(1000, 1300))},
    "prefix": {"language": "en", "prefix": "one two", "without_timestamps": True},
    "prefix shortened by sample_len": {
        "language": "en",
        "prefix": "one two three four five six",
        "sample_len": 220,
        "without_timestamps": True,
    },
    "suppressed tokens": {"language": "en", "suppress_tokens": "-1,530,732"},
    "no limits at the start": {"language": "en", "max_initial_timestamp": None, "suppress_blank": False},
    "few tokens, beams unfinished": {"language": "en", "sample_len": 7, "beam_size": 5, "patience": 2.0},
}

ON_MANY = ("greedy on more windows",)
SLOW = (
    *ON_MANY,
    "beam 5, patience 2",
    "beam 3, patience below 1",
    "few tokens, beams unfinished",
    "translate",
    "prompt",
)


@pytest.fixture(scope="session")
def windows(recordings) -> Callable[[Iterable[int]], torch.Tensor]:
    """Makes windows of the first 30 s of some recordings [B,M,T], cut as the reference's transcribe() cuts them."""
    sounds = list(recordings.values())
    window = functools.cache(lambda number: whisper.log_mel_spectrogram(sounds[number], padding=480_000)[:, :3000])
    return lambda numbers: torch.stack([*map(window, numbers)])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in OPTIONS]
)
def test_a_batch_decodes_to_the_tokens_of_openai_whisper(name, windows, model, reference):
    options = OPTIONS[name]
    windows = windows(range(0, 17, 4) if name in ON_MANY else (8, 12))  # the reference takes minutes for all
    ours = decode(model, windows.numpy(), DecodingOptions(**options))
    for window, result in zip(windows, ours, strict=True):
        expected = whisper.decode(reference, window, whisper.DecodingOptions(fp16=False, **options))
        assert list(result.tokens) == expected.tokens
        assert result.text == expected.text
        assert result.language == expected.language
        assert result.avg_logprob == pytest.approx(expected.avg_logprob, abs=1e-3)
        assert result.no_speech_prob == pytest.approx(expected.no_speech_prob, abs=1e-3)
        assert result.compression_ratio == expected.compression_ratio


def test_detected_languages_equal_those_of_openai_whisper(windows, model, reference):
    some = windows((0, 6, 12))
    ids, probs = detect_language(model, some.numpy())
    expected_ids, expected = whisper.detect_language(reference, some)
    assert ids == expected_ids.tolist()
    for ours, theirs in zip(probs, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_the_suppressed_tokens_are_those_that_the_checkpoint_lists(model, digits):
    import json

    listed = json.loads((digits / "generation_config.json").read_text())["suppress_tokens"]
    assert sorted(expected_suppressed(model)) == sorted(listed)


@pytest.mark.parametrize(("penalty", "ngram"), [(1.3, 0), (0.8, 0), (1.0, 1), (1.0, 2), (1.0, 3), (1.2, 2)])
def test_limits_on_repetition_equal_those_of_transformers(model, penalty, ngram):
    """On text; timestamps, of which transformers knows nothing, are left alone here."""
    from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

    special, random = model.tokenizer.special, np.random.default_rng(0)
    sampled = np.concatenate(
        [random.integers(300, 304, (4, 30)), random.integers(special.timestamp_begin, 51000, (4, 9))], 1
    )
    random.permuted(sampled, axis=1, out=sampled)
    logits = random.normal(0, 3, (4, special.timestamp_end + 1)).astype(np.float32)
    limits = {"penalty": [penalty] * 4, "ngram": [ngram] * 4, "repeats": [None] * 4}
    ours = RepetitionRule.from_prefixes(sampled, special, size=448, **limits).apply(jnp.asarray(logits))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(sampled), torch.tensor(logits))
    if ngram:
        expected = NoRepeatNGramLogitsProcessor(ngram)(torch.tensor(sampled), expected)
    text = special.eot
    np.testing.assert_allclose(ours[:, :text], expected[:, :text], rtol=1e-6)
    np.testing.assert_array_equal(ours[:, text:], logits[:, text:])
    assert (np.asarray(ours) != logits).any()


@pytest.mark.slow
def test_a_hallucination_ends_within_tens_of_tokens_in_a_batch_as_alone(model, windows, recordings):
    """It would not end by itself, since the end of text is suppressed."""
    mel = windows([list(recordings).index(name) for name in ("noise_only_30s", "jfk", "silence_12s")]).numpy()
    options = DecodingOptions(language="en", suppress_tokens=(-1, model.tokenizer.special.eot), max_repeats=4)
    noise, speech, silence = decode(model, mel, options)
    assert max(len(noise.tokens), len(silence.tokens)) < 20
    assert len(speech.tokens) < 100
    for row, result in enumerate((noise, speech, silence)):
        assert result.looped
        assert decode(model, mel[row], options).tokens == result.tokens


def expected_suppressed(model) -> list[int]:
    """What the default of suppress_tokens, -1, stands for."""
    special = model.tokenizer.special
    tasks = (special.transcribe, special.translate, special.sot, special.sot_prev, special.sot_lm, special.no_speech)
    return [*model.tokenizer.non_speech_tokens, *tasks]
