"""From the tokens of a window to timed segments."""

from hypothesis import given
from hypothesis import strategies as st

from whisper_nnx.text.special_tokens import SpecialTokens
from whisper_nnx.transcription.segments import TimedTokens, ends_in_single_timestamp, split_at_timestamps

SPECIAL = SpecialTokens(
    eot=50, sot=51, transcribe=52, translate=53, sot_lm=None, sot_prev=54, no_speech=55, no_timestamps=56,
    timestamp_begin=100, timestamp_end=150,
)  # fmt: skip
STEP_S, DURATION_S = 0.02, 0.9
ADDED = 151  # a token that a fine-tune put behind the timestamps


def split(*tokens: int):
    segments, advance = split_at_timestamps(tokens, SPECIAL, STEP_S, DURATION_S)
    return [(piece.start_s, piece.end_s, list(piece.tokens)) for piece in segments], advance


def test_a_window_that_ends_in_the_middle_of_speech_is_heard_again_from_its_last_pair():
    segments, advance = split(100, 1, 2, 110, 115, 3, 120, 122, 4)
    assert segments == [(0.0, 10 * STEP_S, [100, 1, 2, 110]), (15 * STEP_S, 20 * STEP_S, [115, 3, 120])]
    assert advance == 20


def test_a_single_timestamp_at_the_end_closes_the_window():
    segments, advance = split(100, 1, 110, 110, 2, 130)
    assert segments == [(0.0, 10 * STEP_S, [100, 1, 110]), (10 * STEP_S, 30 * STEP_S, [110, 2, 130])]
    assert advance is None


def test_a_pair_at_the_end_is_where_the_next_window_begins():
    assert split(100, 1, 110, 112) == ([(0.0, 10 * STEP_S, [100, 1, 110])], 10)


def test_without_a_pair_all_is_one_segment_up_to_the_last_timestamp():
    assert split(105, 1, 130) == ([(0.0, 30 * STEP_S, [105, 1, 130])], None)
    assert split(105, 1, 2) == ([(0.0, 5 * STEP_S, [105, 1, 2])], None)


def test_without_a_timestamp_the_segment_lasts_as_long_as_the_sound():
    assert split(1, 2) == ([(0.0, DURATION_S, [1, 2])], None)
    assert split() == ([(0.0, DURATION_S, [])], None)


def test_the_timestamp_zero_alone_says_nothing_about_the_end():
    assert split(100, 1, 2) == ([(0.0, DURATION_S, [100, 1, 2])], None)


def test_after_a_given_prefix_the_first_segment_starts_with_the_window():
    assert split(1, 110, 112, 2, 120) == (
        [(0.0, 10 * STEP_S, [1, 110]), (12 * STEP_S, 20 * STEP_S, [112, 2, 120])],
        None,
    )


def test_an_added_token_is_no_timestamp():
    assert split(100, ADDED, ADDED) == ([(0.0, DURATION_S, [100, ADDED, ADDED])], None)
    assert not ends_in_single_timestamp([1, ADDED], SPECIAL)


def test_a_window_is_closed_by_one_timestamp_behind_something_else():
    assert ends_in_single_timestamp([1, 110], SPECIAL)
    assert not ends_in_single_timestamp([110], SPECIAL)
    assert not ends_in_single_timestamp([109, 110], SPECIAL)
    assert not ends_in_single_timestamp([110, 1], SPECIAL)
    assert not ends_in_single_timestamp([], SPECIAL)


@given(st.lists(st.one_of(st.integers(0, 9), st.integers(100, 150), st.just(ADDED)), max_size=12))
def test_segments_are_a_beginning_of_the_tokens_in_order(tokens):
    segments, advance = split_at_timestamps(tokens, SPECIAL, STEP_S, DURATION_S)
    joined = [token for piece in segments for token in piece.tokens]
    assert all(isinstance(piece, TimedTokens) for piece in segments)
    assert joined == tokens[: len(joined)]
    if advance is None:
        assert joined == tokens
    else:
        assert segments[-1].end_s == advance * STEP_S == (joined[-1] - SPECIAL.timestamp_begin) * STEP_S
