"""The files against those of openai-whisper, and what public parsers read in them, for any result."""

import csv
import html
import io
import re
from collections.abc import Iterable
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pylrc
import pysubs2
import pytest
import srt
import webvtt
from hypothesis import given, settings
from hypothesis import strategies as st
from whisper.utils import format_timestamp as reference_format_timestamp
from whisper.utils import get_writer as reference_get_writer

from whisper_nnx.output.subtitles import SubtitleOptions, cue_pieces, subtitle_cues
from whisper_nnx.output.writers import OPENAI_FORMATS, WRITERS, format_timestamp, get_writer

Result = dict[str, Any]

TIMES_S = st.floats(0, 5000, allow_nan=False) | st.sampled_from([0.0, 0.0005, 0.9995, 59.9996, 3599.9999])
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [" -->", "\t a\t", "", " ", " one\ntwo", " a\n", "\n", "大", "\u2028", "\x1c"]
)
# Where the reference's files cannot be read back, ours differ: line breaks end a row, blank lines and arrows a cue, and
# in WebVTT `&`, `<` and `>` are marks; what has no text or no length is no cue.
WHOLE_TEXTS = TEXTS.filter(lambda text: text.strip() and not re.search(r"[\r\n&<>]", text.strip()))
WHOLE_WORDS = TEXTS.filter(lambda text: text.strip() and not re.search(r"[\r\n&<>]", text))
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
def results(
    draw: st.DrawFn,
    with_words: bool,
    texts: st.SearchStrategy[str] = WHOLE_TEXTS,
    words_of: st.SearchStrategy[str] = WHOLE_WORDS,
    shortest_s: float = 0.02,
) -> Result:
    """Times in order, as `transcribe` makes them, with pauses of up to six seconds between words."""
    now_s = draw(TIMES_S)
    segments = []
    for text in draw(st.lists(texts, max_size=5)):
        words = []
        start_s = now_s
        for word in draw(st.lists(words_of, max_size=8)):
            word_start_s = now_s + draw(st.sampled_from([0.0, 0.0004, 0.1, 3.5, 6.0]))
            now_s = word_start_s + draw(st.sampled_from([shortest_s, 0.02, 0.3]))
            words.append({"word": word, "start": word_start_s, "end": now_s, "probability": 0.5})
        now_s = max(now_s, start_s + shortest_s)
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
    assert {p.name for p in (folder / "theirs").iterdir()} == {f"talk.v2.{format}" for format in OPENAI_FORMATS}


@given(seconds=st.floats(0, 1e6), hours=st.booleans(), marker=st.sampled_from([".", ","]))
def test_timestamps_equal_those_of_openai_whisper(seconds: float, hours: bool, marker: str) -> None:
    assert format_timestamp(seconds, hours, marker) == reference_format_timestamp(seconds, hours, marker)


# No control characters: parsers take some of them for line ends.
NASTY = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"], include_characters="\n\t"), max_size=12)
NASTY |= st.sampled_from(
    [" a --> b", "\n\n1\n\n", ' "a", b;', " {\\k5}x", " a\\Nb\\", " שלום", " 👩‍👩‍👧", "", " [0:01]", " <b>5 < 6</b>"]
)
NASTY_RESULTS = results(False, NASTY, NASTY) | results(True, NASTY, NASTY)
INSTANT_RESULTS = results(False, NASTY, NASTY, 0.0) | results(True, NASTY, NASTY, 0.0)


def shown(text: str) -> list[str]:
    """What of a text is left in any file, line by line: arrows are cut, blank lines dropped."""
    return [line.strip() for line in text.replace("-->", "->").split("\n") if line.strip()]


Cue = tuple[float, float, list[str]]


def with_text(cues: Iterable[Cue]) -> list[Cue]:
    return [cue for cue in cues if cue[2]]


def expected(result: Result, per_s: int, **options: Any) -> list[Cue]:
    """In steps of the format's clock."""
    texts = [shown(text) for _, _, text in subtitle_cues(result, **options)]
    if per_s == 1000:
        spans = [(start, end) for start, end, _ in subtitle_cues(result, **options)]
    else:  # from milliseconds, they would be rounded twice
        spans = [(pieces[0].start_s, pieces[-1].end_s) for pieces in cue_pieces(result, SubtitleOptions(**options))]
    times = [(round(start * per_s), round(end * per_s)) for start, end in spans]
    return with_text((*time, text) for time, text in zip(times, texts, strict=True))


@settings(deadline=None)
@given(result=NASTY_RESULTS, options=OPTIONS)
def test_webvtt_is_read_back(result: Result, options: dict) -> None:
    captions = webvtt.from_string(WRITERS["vtt"](result, **options))
    # The parser drops whatever looks like a mark, and leaves the others escaped.
    texts = [html.unescape(re.sub("</?u>", "", c.raw_text)) for c in captions]
    read = [
        (c.start_time.in_milliseconds(), c.end_time.in_milliseconds(), shown(text))
        for c, text in zip(captions, texts, strict=True)
    ]
    plain = [
        (start, end, shown("\n".join(lines).replace("<u>", "").replace("</u>", "")))
        for start, end, lines in expected(result, 1000, **options)
    ]
    assert with_text(read) == plain


@settings(deadline=None, max_examples=200)
@given(result=INSTANT_RESULTS, options=OPTIONS)
def test_every_cue_of_every_writer_has_a_text_and_a_length(result: Result, options: dict) -> None:
    vtt = webvtt.from_string(WRITERS["vtt"](result, **options))
    ms = timedelta(milliseconds=1)
    found = {
        "vtt": [(c.start_time.in_milliseconds(), c.end_time.in_milliseconds(), c.raw_text) for c in vtt],
        "srt": [(c.start // ms, c.end // ms, c.content) for c in srt.parse(WRITERS["srt"](result, **options))],
    }
    subtitles = pysubs2.SSAFile.from_string(WRITERS["ass"](result, **options), format_="ass")
    found["ass"] = [(event.start, event.end, event.plaintext) for event in subtitles]
    for format, delimiter in {"csv": ",", "tsv": "\t"}.items():
        file = io.StringIO(WRITERS[format](result), newline="")
        quoting = csv.QUOTE_MINIMAL if format == "csv" else csv.QUOTE_NONE
        rows = list(csv.DictReader(file, delimiter=delimiter, quoting=quoting))
        found[format] = [(int(row["start"]), int(row["end"]), row["text"]) for row in rows]
    for format, cues in found.items():
        for start, end, text in cues:
            assert start < end, format
            assert text.strip(), format
        for before, after in pairwise(cues):
            assert before[1] <= after[0], format
    karaoke = [int(hundredths) for event in subtitles for hundredths in re.findall(r"{\\k(\d+)}", event.text)]
    assert all(karaoke)
    assert all(line.strip() for line in WRITERS["txt"](result).split("\n")[:-1])
    lyrics = WRITERS["lrc"](result, **options).split("\n")[:-1]
    assert all(re.sub(r"^\[\d+:\d\d\.\d\d\]|<\d+:\d\d\.\d\d>", "", line).strip() for line in lyrics)


@settings(deadline=None)
@given(result=NASTY_RESULTS, options=OPTIONS)
def test_subrip_is_read_back(result: Result, options: dict) -> None:
    ms = timedelta(milliseconds=1)
    read = [(c.start // ms, c.end // ms, shown(c.content)) for c in srt.parse(WRITERS["srt"](result, **options))]
    assert with_text(read) == expected(result, 1000, **options)


@settings(deadline=None)
@given(result=NASTY_RESULTS)
def test_substation_is_read_back_and_its_karaoke_ends_with_the_cue(result: Result) -> None:
    subtitles = pysubs2.SSAFile.from_string(WRITERS["ass"](result), format_="ass")
    # What stands for a command's letters, and back.
    texts = [e.plaintext.replace("\u2060", "").translate(str.maketrans("｛｝", "{}")) for e in subtitles]
    read = [(e.start // 10, e.end // 10, shown(text)) for e, text in zip(subtitles, texts, strict=True)]
    assert with_text(read) == expected(result, 100)
    for event in subtitles:
        counted = [int(hundredths) for hundredths in re.findall(r"{\\k(\d+)}", event.text)]
        assert not counted or sum(counted) == (event.end - event.start) // 10


@settings(deadline=None)
@given(result=NASTY_RESULTS)
def test_lyrics_are_read_back(result: Result) -> None:
    cues = [(start, " ".join(lines)) for start, _, lines in expected(result, 100)]
    lines = WRITERS["lrc"](result).replace("-->", "->").splitlines()
    read = [re.fullmatch(r"\[(\d\d+):([0-5]\d)\.(\d\d)\](.*)", line).groups() for line in lines]
    times = [(6000 * int(minutes) + 100 * int(whole_s) + int(rest), text) for minutes, whole_s, rest, text in read]
    assert [(time, text.split()) for time, text in times if text.strip()] == [
        (time, text.split()) for time, text in cues
    ]
    if all(time < 360_000 for time, _ in times):  # the parser knows no hours
        lyrics = pylrc.parse("".join(f"{line}\n" for line in lines))
        assert sorted((round(100 * line.time), line.text) for line in lyrics) == sorted(times)


@settings(deadline=None)
@given(result=NASTY_RESULTS)
def test_tables_are_read_back(result: Result) -> None:
    def milliseconds(row: dict) -> tuple[int, int]:
        return int(row["start"]), int(row["end"])

    spoken = [s for s in result["segments"] if s["text"].strip()]
    times = [(round(1000 * s["start"]), round(1000 * s["end"])) for s in spoken]
    texts = [s["text"].strip() for s in spoken]
    rows = list(csv.DictReader(io.StringIO(WRITERS["csv"](result), newline="")))
    assert [(milliseconds(row), row["text"]) for row in rows] == list(zip(times, texts, strict=True))
    lines = WRITERS["tsv"](result).splitlines()
    rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE, restval=""))
    assert [(milliseconds(row), row["text"].split()) for row in rows] == [
        (time, text.split()) for time, text in zip(times, texts, strict=True)
    ]


@settings(deadline=None)
@given(result=results(True, NASTY, NASTY), max_len=st.integers(1, 20))
def test_cues_of_a_length_hold_every_word_once(result: Result, max_len: int) -> None:
    cues = list(subtitle_cues(result, max_len=max_len, split_on_word=True))
    words = [word["word"].replace("-->", "->") for segment in result["segments"] for word in segment["words"]]
    letters = ["".join(text.split()) for text in words]
    assert "".join("".join(text.split()) for *_, text in cues) == "".join(letters)
    assert all(len(text.rstrip()) <= max_len or "".join(text.split()) in letters for *_, text in cues)
