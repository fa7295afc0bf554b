"""Recordings decoded together say what each says alone: on the trained checkpoint, with all that may differ by row.

Less of it, in less time: test_batch.py (beams) and serving/test_scheduler.py (greedy, beams, words).
"""

import numpy as np
import pytest

from tests.small import quick_compilation  # noqa: F401
from whisper_nnx import load_audio, load_model, transcribe
from whisper_nnx.transcription.stream import iter_transcripts

# Words, thresholds that send some windows up the ladder, samples on the way.
OPTIONS = {"word_timestamps": True, "temperature": (0.0, 0.6), "logprob_threshold": -0.8, "best_of": 2}
LONGEST_S = 35
RECORDINGS = ("de_40s.flac", "en_8k_35s.wav", "en_mixed_75s.flac", "en_noisy_40s.flac", "en_short_3s.flac")
RECORDINGS += ("es_40s.flac", "fr_40s.flac", "noise_only_30s.flac", "silence_12s.flac")


@pytest.fixture(scope="module")
def model(digits):
    return load_model(str(digits))


@pytest.fixture(scope="module")
def sources(shared) -> list[dict]:
    """Recordings, the longest cut; some of their languages given, some tasks others, some prompts."""
    files = [shared / "audio" / name for name in RECORDINGS]
    own = [{}, {"task": "translate"}, {"initial_prompt": "zero one two"}, {"language": "en"}, {"hotwords": "nine"}]
    samples = [load_audio(file)[: LONGEST_S * 16_000] for file in files]
    return [{"audio": one, **own[i % len(own)]} for i, one in enumerate(samples)]


@pytest.fixture(scope="module")
def alone(model, sources) -> list[dict]:
    return [transcribe(model, source, **OPTIONS) for source in sources]


def plain(transcript: dict) -> tuple:
    """All of a transcript that is not a floating-point mean."""
    segments = [
        (s["id"], s["seek"], s["start"], s["end"], s["text"], s["tokens"], s["temperature"], s.get("language"))
        for s in transcript["segments"]
    ]
    words = [(word["word"], word["start"], word["end"]) for s in transcript["segments"] for word in s.get("words", [])]
    return transcript["text"], transcript["language"], segments, words


pytestmark = pytest.mark.filterwarnings("ignore:.*digital silence", "ignore:word times of a translation")


@pytest.mark.slow
def test_every_transcript_is_the_same_in_any_company(model, sources, alone):
    together = transcribe(model, sources, batch_size=8, **OPTIONS)
    for number, (ours, expected) in enumerate(zip(together, alone, strict=True)):
        assert plain(ours) == plain(expected), number
        for segment, other in zip(ours["segments"], expected["segments"], strict=True):
            np.testing.assert_allclose(segment["avg_logprob"], other["avg_logprob"], atol=1e-4)


@pytest.mark.slow
def test_the_recordings_are_as_different_as_they_should_be(alone):
    assert {"en", "de", "es", "fr"} <= {transcript["language"] for transcript in alone}
    assert {0.0, 0.6} == {s["temperature"] for transcript in alone for s in transcript["segments"]}


@pytest.mark.slow
def test_pieces_of_a_recording_are_the_same_in_any_company(model, shared):
    audio = load_audio(shared / "audio" / "en_mixed_75s.flac")
    options = {
        "clip_timestamps": "0,9,9,21,22.5,40,41,60,60,75",
        "independent_clips": True,
        "multilingual": True,
        "token_timestamps": True,
        "refine_word_times": True,
        **OPTIONS,
    }
    one_by_one = transcribe(model, audio, **options)
    together = transcribe(model, audio, batch_size=4, **options)
    assert plain(together) == plain(one_by_one)
    starts = [segment["start"] for segment in together["segments"]]
    assert starts == sorted(starts)
    assert all("language" in segment and "token_details" in segment for segment in together["segments"])
    clips = [transcribe(model, audio, **{**options, "clip_timestamps": clip}) for clip in ("0,9", "41,60")]
    texts = [segment["text"] for segment in together["segments"]]
    for clip in clips:
        said = [segment["text"] for segment in clip["segments"]]
        assert any(texts[i : i + len(said)] == said for i in range(len(texts)))


def test_a_batch_of_one_recording_says_that_it_is_none(model, shared):
    with pytest.warns(UserWarning, match="batch_size=4 has no effect on one recording.*vad_filter=True"):
        transcribe(model, shared / "audio" / "en_short_3s.flac", batch_size=4, language="en", temperature=0.0)


def test_transcripts_come_as_soon_as_they_are_done(model, shared):
    audio = load_audio(shared / "audio" / "en_mixed_75s.flac")[: 50 * 16_000]
    sources = [audio, "missing.wav", audio[:32_000], {"array": audio[:48_000], "sampling_rate": 16_000, "path": None}]
    order = [number for number, _ in iter_transcripts(model, sources, batch_size=3, temperature=0.0, language="en")]
    assert sorted(order) == [0, 1, 2, 3]
    assert order[-1] == 0


@pytest.mark.parametrize("batch_size", [1, 2])
def test_lines_of_several_recordings_say_whose_they_are(model, shared, capsys, batch_size):
    path = shared / "audio" / "en_short_3s.flac"
    options = {"temperature": 0.0, "language": "en", "verbose": True}
    transcribe(model, [str(path), load_audio(path)], batch_size=batch_size, **options)
    line = "[00:00.000 --> 00:01.680]  Six zero nine."
    assert sorted(capsys.readouterr().out.splitlines()) == sorted([f"{path}: {line}", f"1: {line}"])
    transcribe(model, [str(path)], **options)
    assert capsys.readouterr().out == f"{line}\n"


def test_a_recording_that_lacks_its_audio_is_refused(model):
    with pytest.raises(ValueError, match="'language' lacks 'audio'"):
        transcribe(model, {"language": "en"})
    [error] = transcribe(model, [{"language": "en"}])
    assert isinstance(error, ValueError)
    assert "'language' lacks 'audio'" in str(error)
