"""Recordings without sound, whose windows say what a test makes up."""

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from tests.small import small_tokenizer
from whisper_nnx.output.results import Segment
from whisper_nnx.transcription.longform import LongformOptions
from whisper_nnx.transcription.recording import Recording, Window

TOKENIZER = small_tokenizer()
BEGIN = TOKENIZER.special.timestamp_begin
WINDOW, POSITIONS = 100, 50  # a window is a second, a timestamp's step two frames


def recording(frames: int = 250, *, context: int = 48, **options: Any) -> Recording:
    window = {"window_frames": WINDOW, "positions": POSITIONS, "context": context}
    return Recording(TOKENIZER, "de", frames, LongformOptions(**options), **window)


def said(*tokens: int | str, temperature: float = 0.0, **more: Any) -> Any:
    """A decoded window: "0.20" is the timestamp, other text its tokens."""
    ids: list[int] = []
    for token in tokens:
        if isinstance(token, int):
            ids.append(token)
        elif token[0].isdigit():
            ids.append(BEGIN + round(float(token) / 0.02))
        else:
            ids += TOKENIZER.encode(token)
    numbers = {"avg_logprob": -0.25, "compression_ratio": 1.5, "no_speech_prob": 0.125}
    logprobs = tuple(-0.5 * i for i in range(len(ids)))
    texts = {"tokens": tuple(ids), "token_logprobs": logprobs, "language": "de"}
    return SimpleNamespace(**{**texts, "temperature": temperature, **numbers, "alternatives": (), **more})


def tell(it: Recording, window: Window, result: Any) -> list[Segment]:
    return it.accept(window, it.draft(window, result))


def run(it: Recording, results: Iterable[Any] | Callable[[Window], Any], most: int = 1000) -> list[Window]:
    """All its windows; each gets the next result."""
    script = iter(results) if not callable(results) else None
    windows: list[Window] = []
    while (window := it.next_window()) is not None:
        windows.append(window)
        assert len(windows) <= most, "it does not end"
        tell(it, window, results(window) if script is None else next(script))
    return windows


def places(windows: list[Window]) -> list[tuple[int, int]]:
    return [(window.start_frame, window.n_frames) for window in windows]


def spans(it: Recording) -> list[tuple[float, float]]:
    return [(pytest.approx(segment["start"]), pytest.approx(segment["end"])) for segment in it.segments]
