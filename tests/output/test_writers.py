"""Contents of output files, which are complete or absent."""

import json
import math
import os
import stat
from pathlib import Path

import pytest

from whisper_nnx.output.subtitles import SubtitleOptions, subtitle_cues, text_with_speaker
from whisper_nnx.output.writers import (
    OPENAI_FORMATS,
    WRITERS,
    format_timestamp,
    get_writer,
    make_output_folder,
    output_files,
    output_name,
)

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
            "WEBVTT\n\n00:00.000 --> 00:01.500\nErste Zeile.\n\n00:01.500 --> 01:01:01.000\nZweite\t--&gt; Zeile.\n\n",
        ),
        (
            "srt",
            "1\n00:00:00,000 --> 00:00:01,500\nErste Zeile.\n\n2\n00:00:01,500 --> 01:01:01,000\nZweite\t-> Zeile.\n\n",
        ),
        ("tsv", "start\tend\ttext\n0\t1500\tErste Zeile.\n1500\t3661000\tZweite --> Zeile.\n"),
        ("csv", 'start,end,text\n0,1500,"Erste Zeile."\n1500,3661000,"Zweite\t--> Zeile."\n'),
        ("lrc", "[00:00.00]Erste Zeile.\n[00:01.50]Zweite\t--> Zeile.\n"),
    ],
)
def test_contents_of_each_format(format: str, expected: str) -> None:
    assert WRITERS[format](RESULT) == expected


def test_json_holds_the_whole_result() -> None:
    assert json.loads(WRITERS["json"](RESULT)) == RESULT


def test_negative_times_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"timestamp -0\.5 s is negative"):
        format_timestamp(-0.5)


def test_without_words_each_segment_is_a_cue() -> None:
    assert [text for _, _, text in subtitle_cues(RESULT)] == ["Erste Zeile.", "Zweite\t-> Zeile."]


def test_words_are_split_by_their_number() -> None:
    assert list(subtitle_cues(WORDS, max_words_per_line=2)) == [(0.0, 1.0, "one two"), (5.0, 6.0, "three")]


def test_lines_break_at_their_width() -> None:
    assert list(subtitle_cues(WORDS, max_line_width=7)) == [(0.0, 6.0, "one two\nthree")]


def test_with_both_line_limits_a_pause_starts_a_cue() -> None:
    cues = subtitle_cues(WORDS, max_line_width=100, max_line_count=2)
    assert list(cues) == [(0.0, 1.0, "one two"), (5.0, 6.0, "three")]


def test_highlighting_gives_each_word_and_gap_a_cue() -> None:
    assert list(subtitle_cues(WORDS, highlight_words=True)) == [
        (0.0, 0.5, "<u>one</u> two three"),
        (0.5, 1.0, "one <u>two</u> three"),
        (1.0, 5.0, "one two three"),
        (5.0, 6.0, "one two <u>three</u>"),
    ]


def test_max_len_splits_between_words_and_keeps_long_words_whole() -> None:
    cues = subtitle_cues(WORDS, max_len=7, split_on_word=True)
    assert list(cues) == [(0.0, 1.0, "one two"), (5.0, 6.0, "three")]
    cues = subtitle_cues(WORDS, max_len=2, split_on_word=True)
    assert [text for _, _, text in cues] == ["one", "two", "three"]


def test_max_len_splits_between_tokens_but_not_within_characters() -> None:
    texts = ["<|0.00|>", " on", "e", " \ufffd", "\ufffd", "\ufffd", "x", "<|3.00|>"]
    details = [
        {"id": i, "text": text, "logprob": -0.1, "start": i / 2, "end": (i + 1) / 2} for i, text in enumerate(texts)
    ]
    result = {"segments": [{"start": 0.0, "end": 4.0, "text": " one é大x", "token_details": details}]}
    assert list(subtitle_cues(result, max_len=2)) == [
        (0.5, 1.0, "on"),
        (1.0, 1.5, "e"),
        (1.5, 3.0, "é大"),
        (3.0, 3.5, "x"),
    ]
    assert list(subtitle_cues(result, max_len=100)) == [(0.5, 3.5, "one é大x")]


def test_max_len_reports_missing_words_and_tokens() -> None:
    with pytest.raises(ValueError, match="transcribe with word_timestamps=True"):
        list(subtitle_cues(RESULT, max_len=7, split_on_word=True))
    with pytest.raises(ValueError, match=r"transcribe with token_timestamps=True, or .* set split_on_word=True"):
        list(subtitle_cues(WORDS, max_len=7))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_len": 9, "max_line_width": 40},
            "max_len=9 and max_line_width=40 split cues by different rules; drop one",
        ),
        ({"max_len": 9, "max_words_per_line": 2}, "max_len=9 and max_words_per_line=2"),
        ({"split_on_word": True}, "split_on_word=True changes where max_len splits; give max_len too"),
        ({"max_len": 9, "highlight_words": True}, "needs whole words; set split_on_word=True"),
    ],
)
def test_contradictory_options_are_rejected(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SubtitleOptions(**options)


SPEAKERS = {
    "segments": [
        {**WORDS["segments"][0], "speaker": "0"},
        {
            "start": 6.0,
            "end": 7.0,
            "text": " four",
            "words": [{"word": " four", "start": 6.0, "end": 7.0}],
            "speaker": "?",
        },
    ]
}


def test_speaker_labels_precede_the_text() -> None:
    assert [text_with_speaker(segment) for segment in SPEAKERS["segments"]] == [
        "(speaker 0) one two three",
        "(speaker ?) four",
    ]
    assert WRITERS["txt"](SPEAKERS) == "(speaker 0) one two three\n(speaker ?) four\n"
    assert "<v Speaker0>one two three\n" in WRITERS["vtt"](SPEAKERS)
    assert '0,6000,"0","one two three"\n6000,7000,"?","four"\n' in WRITERS["csv"](SPEAKERS)
    cues = [text for _, _, text in subtitle_cues(SPEAKERS, max_words_per_line=2)]
    assert cues == ["(speaker 0) one two", "(speaker 0) three", "(speaker ?) four"]


def test_a_speaker_change_starts_a_cue() -> None:
    lines = {"max_line_width": 100, "max_line_count": 100}
    cues = [text for _, _, text in subtitle_cues(SPEAKERS, **lines)]
    assert cues == ["(speaker 0) one two", "(speaker 0) three", "(speaker ?) four"]
    turn = {"segments": [{**segment, "speaker": None} for segment in SPEAKERS["segments"]]}
    assert [text for _, _, text in subtitle_cues(turn, **lines)] == ["one two", "three four"]
    turn["segments"][0]["speaker_turn"] = True
    assert [text for _, _, text in subtitle_cues(turn, **lines)] == ["one two", "three [SPEAKER_TURN]", "four"]


def test_karaoke_times_words_and_silence_in_hundredths() -> None:
    (event,) = [line for line in WRITERS["ass"](WORDS).splitlines() if line.startswith("Dialogue")]
    karaoke = r"{\k50}one {\k50}two{\k400} {\k100}three"
    assert event == f"Dialogue: 0,0:00:00.00,0:00:06.00,Default,,0,0,0,,{karaoke}"


def test_highlighted_lyrics_have_word_times() -> None:
    timed = "[00:00.00]<00:00.00>one <00:00.50>two <00:05.00>three\n"
    assert WRITERS["lrc"](WORDS, highlight_words=True) == timed


def test_full_json_contains_token_probabilities() -> None:
    token = {"id": 7, "text": " one", "logprob": -0.5, "start": 0.0, "end": 0.5}
    result = {**WORDS, "segments": [{**WORDS["segments"][0], "tokens": [7], "token_details": [token]}]}
    (segment,) = json.loads(WRITERS["json_full"](result))["segments"]
    assert segment["token_details"] == [{**token, "probability": pytest.approx(0.60653, abs=1e-5)}]
    with pytest.raises(ValueError, match=r"json_full .* transcribe with token_timestamps=True"):
        WRITERS["json_full"]({"segments": [{"text": " one", "tokens": [7]}]})


def test_score_has_the_probability_of_each_token(tmp_path: Path) -> None:
    texts = [("<|0.00|>", 0.0), (" one\ttwo", math.log(0.25)), ("\n", -20.0)]
    tokens = [{"id": i, "text": text, "logprob": p, "start": 0.0, "end": 0.5} for i, (text, p) in enumerate(texts)]
    result = {**WORDS, "segments": [{**WORDS["segments"][0], "tokens": [0, 1, 2], "token_details": tokens}]}
    [path] = get_writer("score", tmp_path)(result, "a.wav")
    assert (path.name, path.read_text()) == ("a.score.txt", "<|0.00|>\t1\n one two\t0.25\n \t2.06115e-09\n")
    with pytest.raises(ValueError, match=r"score needs .* token_timestamps=True"):
        WRITERS["score"]({"segments": [{"text": " one", "tokens": [7]}]})


@pytest.mark.parametrize("name", ["max_line_width", "max_line_count", "max_words_per_line", "max_len"])
def test_negative_limits_are_rejected(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=-1 must be at least 1"):
        list(subtitle_cues(WORDS, **{name: -1}))


def test_all_writes_the_formats_of_openai_whisper_named_after_the_audio(tmp_path: Path) -> None:
    paths = get_writer("all", tmp_path)(RESULT, "some/where/talk.v2.wav")
    assert paths == [tmp_path / f"talk.v2.{format}" for format in OPENAI_FORMATS]
    assert sorted(paths) == sorted(tmp_path.iterdir())


def test_several_formats_are_written_once_each(tmp_path: Path) -> None:
    paths = get_writer("ass,srt,ass,csv", tmp_path)(RESULT, "a.wav")
    assert [path.name for path in paths] == ["a.ass", "a.srt", "a.csv"]
    assert output_files("a", "json_full,all")[:2] == ["a.full.json", "a.txt"]


def test_options_affect_only_subtitle_formats(tmp_path: Path) -> None:
    get_writer("all", tmp_path)(WORDS, "a.wav", max_words_per_line=1)
    assert (tmp_path / "a.srt").read_text(encoding="utf-8").count("-->") == 3
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "one two three\n"


@pytest.mark.parametrize(("audio", "name"), [("a/b.c.wav", "b.c"), ("-", "stdin"), (".hidden", ".hidden"), ("x", "x")])
def test_the_output_is_named_after_the_audio(audio: str, name: str) -> None:
    assert output_name(audio) == name


def test_unknown_formats_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"format='doc' is unknown; choose txt, vtt, srt, .* or all"):
        get_writer("srt,doc", tmp_path)


def test_files_are_utf8_with_unix_line_ends_and_usual_permissions(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        (path,) = get_writer("txt", tmp_path)({"segments": [{"text": "Größe 大"}]}, "a.wav")
    finally:
        os.umask(umask)
    assert path.read_bytes() == "Größe 大\n".encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_failed_write_keeps_the_old_file_and_no_temporary_one(tmp_path: Path, monkeypatch) -> None:
    def full(unfinished, path):
        assert unfinished.read_text(encoding="utf-8") == "new\n"
        raise OSError(28, "No space left on device")

    write = get_writer("txt", tmp_path)
    (path,) = write({"segments": [{"text": "old"}]}, "a.wav")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left on device"):
        write({"segments": [{"text": "new"}]}, "a.wav")
    assert path.read_text(encoding="utf-8") == "old\n"
    assert list(tmp_path.iterdir()) == [path]


def test_unwritable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(OSError, match=r"cannot write .*a\.txt: Is a directory"):
        get_writer("txt", tmp_path)(RESULT, "a.wav")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_nothing_is_written_if_one_format_fails(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="negative"):
        get_writer("all", tmp_path)({"segments": [{"start": -1.0, "end": 0.0, "text": "a"}]}, "a.wav")
    assert not list(tmp_path.iterdir())


def test_the_output_folder_is_created_with_its_parents_and_left_empty(tmp_path: Path) -> None:
    make_output_folder(tmp_path / "a" / "b")
    assert not list((tmp_path / "a" / "b").iterdir())


@pytest.mark.parametrize("below", ["", "/folder"])
def test_an_output_folder_that_is_a_file_is_rejected(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write to output folder '.*': it is not a folder; choose another"):
        make_output_folder(f"{tmp_path}/file{below}")


def test_an_output_folder_that_cannot_be_created_is_rejected() -> None:
    with pytest.raises(OSError, match="cannot write to output folder '/proc/none/such': No such file"):
        make_output_folder("/proc/none/such")


def word(text: str, start: float, end: float) -> dict:
    return {"word": text, "start": start, "end": end, "probability": 1.0}


def spoken(*words: dict) -> dict:
    text = "".join(word["word"] for word in words)
    segment = {"start": words[0]["start"], "end": words[-1]["end"], "text": text, "words": list(words)}
    return {"text": text, "segments": [segment], "language": "en"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([word(" a", 0, 0), word(" b", 1, 2)], [(0, 0.04), (1, 2)]),  # from the gap
        ([word(" a", 0, 0), word(" b", 0, 2)], [(0, 0.04), (0.04, 2)]),  # from the next word
        ([word(" a", 0, 1), word(" b", 1, 1)], [(0, 0.96), (0.96, 1)]),  # from the previous word
        ([word(" a", 0, 0.03), *[word(" b", 0.03, 0.03)] * 2], [(0, 0.01), (0.01, 0.02), (0.02, 0.03)]),
        ([word(" a", 1, 1)], [(1, 1.04)]),
        ([word(" a", 2, 3), word(" b", 1, 1)], [(2, 3), (1, 1.04)]),  # clips in another order
    ],
)  # fmt: skip
def test_zero_length_words_are_shown_briefly(words: list, expected: list) -> None:
    cues = [(start, end) for start, end, _ in subtitle_cues(spoken(*words), max_words_per_line=1)]
    assert cues == [pytest.approx(cue) for cue in expected]
    underlined = [text for _, _, text in subtitle_cues(spoken(*words), highlight_words=True) if "<u>" in text]
    assert len(underlined) == len(words)


def test_markup_in_text_is_escaped_in_webvtt() -> None:
    result = spoken(word(" R&D", 0, 1), word(" <b>", 1, 2), word(" a-->b", 2, 3))
    result["segments"][0]["speaker"] = "1"
    [_, cue, *_] = WRITERS["vtt"](result, highlight_words=True).split("\n\n")
    assert cue.endswith("<v Speaker1><u>R&amp;D</u> &lt;b&gt; a--&gt;b")


@pytest.mark.parametrize("format", ["txt", "vtt", "srt", "tsv", "csv", "lrc", "ass"])
def test_segments_without_text_are_not_written(format: str) -> None:
    empty = [{"start": 1.0, "end": 1.0, "text": ""}, {"start": 1.5, "end": 1.5, "text": " \n"}]
    segments = RESULT["segments"]
    with_empty = {**RESULT, "segments": [segments[0], *empty, segments[1]]}
    assert WRITERS[format](with_empty) == WRITERS[format](RESULT)
