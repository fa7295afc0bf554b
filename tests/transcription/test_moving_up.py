"""The token loop's cache where attention reads only what is written: what rows still read moves to its front."""

from dataclasses import replace

import pytest

from tests.small import quick_compilation  # noqa: F401
from whisper_nnx import load_audio, load_model, ops, transcribe
from whisper_nnx.transcription import row_decoder


@pytest.mark.parametrize("beam_size", [None, pytest.param(3, marks=pytest.mark.slow)])
def test_texts_are_the_same_and_less_is_read(digits, shared, monkeypatch, beam_size):
    model = load_model(digits)
    spoken = load_audio(shared / "audio/en_three_minutes.flac")
    sources = [{"audio": spoken[96_000 * n : 96_000 * n + 16_000 * (2 + n % 3)], "language": "en"} for n in range(24)]
    for source in sources[10::4]:  # prompts that are longer than what others have written
        source["initial_prompt"] = "one two three " * 20
    options = {"batch_size": 4, "beam_size": beam_size, "temperature": 0.0, "condition_on_previous_text": False}
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
