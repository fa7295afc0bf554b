"""Terminal colors."""

import re

from hypothesis import given
from hypothesis import strategies as st

from whisper_nnx.output.colors import colored


def color(text: str) -> int:
    return int(re.fullmatch(r"\033\[38;5;(\d+)m.*\033\[0m", text)[1])


def test_colors_go_from_red_through_yellow_to_green() -> None:
    assert [color(colored("a", p)) for p in (0.0, 0.8, 1.0)] == [196, 226, 82]


@given(st.floats(-0.1, 1.1), st.floats(-0.1, 1.1))
def test_a_higher_probability_is_never_redder(one: float, other: float) -> None:
    scale = [196, 202, 208, 214, 220, 226, 190, 154, 118, 82]
    low, high = (scale.index(color(colored("a", p))) for p in sorted([one, other]))
    assert low <= high


def test_only_codes_are_added() -> None:
    assert re.sub(r"\033\[[0-9;]*m", "", colored(" a word", 0.5)) == " a word"
