"""`hallucination="calm"`: no text without speech, and the same text with speech."""

import json
import warnings
from dataclasses import replace
from importlib.resources import files
from typing import Any

import numpy as np
import pytest

from tests.small import quick_compilation as quick_compilation
from tests.small import small_model
from whisper_nnx import load_audio, load_model, transcribe
from whisper_nnx.audio.loading import SAMPLE_RATE
from whisper_nnx.transcription import calm, opening
from whisper_nnx.transcription.calm import Calm, plain
from whisper_nnx.transcription.options import TranscribeOptions

SPEECH = Calm([(2.0, 4.0), (10.0, 11.0)])


def segment(start: float, end: float, text: str, no_speech_prob: float = 0.1) -> Any:
    return {"start": start, "end": end, "text": text, "no_speech_prob": no_speech_prob}


@pytest.fixture(autouse=True)
def phrases(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"en": frozenset({"thank you"})}
    monkeypatch.setattr(calm, "invented_phrases", lambda language: known.get(language, frozenset()))


@pytest.mark.parametrize(
    ("one", "kept"),
    [
        (segment(2.5, 3.5, " A word."), True),
        (segment(5.0, 9.0, " A word."), False),  # no speech in it
        (segment(5.0, 10.1, " A word."), True),
        (segment(2.0, 4.0, " Thank you."), True),
        (segment(2.0, 4.0, " Thank you! Thank you.", 0.5), False),  # improbable that anybody speaks
        (segment(3.5, 9.0, " THANK YOU"), False),  # mostly without speech
        (segment(3.5, 9.0, " Thank you all."), True),
    ],
)
def test_text_without_speech_and_doubtful_phrases_are_discarded(one: Any, kept: bool) -> None:
    assert SPEECH.kept([one], "en") == ([one] if kept else [])
    if one["text"].lower().startswith(" thank you"):
        assert SPEECH.kept([one], "xx") == [one]  # a language of which no phrases are known


def test_phrases_are_those_of_the_language_of_the_text() -> None:
    one = segment(3.5, 9.0, " Thank you.")
    assert SPEECH.kept([one], "de") == [one]
    assert SPEECH.kept([one | {"language": "en"}], "de") == []
    assert replace(SPEECH, is_translated=True).kept([one | {"language": "de"}], "de") == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Thank you.", "thank you"),
        ("Vielen  DANK – Vielen Dank!", "vielen dank"),
        ("♪♪", ""),
        ("ご視聴", "ご視聴"),
        ("a b a", "a b a"),
    ],
)
def test_phrases_are_compared_without_case_marks_and_repetition(text: str, expected: str) -> None:
    assert plain(text) == expected


def test_the_list_of_phrases_is_as_they_are_compared() -> None:
    stored = json.loads((files("whisper_nnx") / "assets" / "invented_phrases.json").read_text(encoding="utf-8"))
    assert {"en", "de", "es"} <= stored["phrases"].keys()
    for code, own in stored["phrases"].items():
        assert own == sorted(set(own)), code
        assert all(phrase == plain(phrase) != "" for phrase in own), code


def noise(seconds: float) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, round(seconds * SAMPLE_RATE)).astype(np.float32)


def test_windows_without_speech_are_not_decoded_alone_and_in_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "speech_spans", lambda samples, options: [(2.2, 3.1)] if len(samples) > 50_000 else [])
    model, options = small_model(), {"language": "en", "temperature": 0.0, "no_speech_threshold": None}
    recordings = [noise(5.0), noise(2.5)]
    plainly = transcribe(model, recordings, **options)
    alone = [transcribe(model, audio, hallucination="calm", **options) for audio in recordings]
    assert transcribe(model, recordings, hallucination="calm", batch_size=2, **options) == alone
    assert len({s["seek"] for s in plainly[0]["segments"]}) >= 5
    assert alone[1]["segments"] == []
    assert alone[0]["segments"]
    assert all(s["end"] > 2.2 and s["start"] < 3.1 for s in alone[0]["segments"])


def test_a_discarded_segment_is_no_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "speech_spans", lambda samples, options: [(0.0, 0.001), (1.0, 3.0)])
    prompts = []
    model = small_model()
    attempt = opening.Recording.draft

    def draft(self: Any, window: Any, found: Any) -> Any:
        prompts.append(window.prompt)
        return attempt(self, window, found)

    monkeypatch.setattr(opening.Recording, "draft", draft)
    monkeypatch.setattr(Calm, "kept", lambda self, segments, language: [])
    options: dict[str, Any] = {"language": "en", "temperature": 0.0, "no_speech_threshold": None}
    assert transcribe(model, noise(3.0), hallucination="calm", **options)["text"] == ""
    assert len(prompts) >= 3
    assert set(prompts) == {()}


def test_the_language_is_that_of_the_first_window_with_speech(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "speech_spans", lambda samples, options: [(2.2, 3.1)])
    seen: list[tuple[int, int]] = []
    window = opening.RecordingMel.window

    def recorded(self: Any, *place: int) -> Any:
        seen.append(place)
        return window(self, *place)

    monkeypatch.setattr(opening.RecordingMel, "window", recorded)
    result = transcribe(small_model(), noise(5.0), hallucination="calm", temperature=0.0, no_speech_threshold=None)
    assert result["language"]
    assert seen[0] == (200, 100)


def test_calm_ends_loops_unless_told_otherwise() -> None:
    options = TranscribeOptions.of(hallucination="calm")
    assert options.window_options == replace(options.decoding, max_repeats=4)
    assert TranscribeOptions.of(options, max_repeats=9).window_options.max_repeats == 9
    assert TranscribeOptions.of(options, hallucination=None).window_options.max_repeats is None
    bound = TranscribeOptions.of(hallucination="calm", choices=["no no no no no"])
    assert bound.window_options.max_repeats is None  # nothing but the whole text
    with pytest.raises(ValueError, match="hallucination='quiet' must be 'calm', or None"):
        TranscribeOptions.of(hallucination="quiet")


@pytest.mark.real
def test_no_word_without_speech_and_the_same_words_with_it(real_tiny_en, real_speech) -> None:
    from benchmarks.nonspeech_sounds import speechless

    model = load_model(real_tiny_en)
    options: dict[str, Any] = {"temperature": 0.0, "condition_on_previous_text": False}
    for name, sound in speechless(4).items():
        with warnings.catch_warnings(action="ignore"):  # of digital silence
            assert transcribe(model, sound, hallucination="calm", **options)["text"] == "", name
    speech = load_audio(real_speech("en_lj_8s.wav"))
    spoken = transcribe(model, speech, **options)["text"]
    assert transcribe(model, speech, hallucination="calm", **options)["text"] == spoken
    invented = np.concatenate([speech, np.zeros(40 * SAMPLE_RATE, np.float32)])
    assert plain(transcribe(model, invented, hallucination="calm", **options)["text"]) == plain(spoken)
