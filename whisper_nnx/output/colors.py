"""Colors terminal text by the model's confidence."""

from __future__ import annotations

# Red through yellow to green, along two edges of the terminal's 6 x 6 x 6 cube: 16 + 36 red + 6 green + blue.
_COLORS = [16 + 36 * 5 + 6 * green for green in range(6)] + [16 + 36 * red + 6 * 5 for red in (4, 3, 2, 1)]


def colored(text: str, probability: float) -> str:
    """Wraps text in 256-color escape codes by its probability.

    The color index is proportional to the cube of the probability, as in whisper.cpp, so most of the scale covers
    high probabilities. NO_COLOR and the type of stdout are ignored: colors are explicitly requested.
    """
    index = int(probability**3 * len(_COLORS))
    return f"\033[38;5;{_COLORS[min(max(index, 0), len(_COLORS) - 1)]}m{text}\033[0m"
