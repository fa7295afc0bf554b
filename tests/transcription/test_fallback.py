"""The temperature ladder: what fails, and what is tried next."""

import math
from typing import Any

import pytest

from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.transcription.attempts import DecodingResult
from whisper_nnx.transcription.fallback import FallbackOptions, last_entropy

GOOD: dict[str, Any] = {"avg_logprob": -0.3, "compression_ratio": 1.5, "no_speech_prob": 0.1}
NAN = float("nan")


def result(**changes: Any) -> DecodingResult:
    return DecodingResult(audio_features=None, language="de", **{**GOOD, **changes})


@pytest.mark.parametrize(
    ("options", "changes", "again"),
    [
        ({}, {}, False),
        ({}, {"avg_logprob": -1.1}, True),
        ({}, {"avg_logprob": -1.0}, False),
        ({"logprob_threshold": None}, {"avg_logprob": -9.0}, False),
        ({"logprob_threshold": -0.2}, {}, True),
        ({}, {"compression_ratio": 2.5}, True),
        ({}, {"compression_ratio": 2.4}, False),
        ({}, {"looped": True}, True),
        ({"compression_ratio_threshold": None, "logprob_threshold": None}, {"looped": True}, True),
        ({}, {"looped": True, "no_speech_prob": 0.9, "avg_logprob": -1.1}, False),
        ({"compression_ratio_threshold": None}, {"compression_ratio": 9.0}, False),
        ({}, {"no_speech_prob": 0.9}, False),
        ({}, {"no_speech_prob": 0.9, "compression_ratio": 2.5}, True),
        ({}, {"no_speech_prob": 0.9, "avg_logprob": -1.1}, False),
        ({}, {"no_speech_prob": 0.9, "avg_logprob": -1.1, "compression_ratio": 2.5}, False),
        ({}, {"no_speech_prob": 0.6, "avg_logprob": -1.1}, True),
        ({}, {"no_speech_prob": NAN, "avg_logprob": -1.1}, True),
        ({"no_speech_threshold": None}, {"no_speech_prob": 0.9, "avg_logprob": -1.1}, True),
        ({"logprob_threshold": None}, {"no_speech_prob": 0.9, "compression_ratio": 2.5}, True),
        ({}, {"tokens": (1,) * 40}, False),
        ({"entropy_threshold": 2.4}, {"tokens": (1,) * 40}, True),
        ({"entropy_threshold": 2.4}, {"tokens": (1,) * 32}, False),
        ({"entropy_threshold": 2.4}, {"tokens": tuple(range(40))}, False),
        ({"entropy_threshold": 2.4}, {"tokens": (*range(40), *(1, 2, 3) * 12)}, True),
    ],
)
def test_a_repeating_or_improbable_window_is_tried_again_unless_nobody_speaks(options, changes, again):
    assert (FallbackOptions(**options).failed_threshold(result(**changes)) is not None) is again


def test_a_window_that_is_tried_again_names_the_threshold_that_it_failed():
    options = FallbackOptions()
    assert options.failed_threshold(result(compression_ratio=2.5, avg_logprob=-1.1)) == "compression_ratio"
    assert options.failed_threshold(result(avg_logprob=-1.1)) == "logprob"
    strict = FallbackOptions(entropy_threshold=2.4)
    assert strict.failed_threshold(result(tokens=(1, 2) * 20)) == "entropy"


def test_the_entropy_is_that_of_the_last_32_tokens():
    assert last_entropy((*range(100, 140), *(1, 2) * 16)) == pytest.approx(math.log(2))
    assert last_entropy(tuple(range(33))) == pytest.approx(math.log(32))
    assert last_entropy(tuple(range(32))) == math.inf


@pytest.mark.parametrize(
    ("options", "changes", "silent"),
    [
        ({}, {"no_speech_prob": 0.9, "avg_logprob": -1.1}, True),
        ({}, {"no_speech_prob": 0.9, "avg_logprob": -1.0}, True),
        ({}, {"no_speech_prob": 0.9, "avg_logprob": -0.9}, False),
        ({}, {"no_speech_prob": 0.6, "avg_logprob": -1.1}, False),
        ({}, {"no_speech_prob": NAN, "avg_logprob": -1.1}, False),
        ({"logprob_threshold": None}, {"no_speech_prob": 0.9}, True),
        ({"no_speech_threshold": None}, {"no_speech_prob": 0.9, "avg_logprob": -1.1}, False),
        ({"no_speech_threshold": None, "logprob_threshold": None}, {"no_speech_prob": 0.9}, False),
    ],
)
def test_a_window_is_silent_if_no_speech_is_probable_and_its_text_is_not(options, changes, silent):
    assert FallbackOptions(**options).is_silence(result(**changes)) is silent


def test_beams_are_for_temperature_zero_and_samples_for_those_above():
    ladder = FallbackOptions(beam_size=5, patience=2.0, best_of=3)
    asked = DecodingOptions(language="de", prompt=(1, 2))
    cold, warm = ladder.options_at(0.0, asked), ladder.options_at(0.4, asked)
    assert (cold.temperature, cold.beam_size, cold.patience, cold.best_of) == (0.0, 5, 2.0, None)
    assert (warm.temperature, warm.beam_size, warm.patience, warm.best_of) == (0.4, None, None, 3)
    assert cold.prompt == warm.prompt == (1, 2)


def test_each_temperature_gives_as_many_candidates_as_it_has_up_to_n_best():
    ladder = FallbackOptions(beam_size=5, n_best=3)
    assert [ladder.options_at(t, DecodingOptions()).n_best for t in (0.0, 0.4)] == [3, 1]
    ladder = FallbackOptions(beam_size=2, best_of=7, n_best=3)
    assert [ladder.options_at(t, DecodingOptions()).n_best for t in (0.0, 0.4)] == [2, 3]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"temperatures": ()}, "no temperature"),
        ({"temperatures": (0.0, -0.2)}, "temperature=-0.2"),
        ({"beam_size": 0}, "beam_size=0"),
        ({"patience": 2.0}, "patience=2.0"),
        ({"best_of": 0}, "best_of=0"),
        ({"n_best": 0}, "n_best=0"),
        ({"n_best": "all"}, "n_best='all'"),
        ({"n_best": 6, "beam_size": 5}, "n_best=6.*got 5 and None"),
        ({"n_best": 5, "beam_size": 5, "temperatures": (0.2,)}, "n_best=5"),
    ],
)
def test_a_ladder_that_cannot_be_climbed_is_refused_before_work_begins(options, told):
    with pytest.raises(ValueError, match=told):
        FallbackOptions(**options)
