"""What the writers put into files, and that a file is whole or not there."""

import json
import os
import stat
from pathlib import Path

import pytest

from whisper_nnx.writers import WRITERS, format_timestamp, get_writer, make_output_folder, output_name, subtitle_cues

RESULT = {
    "text": " Erste Zeile. Zweite --> Zeile.",
    "segments": [
        {"start": 0.0, "end": 1.5, "text": " Erste Zeile."},
        {"start": 1.5, "end": 3661.0004, "text": " Zweite\t--> Zeile. "},
    ],
    "language": "de",
}
WORDS = {
    "text": " one two three",
    "segments": [
        {
            "start": 0.0,
            "end": 6.0,
            "text": " one two three",
            "words": [
                {"word": " one", "start": 0.0, "end": 0.5, "probability": 1.0},
                {"word": " two", "start": 0.5, "end": 1.0, "probability": 1.0},
                {"word": " three", "start": 5.0, "end": 6.0, "probability": 1.0},
            ],
        }
    ],
    "language": "en",
}


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        ("txt", "Erste Zeile.\nZweite\t--> Zeile.\n"),
        (
            "vtt",
            "WEBVTT\n\n00:00.000 --> 00:01.500\nErste Zeile.\n\n00:01.500 --> 01:01:01.000\nZweite\t-> Zeile.\n\n",
        ),
        (
            "srt",
            "1\n00:00:00,000 --> 00:00:01,500\nErste Zeile.\n\n2\n00:00:01,500 --> 01:01:01,000\nZweite\t-> Zeile.\n\n",
        ),
        ("tsv", "start\tend\ttext\n0\t1500\tErste Zeile.\n1500\t3661000\tZweite --> Zeile.\n"),
    ],
)
def test_a_result_is_written_in_each_format(format: str, expected: str) -> None:
    assert WRITERS[format](RESULT) == expected


def test_json_holds_the_whole_result() -> None:
    assert json.loads(WRITERS["json"](RESULT)) == RESULT


def test_a_negative_time_is_refused() -> None:
    with pytest.raises(ValueError, match=r"timestamp -0\.5 s is negative"):
        format_timestamp(-0.5)


def test_no_words_make_one_cue_per_segment() -> None:
    assert [text for _, _, text in subtitle_cues(RESULT)] == ["Erste Zeile.", "Zweite\t-> Zeile."]


def test_words_are_split_by_their_number() -> None:
    assert list(subtitle_cues(WORDS, max_words_per_line=2)) == [(0.0, 1.0, "one two"), (5.0, 6.0, "three")]


def test_lines_break_at_their_width() -> None:
    assert list(subtitle_cues(WORDS, max_line_width=7)) == [(0.0, 6.0, "one two\nthree")]


def test_with_both_limits_of_lines_a_pause_of_speech_begins_a_cue() -> None:
    cues = subtitle_cues(WORDS, max_line_width=100, max_line_count=2)
    assert list(cues) == [(0.0, 1.0, "one two"), (5.0, 6.0, "three")]


def test_each_highlighted_word_has_a_cue_and_so_has_a_gap() -> None:
    assert list(subtitle_cues(WORDS, highlight_words=True)) == [
        (0.0, 0.5, "<u>one</u> two three"),
        (0.5, 1.0, "one <u>two</u> three"),
        (1.0, 5.0, "one two three"),
        (5.0, 6.0, "one two <u>three</u>"),
    ]


@pytest.mark.parametrize("name", ["max_line_width", "max_line_count", "max_words_per_line"])
def test_a_negative_limit_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=-1 must be at least 1"):
        list(subtitle_cues(WORDS, **{name: -1}))


def test_all_writes_every_format_under_the_name_of_the_audio(tmp_path: Path) -> None:
    paths = get_writer("all", tmp_path)(RESULT, "some/where/talk.v2.wav")
    assert paths == [tmp_path / f"talk.v2.{format}" for format in WRITERS]
    assert sorted(paths) == sorted(tmp_path.iterdir())


def test_options_reach_the_subtitles_and_leave_the_other_formats_alone(tmp_path: Path) -> None:
    get_writer("all", tmp_path)(WORDS, "a.wav", max_words_per_line=1)
    assert (tmp_path / "a.srt").read_text(encoding="utf-8").count("-->") == 3
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "one two three\n"


@pytest.mark.parametrize(("audio", "name"), [("a/b.c.wav", "b.c"), ("-", "stdin"), (".hidden", ".hidden"), ("x", "x")])
def test_the_output_is_named_after_the_audio(audio: str, name: str) -> None:
    assert output_name(audio) == name


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format='doc' is unknown; choose txt, vtt, srt, tsv, json or all"):
        get_writer("doc", tmp_path)


def test_files_are_utf8_with_plain_line_ends_and_the_usual_permissions(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        (path,) = get_writer("txt", tmp_path)({"segments": [{"text": "Größe 大"}]}, "a.wav")
    finally:
        os.umask(umask)
    assert path.read_bytes() == "Größe 大\n".encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path: Path) -> None:
    write = get_writer("txt", tmp_path)
    (path,) = write({"segments": [{"text": "old"}]}, "a.wav")
    with pytest.raises(UnicodeEncodeError):
        write({"segments": [{"text": "new"}, {"text": "\ud800"}]}, "a.wav")  # half a surrogate pair: no UTF-8
    assert path.read_text(encoding="utf-8") == "old\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(OSError, match=r"cannot write .*a\.txt: Is a directory"):
        get_writer("txt", tmp_path)(RESULT, "a.wav")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_nothing_is_written_if_one_format_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="negative"):
        get_writer("all", tmp_path)({"segments": [{"start": -1.0, "end": 0.0, "text": "a"}]}, "a.wav")
    assert not list(tmp_path.iterdir())


def test_an_output_folder_is_made_with_its_parents_and_left_empty(tmp_path: Path) -> None:
    make_output_folder(tmp_path / "a" / "b")
    assert not list((tmp_path / "a" / "b").iterdir())


@pytest.mark.parametrize("below", ["", "/folder"])
def test_an_output_folder_that_is_a_file_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write to output folder '.*': it is not a folder; choose another"):
        make_output_folder(f"{tmp_path}/file{below}")


def test_an_output_folder_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(OSError, match="cannot write to output folder '/proc/none/such': No such file"):
        make_output_folder("/proc/none/such")
