"""The temperature ladder: what fails, what is tried next, and that nothing else is decoded again."""

from typing import Any

import jax.numpy as jnp
import pytest

from whisper_nnx import fallback
from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.fallback import FallbackOptions, decode_with_fallback
from whisper_nnx.windows import DecodingResult, EncodedWindows

GOOD: dict[str, Any] = {"avg_logprob": -0.3, "compression_ratio": 1.5, "no_speech_prob": 0.1}
NAN = float("nan")


def result(**changes: float) -> DecodingResult:
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
        ({"compression_ratio_threshold": None}, {"compression_ratio": 9.0}, False),
        ({}, {"no_speech_prob": 0.9}, False),
        ({}, {"no_speech_prob": 0.9, "compression_ratio": 2.5}, True),
        ({}, {"no_speech_prob": 0.9, "avg_logprob": -1.1}, False),
        ({}, {"no_speech_prob": 0.9, "avg_logprob": -1.1, "compression_ratio": 2.5}, False),
        ({}, {"no_speech_prob": 0.6, "avg_logprob": -1.1}, True),
        ({}, {"no_speech_prob": NAN, "avg_logprob": -1.1}, True),
        ({"no_speech_threshold": None}, {"no_speech_prob": 0.9, "avg_logprob": -1.1}, True),
        ({"logprob_threshold": None}, {"no_speech_prob": 0.9, "compression_ratio": 2.5}, True),
    ],
)
def test_a_repeating_or_improbable_window_is_tried_again_unless_nobody_speaks(options, changes, again):
    assert FallbackOptions(**options).needs_another_try(result(**changes)) is again


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


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"temperatures": ()}, "no temperature"),
        ({"temperatures": (0.0, -0.2)}, "temperature=-0.2"),
        ({"beam_size": 0}, "beam_size=0"),
        ({"patience": 2.0}, "patience=2.0"),
        ({"best_of": 0}, "best_of=0"),
    ],
)
def test_a_ladder_that_cannot_be_climbed_is_refused_before_work_begins(options, told):
    with pytest.raises(ValueError, match=told):
        FallbackOptions(**options)


class Ladder:
    """Stands in for the decoding of windows: window `row` passes at its `passes[row]`-th try."""

    def __init__(self, passes: list[int], monkeypatch: pytest.MonkeyPatch):
        self.passes, self.tries = passes, [0] * len(passes)
        self.calls: list[tuple[list[int], list[DecodingOptions], list[int]]] = []
        monkeypatch.setattr(fallback, "decode_windows", self.decode_windows)

    def decode_windows(self, model, encoded, options, seeds):
        rows = encoded.features[:, 0, 0].tolist()
        assert len(rows) == len(options) == len(seeds)
        self.calls.append((rows, list(options), list(seeds)))
        results = []
        for row, o in zip(rows, options, strict=True):
            self.tries[row] += 1
            logprob = -0.5 if self.tries[row] >= self.passes[row] else -2.0
            results.append(result(avg_logprob=logprob, temperature=o.temperature))
        return results

    def climb(self, ladder: FallbackOptions, seeds: list[int]) -> list[DecodingResult]:
        windows = EncodedWindows(jnp.arange(len(self.passes))[:, None, None], ())
        options = [DecodingOptions(language="de", prompt=(row,)) for row in range(len(self.passes))]
        return decode_with_fallback(None, windows, options, ladder, seeds)


LADDER = FallbackOptions(temperatures=(0.0, 0.4, 0.8))


def test_only_what_failed_is_decoded_again(monkeypatch):
    ladder = Ladder([2, 1, 3, 1], monkeypatch)
    results = ladder.climb(LADDER, [5, 6, 7, 8])
    assert [rows for rows, _, _ in ladder.calls] == [[0, 1, 2, 3], [0, 2], [2]]
    assert [r.temperature for r in results] == [0.4, 0.0, 0.8, 0.0]
    for rows, options, _ in ladder.calls:
        assert [o.prompt for o in options] == [(row,) for row in rows]


def test_windows_that_pass_at_once_are_decoded_once(monkeypatch):
    ladder = Ladder([1, 1], monkeypatch)
    ladder.climb(LADDER, [5, 6])
    assert len(ladder.calls) == 1


def test_the_last_try_stands_even_if_it_fails(monkeypatch):
    ladder = Ladder([9, 1], monkeypatch)
    failed, passed = ladder.climb(LADDER, [5, 6])
    assert (failed.temperature, failed.avg_logprob) == (0.8, -2.0)
    assert (passed.temperature, passed.avg_logprob) == (0.0, -0.5)
    assert len(ladder.calls) == 3


def test_seeds_differ_from_try_to_try_and_do_not_depend_on_the_other_windows(monkeypatch):
    crowded, alone = Ladder([3, 2, 3], monkeypatch), Ladder([3], monkeypatch)
    monkeypatch.setattr(fallback, "decode_windows", crowded.decode_windows)
    crowded.climb(LADDER, [5, 6, 7])
    monkeypatch.setattr(fallback, "decode_windows", alone.decode_windows)
    alone.climb(LADDER, [5])
    everything = [seed for _, _, seeds in crowded.calls for seed in seeds]
    assert len({*everything}) == len(everything) == 8
    assert [seeds[0] for _, _, seeds in crowded.calls] == [seed for _, _, (seed,) in alone.calls]
