"""How a recording is opened: its language, its pieces, and the order of what the pieces say."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from tests.small import small_model
from whisper_nnx.transcription import opening
from whisper_nnx.transcription.opening import Opened, open_recording
from whisper_nnx.transcription.options import TranscribeOptions

SECOND = 16_000
WINDOW = 100  # the small model's window is a second


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def heard(monkeypatch) -> list[tuple[int, int]]:
    """The windows that were listened to for a language: German in the first second, English in the others."""
    places: list[tuple[int, int]] = []

    def window(start: int, n: int) -> np.ndarray:
        places.append((start, n))
        return np.array([start, n])

    def detect(_, place) -> list[dict[str, float]]:
        german = place[0, 0] < WINDOW
        return [
            {"en": 0.3 if german else 0.6, "de": 0.45 if german else 0.25, "es": 0.15, "fr": 0.1 if german else 0.0}
        ]

    def mel(samples, n_mels, n_frames, together) -> SimpleNamespace:
        return SimpleNamespace(content_frames=len(samples) // 160, window=window)

    monkeypatch.setattr(opening, "RecordingMel", mel)
    monkeypatch.setattr(opening, "open_audio", partial(opening.open_audio, encode=lambda model, place: place))
    monkeypatch.setattr(opening, "detect_languages", detect)
    return places


@pytest.fixture
def spoken(monkeypatch) -> list[tuple[float, float]]:
    """The stretches of speech, in s, that are found in whatever recording; to be filled."""
    spans: list[tuple[float, float]] = []
    monkeypatch.setattr(opening, "speech_spans", lambda samples, options: spans)
    monkeypatch.setattr(opening, "pack_spans", lambda spans: spans)
    return spans


def noise(seconds: float) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, round(seconds * SECOND)).astype(np.float32)


def opened(model, seconds: float = 5, **options) -> Opened:
    return open_recording(model, noise(seconds), TranscribeOptions.of(**options))


def pieces(it: Opened) -> list:
    return [live.recording.piece for live in it.lives]


# Languages.


def test_a_language_is_detected_from_the_first_window_which_is_then_decoded_as_it_is(model, heard):
    it = opened(model)
    assert (it.language, heard) == ("de", [(0, WINDOW)])
    assert list(it.lives[0].encoded) == [(0, WINDOW)]
    assert it.lives[0].recording.language == "de"


def test_a_given_language_is_not_detected(model, heard):
    assert (opened(model, language="French").language, heard) == ("fr", [])


def test_several_windows_vote_by_their_probabilities(model, heard):
    assert opened(model, language_detection_segments=2, language_detection_threshold=1.0).language == "en"
    assert heard == [(0, WINDOW), (WINDOW, WINDOW)]


def test_the_first_window_that_is_sure_decides(model, heard):
    assert opened(model, language_detection_segments=9, language_detection_threshold=0.4).language == "de"
    assert heard == [(0, WINDOW)]
    heard.clear()
    assert opened(model, language_detection_segments=9).language == "en"  # half the probability is sure
    assert heard == [(0, WINDOW), (WINDOW, WINDOW)]


def test_there_are_no_more_windows_than_the_recording_has(model, heard):
    opened(model, 2.5, language_detection_segments=9, language_detection_threshold=1.0)
    assert heard == [(0, 100), (100, 100), (200, 50)]


@pytest.mark.parametrize(("allowed", "expected"), [("en, fr", "en"), (["French", "es"], "es"), (("fr",), "fr")])
def test_only_allowed_languages_are_chosen(model, heard, allowed, expected):
    it = opened(model, allowed_languages=allowed)
    assert it.language == expected
    assert expected in it.lives[0].allowed_languages


def test_a_language_is_detected_where_there_is_speech(model, heard, spoken):
    spoken += [(2.0, 2.5), (3.0, 4.5)]
    assert opened(model, vad_filter=True, language_detection_segments=3, language_detection_threshold=1.0).language
    assert heard == [(200, 50), (300, 100), (400, 50)]


@pytest.mark.parametrize(
    ("options", "told"),
    [({"allowed_languages": "de,ja"}, "does not know 'ja'"), ({"alignment_heads": ((9, 9),)}, "9")],
)
def test_what_the_model_cannot_do_is_refused(model, heard, options, told):
    with pytest.raises(ValueError, match=told):
        opened(model, word_timestamps=True, **options)


# Pieces.


def test_a_recording_is_one_chain_unless_it_is_cut(model, heard):
    assert pieces(opened(model, clip_timestamps="0,1,2,3")) == [None]
    assert pieces(opened(model, clip_timestamps="0,1,2,3", independent_clips=True)) == [(0, 100), (200, 300)]


def test_each_stretch_of_speech_is_a_recording_of_its_own(model, heard, spoken):
    spoken += [(0.5, 1.25), (2.0, 9.0)]
    it = opened(model, vad_filter=True, language="de")
    assert pieces(it) == [(50, 125), (200, 500)]
    assert [live.recording.next_window().start_frame for live in it.lives] == [50, 200]
    assert it.progress == (0, 5.0)


def test_speech_outside_of_the_clips_is_left_out(model, heard, spoken):
    spoken += [(0.5, 1.5), (2.0, 4.0)]
    it = opened(model, vad_filter=True, clip_timestamps="1,2.5,3,3.5,4.5,5")
    assert pieces(it) == [(100, 150), (200, 250), (300, 350)]
    assert pieces(opened(model, vad_filter=True, offset_s=3.0)) == [(300, 400)]


def test_a_recording_without_speech_is_done_and_has_a_language(model, heard, spoken):
    it = opened(model, vad_filter=True)
    assert it.done
    assert it.transcript() == {
        "text": "",
        "segments": [],
        "language": "de",
        "duration": 5.0,
        "language_probability": 0.45,
    }
    assert it.progress == (5.0, 5.0)


def segment(start: float) -> dict:
    return {"id": 0, "start": start, "end": start + 0.5, "text": " one", "tokens": [1]}


def test_what_pieces_say_comes_in_the_order_of_the_pieces(model, heard, spoken):
    spoken += [(0.0, 1.0), (1.0, 2.0), (3.0, 4.0)]
    it = opened(model, vad_filter=True, language="de")
    first, second, third = it.lives
    assert it.add(second, [segment(1.0)]) == []
    assert [s["start"] for s in it.add(first, [segment(0.0)])] == [0.0]
    assert it.add(third, [segment(3.0)]) == []
    assert it.add(third, None) == []
    assert [s["start"] for s in it.add(first, None)] == [1.0]
    assert [s["start"] for s in it.add(second, [segment(1.5)])] == [1.5]
    assert not it.done
    assert [s["start"] for s in it.add(second, None)] == [3.0]
    assert it.done
    assert [(s["id"], s["start"]) for s in it.segments] == [(0, 0.0), (1, 1.0), (2, 1.5), (3, 3.0)]
