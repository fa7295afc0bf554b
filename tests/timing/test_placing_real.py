"""Times on real speech: within the recording, in order, and nothing empty, in every mode."""

from itertools import pairwise

import numpy as np
import pytest

from whisper_nnx import load_audio, load_model, transcribe

SECOND = 16_000


def assert_in_order(result, duration_s):
    spans = [(segment["start"], segment["end"]) for segment in result["segments"]]
    assert all(0 <= start < end <= duration_s for start, end in spans)
    assert all(before[1] <= after[0] for before, after in pairwise(spans))
    assert all(segment["text"].strip() for segment in result["segments"])
    words = [word for segment in result["segments"] for word in segment.get("words", [])]
    times = [0.0, *(word[key] for word in words for key in ("start", "end")), duration_s]
    assert times == sorted(times)
    assert all(word["word"].strip() for word in words)


@pytest.fixture(scope="module")
def model(real_tiny_en):
    return load_model(str(real_tiny_en))


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"word_timestamps": True, "vad_filter": True, "batch_size": 4},
        {"clip_timestamps": "0,3.1,4,8.05"},
    ],
    ids=lambda options: ",".join(options),
)
def test_segments_and_words_lie_in_the_recording(model, real_speech, options):
    sonnet = load_audio(real_speech("en_sonnet_53s.mp3"))
    for samples in (sonnet[33 * SECOND :][: round(10.06 * SECOND)], load_audio(real_speech("en_meeting_6s.wav"))):
        result = transcribe(model, samples, temperature=0.0, **options)
        assert result["segments"]
        assert_in_order(result, len(samples) / SECOND)


@pytest.mark.real
def test_text_that_a_model_times_beyond_the_end_is_kept(model, real_speech):
    """tiny.en ends its second segment at 14.36 s."""
    samples = load_audio(real_speech("en_sonnet_53s.mp3"))[33 * SECOND :][: round(10.06 * SECOND)]
    result = transcribe(model, samples, temperature=0.0)
    assert result["text"].endswith("my old excuse, proving his beep.")
    assert result["segments"][-1]["end"] == 10.06
    assert np.isclose(result["segments"][-1]["start"], 7.36)
    assert_in_order(result, len(samples) / SECOND)
