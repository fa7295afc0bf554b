"""What a recording does beyond the reference: hotwords, pieces, token details, languages; with results made up."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transcription.recordings import BEGIN, TOKENIZER, places, recording, run, said, tell
from whisper_nnx.timing.words import WordTiming
from whisper_nnx.transcription.longform import LongformOptions

ROOM = 23  # tokens of previous text in a context of 48


def letters(n: int, first: str = "a") -> str:
    """A text of n tokens: none of them is part of a merge."""
    return " ".join("qxz"[(ord(first) + i) % 3] for i in range(n))


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(" " + text))


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 20), st.integers(0, 20), st.booleans(), st.none() | st.integers(0, 30), st.integers(0, 6))
def test_hotwords_initial_prompt_and_history_share_half_the_context(n_hot, n_initial, carry, most, n_windows):
    """In this order; what comes later yields first, and history loses what is furthest back."""
    hot, initial = letters(n_hot), letters(n_initial, "b")
    it = recording(
        100 * (n_windows + 1), hotwords=hot, initial_prompt=initial, carry_initial_prompt=carry, max_context=most
    )
    history = () if carry else (ids(initial) if initial else ())
    for _ in range(n_windows):
        window = it.next_window()
        result = said(" one two", " and")
        history += result.tokens
        tell(it, window, result)
    prompt = it.next_window().prompt
    assert len(prompt) <= ROOM

    first = (ids(hot) if hot else ())[:ROOM]
    second = ids(initial) if carry and initial else ()
    second = second[max(0, len(second) - (ROOM - len(first))) :]
    left = ROOM - len(first) - len(second)
    left = left if most is None else min(left, most)
    assert prompt == (*first, *second, *history[max(0, len(history) - left) :])


def test_without_room_for_previous_text_there_is_no_prompt():
    it = recording(300, hotwords="one", initial_prompt="two")
    it.prompt_room = 0
    assert it.next_window().prompt == ()


def test_hotwords_are_told_to_every_window_even_without_history():
    it = recording(300, hotwords="one", condition_on_previous_text=False)
    assert [window.prompt for window in run(it, lambda window: said(" two"))] == [ids("one")] * 3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"offset_s": 0.5}, [(50, 100), (150, 100)]),
        ({"duration_s": 1.2}, [(0, 100), (100, 20)]),
        ({"offset_s": 0.5, "duration_s": 0.7}, [(50, 70)]),
        ({"offset_s": 2.0, "duration_s": 99.0}, [(200, 50)]),
        ({"offset_s": 9.0}, []),
    ],
)
def test_offset_and_duration_are_one_clip(options, expected):
    assert places(run(recording(250, **options), lambda window: said(" one"))) == expected


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"offset_s": -1.0}, "offset_s=-1.0"),
        ({"offset_s": float("nan")}, "offset_s=nan"),
        ({"duration_s": 0.0}, "duration_s=0.0"),
        ({"offset_s": 1.0, "clip_timestamps": "2,3"}, "clip_timestamps='2,3'"),
        ({"max_context": -1}, "max_context=-1"),
        ({"alignment_heads": 2}, "alignment_heads=2.*word_timestamps"),
    ],
)
def test_options_that_cannot_be_met_are_refused_with_their_value(options, told):
    with pytest.raises(ValueError, match=told):
        LongformOptions(**options)


def test_nothing_is_said_beyond_the_end_of_a_piece():
    it = recording(400)
    it = replace(it, piece=(110, 180))
    assert it.progress == (0, 70)
    run(it, [said("0.00", " one", "0.40", "0.40", " two", "0.90"), said("0.50", " one", "0.90")])
    assert [(s["start"], s["end"]) for s in it.segments] == [
        (pytest.approx(1.1), pytest.approx(1.5)),
        (pytest.approx(1.5), pytest.approx(1.8)),
    ]
    assert it.progress == (70, 70)


def test_token_details_tell_each_token_of_a_segment_with_its_time():
    it = recording(250, token_timestamps=True)
    it.accept(it.next_window(), it.draft(it.next_window(), said(" one")), None, [0.0, 0.3])
    window = it.next_window()
    result = said("0.10", " one", " two", "0.50", "0.50", " one", "0.60")
    one, two, one_again = it.draft(window, result).text_tokens
    segments = it.accept(window, it.draft(window, result), None, [0.12, 0.2, 0.5, 0.58])
    assert [segment["tokens"] for segment in segments] == [
        [detail["id"] for detail in segment["token_details"]] for segment in segments
    ]
    details = [detail for segment in segments for detail in segment["token_details"]]
    assert [detail["logprob"] for detail in details] == [-0.5 * i for i in range(7)]
    text = [(d["id"], d["text"], d["start"], d["end"]) for d in details if d["id"] < BEGIN]
    assert text == [(one, " one", 1.12, 1.2), (two, " two", 1.2, 1.5), (one_again, " one", 1.5, 1.58)]
    times = [(d["text"], d["start"], d["end"]) for d in details if d["id"] >= BEGIN]
    assert times == [("<|0.10|>", 1.1, 1.1), ("<|0.50|>", 1.5, 1.5), ("<|0.50|>", 1.5, 1.5), ("<|0.60|>", 1.6, 1.6)]


def test_token_details_lie_within_the_recording():
    it = recording(50, token_timestamps=True)
    window = it.next_window()
    result = said("0.10", " one", "0.70", "0.70", " two", "0.80")
    [segment] = it.accept(window, it.draft(window, result), None, [0.1, 0.3, 0.5])
    assert [(d["text"], d["start"], d["end"]) for d in segment["token_details"]] == [
        ("<|0.10|>", 0.1, 0.1),
        (" one", 0.1, 0.3),
        ("<|0.70|>", 0.5, 0.5),
        ("<|0.70|>", 0.5, 0.5),
        (" two", 0.3, 0.5),
        ("<|0.80|>", 0.5, 0.5),
    ]


def test_segments_tell_their_windows_language_if_it_was_detected():
    for multilingual in (False, True):
        it = recording(200, multilingual=multilingual)
        run(it, [said(" one", language="en"), said(" two", language="fr")])
        assert [s.get("language") for s in it.segments] == (["en", "fr"] if multilingual else [None, None])


def test_a_speaker_turn_is_told_and_not_written():
    it = recording(100)
    run(it, [said("0.00", " one", TOKENIZER.special.sot_lm, "0.40", "0.40", " two", "0.60")])
    assert [(s["text"], s.get("speaker_turn")) for s in it.segments] == [(" one", True), (" two", None)]
    assert it.transcript()["text"] == " one two"


def test_the_alternatives_of_every_window_that_was_kept_are_told():
    it = recording(300)
    heard = (
        SimpleNamespace(text="one", tokens=(1, 2), avg_logprob=-0.1),
        SimpleNamespace(text="two", tokens=(3,), avg_logprob=-0.2),
    )
    tell(it, it.next_window(), said(" one", alternatives=heard))
    it.skip(it.next_window())
    tell(it, it.next_window(), said(" two", alternatives=heard[1:]))
    first, second = it.transcript()["alternatives"]
    assert (first["seek"], second["seek"]) == (0, 200)
    assert first["candidates"] == [
        {"text": "one", "tokens": [1, 2], "avg_logprob": -0.1},
        {"text": "two", "tokens": [3], "avg_logprob": -0.2},
    ]
    assert "alternatives" not in recording(300).transcript()


@st.composite
def timed_window(draw) -> tuple[list, list[WordTiming]]:
    """Segments of one to three words each, and times for the words that may lie where they like, in order."""
    n_segments = draw(st.integers(1, 3))
    steps = sorted(draw(st.lists(st.integers(0, 50), min_size=2 * n_segments, max_size=2 * n_segments, unique=True)))
    tokens: list = []
    n_words = 0
    for start, end in zip(steps[::2], steps[1::2], strict=True):
        count = draw(st.integers(1, 3))
        tokens += [f"{start * 0.02:.2f}", *[" one"] * count, f"{end * 0.02:.2f}"]
        n_words += count
    begins = sorted(draw(st.lists(st.integers(0, 50), min_size=n_words + 1, max_size=n_words + 1)))
    one = TOKENIZER.encode(" one")
    return tokens, [WordTiming(" one", one, a * 0.02, b * 0.02, 0.5) for a, b in pairwise(begins)]


@settings(deadline=None, max_examples=300)
@given(timed_window())
def test_words_lie_in_their_segments_or_stick_out_by_less_than_a_words_length(window_and_words):
    """The heuristics, which are the reference's, give a cut word at least the median duration of the window's words."""
    tokens, words = window_and_words
    durations = sorted(word.end - word.start for word in words if word.end > word.start)
    it = recording(100, word_timestamps=True)
    segments = it.accept(it.next_window(), it.draft(it.next_window(), said(*tokens)), words)
    typical_s = min(0.7, durations[len(durations) // 2]) if durations else 0.0
    for segment in segments:
        assert segment["start"] <= segment["end"] + 1e-9
        for word in segment["words"]:
            assert segment["start"] - typical_s - 0.011 <= word["start"] <= word["end"] + typical_s
            assert word["end"] <= segment["end"] + typical_s + 0.011


@settings(deadline=None, max_examples=300)
@given(st.lists(timed_window(), min_size=1, max_size=5), st.sampled_from([None, 0.1, 0.3]), st.integers(30, 400))
def test_segments_with_words_neither_overlap_nor_run_backwards(windows, threshold_s, frames):
    it = recording(frames, word_timestamps=True, hallucination_silence_threshold=threshold_s)
    for turn in range(1000):
        if (window := it.next_window()) is None:
            break
        tokens, words = windows[turn % len(windows)]
        within = window.n_frames / 100
        words = [
            WordTiming(w.word, list(w.tokens), min(w.start, within), min(w.end, within), w.probability) for w in words
        ]
        it.accept(window, it.draft(window, said(*tokens)), words)
    else:
        raise AssertionError("it does not end")
    for segment in it.segments:
        assert segment["start"] < segment["end"] <= frames / 100
        assert segment["text"].strip()
    for before, after in pairwise(it.segments):
        assert before["end"] <= after["start"]
    words = [word for segment in it.segments for word in segment["words"]]
    times = [time for word in words for time in (word["start"], word["end"])]
    assert times == sorted(times)
    assert all(word["word"].strip() for word in words)
    assert not times or times[-1] <= frames / 100
