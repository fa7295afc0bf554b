"""A recording as a state machine: where it looks next, what it tells, and what it keeps, with results made up."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transcription.recordings import (
    BEGIN,
    POSITIONS,
    TOKENIZER,
    WINDOW,
    places,
    recording,
    run,
    said,
    spans,
    tell,
)
from whisper_nnx.transcription.longform import parse_clips
from whisper_nnx.transcription.recording import Window

# Where it looks.


def test_without_timestamps_window_follows_window_up_to_the_end():
    it = recording(250)
    assert places(run(it, lambda window: said(" one"))) == [(0, 100), (100, 100), (200, 50)]
    assert spans(it) == [(0.0, 1.0), (1.0, 2.0), (2.0, 2.5)]


def test_an_unfinished_window_is_continued_from_its_last_pair():
    it = recording(180)
    script = [said("0.00", " one", "0.40", "0.40", " two"), said("0.00", " two", "0.90"), said(" and")]
    assert places(run(it, script)) == [(0, 100), (40, 100), (140, 40)]
    assert spans(it) == [(0.0, 0.4), (0.4, 1.3), (1.4, 1.8)]


def test_the_next_window_is_the_same_until_it_is_accepted():
    it = recording()
    assert it.next_window() == it.next_window()


@pytest.mark.parametrize("tokens", [("0.00", "0.00"), ("0.00", "0.00", " one"), ("0.50", " one", "0.00", "0.00")])
def test_a_window_that_leads_nowhere_is_left_behind(tokens):
    """Without the timestamp rules a model may say so; the same window would be decoded for ever."""
    assert places(run(recording(250), lambda window: said(*tokens))) == [(0, 100), (100, 100), (200, 50)]


def test_silence_is_skipped_and_leaves_no_trace():
    it = recording(250, initial_prompt="and")
    first = it.next_window()
    it.skip(first)
    second = it.next_window()
    assert (second.start_frame, second.prompt) == (100, first.prompt)
    assert it.segments == []


def test_a_recording_of_nothing_has_no_window():
    assert recording(0).next_window() is None


@pytest.mark.parametrize(
    ("clips", "expected"),
    [
        ("0", [(0, 250)]),
        ("", [(0, 250)]),
        ("1.5", [(150, 250)]),
        ("0.5,1", [(50, 100)]),
        ([0.5, 1.0], [(50, 100)]),
        ((0.5, 1.0), [(50, 100)]),
        ("0.5,1,2", [(50, 100), (200, 250)]),
        (" 0.5 , 1.0 ", [(50, 100)]),
        ("2,2.2,0.1,0.3", [(200, 220), (10, 30)]),
        ("1,99", [(100, 250)]),
        ("50,99", [(250, 250)]),
        ("99", [(250, 250)]),
        ("1,1", [(100, 100)]),
        ([], [(0, 250)]),
    ],
)
def test_clips_are_pairs_of_frames_within_the_recording(clips, expected):
    assert parse_clips(clips, 250) == expected


@pytest.mark.parametrize(
    ("clips", "told"),
    [
        ("a,b", "'a,b'"),
        ("1;2", "'1;2'"),
        ("-1,2", "-1"),
        ("1,nan", "nan"),
        ([0.0, float("inf")], "inf"),
        ("2,1", "2.0 to 1.0"),
        ("0,1,3,2", "3.0 to 2.0"),
        (["x"], "x"),
    ],
)
def test_clips_that_are_none_are_refused_with_their_value(clips, told):
    with pytest.raises(ValueError, match=told):
        parse_clips(clips, 250)


def test_every_clip_is_cut_into_windows_of_its_own():
    it = recording(400, clip_timestamps="0.3,1.5,2,2.5,3")
    expected = [(30, 100), (130, 20), (200, 50), (300, 100)]
    assert places(run(it, lambda window: said(" one"))) == expected
    assert [segment["seek"] for segment in it.segments] == [30, 130, 200, 300]


def test_clips_are_taken_in_the_order_given():
    it = recording(400, clip_timestamps="2,2.5,1,1.2")
    assert places(run(it, lambda window: said(" one"))) == [(200, 50), (100, 20)]


def test_a_timestamp_beyond_a_clips_end_does_not_swallow_the_next_clip():
    it = recording(400, clip_timestamps="0,0.5,0.6,1")
    script = [said("0.00", " one", "0.90", "0.90", " two"), said(" and")]
    assert places(run(it, script)) == [(0, 50), (60, 40)]


@pytest.mark.parametrize("clips", ["0,1000", "2,1000", "1000", "1000,2000"])
def test_a_clip_past_the_end_ends_with_the_recording(clips):
    windows = run(recording(250, clip_timestamps=clips), lambda window: said("0.00", " one"))
    assert sum(n for _, n in places(windows)) == max(0, 250 - 100 * int(clips.split(",")[0]))


# What it tells the next window.

ROOM = 223  # half of 448 positions, less one for the token that says so


def zeros(n: int) -> str:
    """A prompt of n tokens: the space before it is the first."""
    return "0" * (n - 1)


@pytest.mark.parametrize("n", [0, 100, 222, 223, 300])
@pytest.mark.parametrize("carry", [False, True])
def test_a_prompt_has_half_the_context_whatever_the_initial_prompt(n, carry):
    it = recording(1000, context=448, initial_prompt=zeros(n) if n else None, carry_initial_prompt=carry)
    initial = TOKENIZER.encode(" " + zeros(n)) if n else []
    assert len(initial) == n
    history: list[int] = []
    while (window := it.next_window()) is not None:
        kept = initial[-ROOM:]
        left = min(ROOM - len(kept), len(history))
        carried = [*kept, *history[len(history) - left :]]
        assert list(window.prompt) == (carried if carry else [*initial, *history][-ROOM:])
        result = said(*(65 + (len(history) + i) % 26 for i in range(60)))
        history += result.tokens
        tell(it, window, result)
    assert len(history) == 600


def test_a_window_is_told_what_the_ones_before_it_said():
    it = recording(300)
    windows = run(it, [said("0.00", " one", "0.50"), said(" two"), said(" and")])
    first, second = said("0.00", " one", "0.50").tokens, said(" two").tokens
    assert [window.prompt for window in windows] == [(), first, first + second]


def test_the_text_cut_off_by_a_windows_end_is_not_told():
    it = recording(150)
    windows = run(it, [said("0.00", " one", "0.50", "0.50", " two"), said(" two")])
    assert windows[1].prompt == said("0.00", " one", "0.50").tokens


@pytest.mark.parametrize("carry", [False, True])
def test_what_was_found_at_a_high_temperature_is_forgotten(carry):
    it = recording(500, initial_prompt="and", carry_initial_prompt=carry)
    initial = tuple(TOKENIZER.encode(" and"))
    script = [said(" one"), said(" two", temperature=0.5), said(" the", temperature=0.6), said(" a"), said(" one")]
    one, two, _, a, _ = (result.tokens for result in script)
    kept = initial if carry else ()
    prompts = [window.prompt for window in run(it, script)]
    assert prompts == [initial, initial + one, initial + one + two, kept, kept + a]
    assert it.transcript()["text"] == " one two the a one"


@pytest.mark.parametrize("carry", [False, True])
def test_unconditioned_windows_know_of_the_initial_prompt_at_most(carry):
    it = recording(300, initial_prompt="and", carry_initial_prompt=carry, condition_on_previous_text=False)
    initial = tuple(TOKENIZER.encode(" and"))
    kept = initial if carry else ()
    assert [window.prompt for window in run(it, lambda window: said(" one"))] == [initial, kept, kept]


@pytest.mark.parametrize("prompt", [None, "", "   "])
def test_an_empty_initial_prompt_is_none(prompt):
    for carry in (False, True):
        assert recording(initial_prompt=prompt, carry_initial_prompt=carry).next_window().prompt == ()


# What it keeps.


def test_a_segment_tells_its_window():
    it = recording(250, clip_timestamps="0.3")
    window = it.next_window()
    result = said("0.10", " one", "0.50", "0.60", " two", "0.70", temperature=0.4)
    first, second = tell(it, window, result)
    assert first == {
        "id": 0,
        "seek": 30,
        "start": pytest.approx(0.4),
        "end": pytest.approx(0.8),
        "text": " one",
        "tokens": list(said("0.10", " one", "0.50").tokens),
        "temperature": 0.4,
        "avg_logprob": -0.25,
        "compression_ratio": 1.5,
        "no_speech_prob": 0.125,
    }
    assert (second["id"], second["text"], second["seek"]) == (1, " two", 30)
    assert it.segments == [first, second]


def test_a_segment_without_text_or_length_is_left_out():
    it = recording(240)
    script = [said("0.00", " ", "0.40", "0.40", " one", "0.40", "0.60"), said(" "), said(" two")]
    windows = run(it, script)
    assert windows[1].prompt == ()
    assert [(segment["id"], segment["text"]) for segment in it.segments] == [(0, " two")]
    assert it.transcript()["text"] == " two"


def test_no_segment_ends_after_the_recording():
    it = recording(90)
    run(it, [said("0.20", " one", "0.60", "0.60", " two", "1.00")])
    assert spans(it) == [(0.2, 0.6), (0.6, 0.9)]


def test_what_a_model_times_beyond_the_recording_is_said_at_its_end():
    it = recording(50)
    run(it, [said("0.00", " one", "0.70", "0.70", " two", "0.80", "0.80", " the", "0.90")])
    assert [segment["text"] for segment in it.segments] == [" one two the"]
    assert spans(it) == [(0.0, 0.5)]
    alone = recording(50)
    run(alone, [said("0.60", " one", "0.70", "0.70", " two", "0.80")])
    assert (alone.segments[0]["text"], spans(alone)) == (" one two", [(0.0, 0.5)])
    assert it.transcript()["text"] == " one two the"


def test_a_rest_that_can_hold_no_word_is_not_decoded():
    for rest in (1, 9, 10):
        it = recording(100 + rest, clip_timestamps=f"0,{1 + rest / 100},0,0.05")
        expected = [(0, 100), *([(100, 10)] if rest == 10 else []), (0, 5)]
        assert places(run(it, lambda window: said(" one"))) == expected
    it = recording(105)
    run(it, lambda window: said(" one"))
    assert it.progress == (105, 105)


def test_special_tokens_are_no_text_of_a_segment():
    it = recording(100)
    run(it, [said("0.00", " one", TOKENIZER.special.languages[0][1], "0.50")])
    assert it.segments[0]["text"] == " one"


def test_a_transcript_is_what_was_said_without_the_initial_prompt():
    it = recording(300, initial_prompt="and and")
    run(it, [said("0.00", " one", "0.50"), said(" two"), said("0.00", " the", "0.30", "0.30", " one", "0.50")])
    assert it.transcript() == {"text": " one two the one", "segments": it.segments, "language": "de"}


# Whatever was decoded.

token = st.one_of(
    st.sampled_from([65, 32, TOKENIZER.special.languages[0][1]]),
    st.sampled_from([BEGIN, BEGIN + 1, BEGIN + POSITIONS]),
    st.integers(BEGIN, BEGIN + POSITIONS),
)
anything = st.lists(token, max_size=8)
times = st.lists(st.floats(0, 4).map(lambda t: round(t, 2)), max_size=7)


def sorted_pairs(clips: list[float]) -> list[float]:
    pairs = [sorted(clips[i : i + 2]) for i in range(0, len(clips), 2)]
    return [time for pair in pairs for time in pair]


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 350), times.map(sorted_pairs), st.lists(anything, min_size=1, max_size=6))
def test_every_recording_ends_and_never_looks_back_within_a_clip(frames, clips, results):
    it = recording(frames, clip_timestamps=clips)
    turns: list[int] = []

    def next_result(window: Window) -> Any:
        turns.append(window.start_frame)
        return said(*results[len(turns) % len(results)])

    ranges = [(start, end) for start, end in parse_clips(clips, frames) if start < end]
    windows = run(it, next_result, most=sum(end - start for start, end in ranges))
    for window in windows:
        begin, end = window.start_frame, window.start_frame + window.n_frames
        assert any(first <= begin < end <= last for first, last in ranges)
        assert window.n_frames <= WINDOW
        assert len(window.prompt) <= 23
    starts = [window.start_frame for window in windows]
    assert {first for first, _ in ranges} <= {*starts}
    # Only a new clip may begin further ahead.
    assert sum(b <= a for a, b in pairwise(starts)) <= max(0, len(ranges) - 1)


@st.composite
def orderly(draw) -> list[int]:
    """Tokens as the timestamp rules let them through."""
    steps = sorted(draw(st.lists(st.integers(0, POSITIONS), min_size=1, max_size=8)))
    tokens = [BEGIN + steps[0], 65]
    for step in steps[1:]:
        begun = next(token for token in reversed(tokens) if token >= BEGIN)
        if BEGIN + step > begun:
            tokens += [BEGIN + step, BEGIN + step, 66]
    ending = draw(st.sampled_from(["open", "single", "pair"]))
    if ending == "single" and len(tokens) > 2:
        return tokens[:-2]
    return tokens[:-1] if ending == "pair" and len(tokens) > 2 else tokens


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 350), st.lists(anything, min_size=1, max_size=6))
def test_no_text_is_lost_by_placing_it(frames, results):
    """But for that of segments without length, which the reference drops too."""
    it = recording(frames)
    drafted: list[str] = []
    for turn in range(1000):
        if (window := it.next_window()) is None:
            break
        draft = it.draft(window, said(*results[turn % len(results)]))
        drafted += [s["text"] for s in draft.segments if s["start"] != s["end"] and s["text"].strip()]
        it.accept(window, draft)
    else:
        raise AssertionError("it does not end")
    assert "".join(segment["text"] for segment in it.segments) == "".join(drafted)
    for segment, following in pairwise([*it.segments, {"start": frames / 100}]):
        assert segment["start"] < segment["end"] <= following["start"]


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 350), st.lists(orderly(), min_size=1, max_size=6))
def test_segments_lie_in_order(frames, results):
    it = recording(frames)
    turns: list[Window] = []

    def next_result(window: Window) -> Any:
        turns.append(window)
        return said(*results[len(turns) % len(results)])

    run(it, next_result)
    for segment in it.segments:
        assert segment["start"] < segment["end"] <= frames / 100
        assert segment["text"].strip()
    for segment, following in pairwise(it.segments):
        assert segment["end"] <= following["start"]
    assert [segment["id"] for segment in it.segments] == list(range(len(it.segments)))
    covered = {window.start_frame for window in turns}
    assert {segment["seek"] for segment in it.segments} <= covered
