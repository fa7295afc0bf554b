"""The token loop's cache where attention reads only what is written: what rows still read moves to its front."""

from dataclasses import replace

import numpy as np
import pytest

from tests.small import quick_compilation, small_model  # noqa: F401
from whisper_nnx import ops, transcribe
from whisper_nnx.transcription import row_decoder

RANDOM = np.random.default_rng(0)
NOISES = [RANDOM.normal(0, 0.1, 16_000).astype(np.float32) for _ in range(24)]


@pytest.mark.parametrize("beam_size", [None, 3])
def test_texts_are_the_same_and_less_is_read(monkeypatch, beam_size):
    check_moving_up(monkeypatch, beam_size=beam_size)


def check_moving_up(monkeypatch, **options):
    model = small_model(max_target_positions=192, end_bias=3.5, seed=2)
    sources = [{"audio": noise, "language": "en"} for noise in NOISES]
    for source in sources[10::4]:  # prompts that are longer than what others have written
        source["initial_prompt"] = "one two " * 12
    options |= {"batch_size": 4, "temperature": 0.0, "condition_on_previous_text": False, "without_timestamps": True}
    options |= dict.fromkeys(("no_speech_threshold", "compression_ratio_threshold", "logprob_threshold"))
    ends, moved = [], []
    advance, move_up = row_decoder.advance, row_decoder.move_up

    def watched(*args):
        rows, *found = advance(*args)
        ends.append(int(rows.cache.end[0]))
        return rows, *found

    def moving(rows, going, least):
        moved.append(int(rows.cache.end[0]))
        return move_up(rows, going, least)

    monkeypatch.setattr(row_decoder, "advance", watched)
    monkeypatch.setattr(row_decoder, "move_up", moving)
    expected = [result["tokens"] for result in _segments(model, sources, options)]
    usual, ends[:] = max(ends), []
    assert not moved
    with ops.using(replace(ops.current(), reads_written=lambda dtype: True)):
        found = [result["tokens"] for result in _segments(model, sources, options)]
    assert found == expected
    assert max(ends) < usual
    assert max(moved) > 32  # in the middle of the work


def _segments(model, sources, options):
    return [segment for result in transcribe(model, sources, **options) for segment in result["segments"]]
