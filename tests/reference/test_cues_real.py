"""Subtitles of real speech, read back by public parsers."""

import csv
import io
from datetime import timedelta

import pylrc
import pysubs2
import pytest
import srt
import webvtt

from tests.small import quick_compilation  # noqa: F401
from whisper_nnx import load_model, transcribe
from whisper_nnx.output.writers import WRITERS

pytestmark = pytest.mark.real
OPTIONS = (
    {},
    {"max_words_per_line": 1},
    {"highlight_words": True},
    {"max_line_width": 30, "max_line_count": 2},
    {"max_len": 20},
    {"max_len": 20, "split_on_word": True},
)


@pytest.fixture(scope="module")
def results(shared, real_tiny_en):
    model = load_model(str(real_tiny_en))
    names = ("en_libri_16s.wav", "en_lj_8s.wav", "en_meeting_6s.wav", "ja_common_voice_6s.mp3")
    files = [shared / "real" / "audio" / name for name in names]
    options = {"temperature": 0.0, "word_timestamps": True, "token_timestamps": True}
    return [transcribe(model, file, language="en", **options) for file in files]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options) or "plain")
def test_every_cue_has_text_and_a_length(results, options):
    cues = []
    for result in results:
        written = {name: WRITERS[name](result, **options) for name in ("vtt", "srt", "ass", "lrc")}
        vtt = webvtt.from_string(written["vtt"])
        cues += [(cue.start_time.in_milliseconds(), cue.end_time.in_milliseconds(), cue.raw_text) for cue in vtt]
        ms = timedelta(milliseconds=1)
        cues += [(cue.start / ms, cue.end / ms, cue.content) for cue in srt.parse(written["srt"])]
        ass = pysubs2.SSAFile.from_string(written["ass"], format_="ass")
        cues += [(event.start, event.end, event.plaintext) for event in ass]
        cues += [(0, 1, line.text) for line in pylrc.parse(written["lrc"])]  # which has no ends
    assert len(cues) > 4 * len(results)
    assert [cue for cue in cues if not (cue[0] < cue[1] and cue[2].strip())] == []


@pytest.mark.parametrize(("name", "delimiter"), [("tsv", "\t"), ("csv", ",")])
def test_every_row_has_text_and_a_length(results, name, delimiter):
    rows = [row for r in results for row in csv.DictReader(io.StringIO(WRITERS[name](r)), delimiter=delimiter)]
    assert len(rows) >= len(results)
    assert [row for row in rows if not (int(row["start"]) < int(row["end"]) and row["text"].strip())] == []
