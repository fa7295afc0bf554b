"""Text in the terminal whose colour says how sure the model is of it."""

from __future__ import annotations

# From red over yellow to green, along two edges of the terminal's 6 x 6 x 6 colours: 16 + 36 red + 6 green + blue.
_COLORS = [16 + 36 * 5 + 6 * green for green in range(6)] + [16 + 36 * red + 6 * 5 for red in (4, 3, 2, 1)]


def colored(text: str, probability: float) -> str:
    """The text in the colour of its probability, as escape codes of terminals with 256 colours.

    The cube of the probability chooses, as in whisper.cpp: most of the scale is for what is nearly certain. Who asks
    for colours gets them: neither NO_COLOR nor what stdout is connected to plays a part (`less -R` shows them).
    """
    index = int(probability**3 * len(_COLORS))
    return f"\033[38;5;{_COLORS[min(max(index, 0), len(_COLORS) - 1)]}m{text}\033[0m"
