"""The files against those of openai-whisper, for any result."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from whisper.utils import format_timestamp as reference_format_timestamp
from whisper.utils import get_writer as reference_get_writer

from whisper_nnx.writers import WRITERS, format_timestamp, get_writer

Result = dict[str, Any]

TIMES_S = st.floats(0, 5000, allow_nan=False) | st.sampled_from([0.0, 0.0005, 0.9995, 59.9996, 3599.9999])
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [" -->", "\t a\t", "", " ", " one\ntwo", " a\n", "\n", "大", "\u2028", "\x1c"]
)
# 0 is "no limit", as None is.
LIMITS = st.none() | st.integers(0, 30)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "highlight_words": st.booleans(),
        "max_line_width": LIMITS,
        "max_line_count": st.none() | st.integers(0, 3),
        "max_words_per_line": st.none() | st.integers(0, 5),
    },
)


@st.composite
def results(draw: st.DrawFn, with_words: bool) -> Result:
    """Times in order, as `transcribe` makes them, with pauses of up to six seconds between words."""
    now_s = draw(TIMES_S)
    segments = []
    for text in draw(st.lists(TEXTS, max_size=5)):
        words = []
        start_s = now_s
        for word in draw(st.lists(TEXTS, max_size=8)):
            word_start_s = now_s + draw(st.sampled_from([0.0, 0.0004, 0.1, 3.5, 6.0]))
            now_s = word_start_s + draw(st.sampled_from([0.0, 0.02, 0.3]))
            words.append({"word": word, "start": word_start_s, "end": now_s, "probability": 0.5})
        segment = {"id": len(segments), "start": start_s, "end": now_s, "text": text, "avg_logprob": draw(st.floats())}
        segments.append(segment | ({"words": words} if with_words else {}))
    return {"text": "".join(s["text"] for s in segments), "segments": segments, "language": "en"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("writers")


@settings(max_examples=200, deadline=None)
@given(result=results(with_words=False) | results(with_words=True), options=OPTIONS)
def test_files_equal_those_of_openai_whisper_byte_for_byte(folder: Path, result: Result, options: dict) -> None:
    (folder / "theirs").mkdir(exist_ok=True)
    (folder / "ours").mkdir(exist_ok=True)
    reference_get_writer("all", str(folder / "theirs"))(result, "some/talk.v2.wav", **options)
    for path in get_writer("all", folder / "ours")(result, "some/talk.v2.wav", **options):
        assert path.read_bytes() == (folder / "theirs" / path.name).read_bytes(), path.suffix
    assert {p.name for p in (folder / "theirs").iterdir()} == {f"talk.v2.{format}" for format in WRITERS}


@given(seconds=st.floats(0, 1e6), hours=st.booleans(), marker=st.sampled_from([".", ","]))
def test_timestamps_equal_those_of_openai_whisper(seconds: float, hours: bool, marker: str) -> None:
    assert format_timestamp(seconds, hours, marker) == reference_format_timestamp(seconds, hours, marker)
