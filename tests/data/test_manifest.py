"""Manifests: every line is a row or a problem."""

import base64
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.small import small_tokenizer
from tests.training.waveforms import steady, write
from whisper_nnx.audio.loading import load_audio
from whisper_nnx.data.manifest import Manifest, Problem, Span, StoredAudio, limits_of, problem_lines, read_manifest

GOOD = {"audio": "a.wav", "text": "one", "language": "en"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "a.wav", steady(0, 0.5))
    write(tmp_path, "long.wav", steady(0, 31, rate=8000))
    write(tmp_path, "noise.wav", b"this is not audio" * 10)
    return tmp_path


def lines(folder: Path, *entries: Any, name: str = "m.jsonl") -> Path:
    text = "".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries)
    return write(folder, name, text.encode())


def read(folder: Path, *entries: Any, **options: Any) -> Manifest:
    return read_manifest(lines(folder, *entries), **options)


def test_a_row_has_the_values_of_its_line(folder):
    span = {"start": 0.1, "end": 0.4, "text": "one"}
    more = {"task": "translate", "segments": [span], "words": [{"word": "one", "start": 0.1, "end": 0.3}]}
    (row,) = read(folder, {**GOOD, **more, "previous_text": "zero", "source": "studio"}).rows
    assert (row.audio, row.text, row.language, row.task) == (folder / "a.wav", "one", "en", "translate")
    assert row.segments == (Span(0.1, 0.4, "one"),)
    assert row.words == (Span(0.1, 0.3, "one"),)
    assert (row.previous_text, row.source, row.line, row.no_speech) == ("zero", "studio", 1, False)
    assert row.duration == pytest.approx(0.5)
    assert row.manifest == str(folder / "m.jsonl")


def test_a_stated_duration_is_used(folder):
    assert read(folder, {**GOOD, "duration": 0.75}).rows[0].duration == 0.75


def test_a_missing_text_is_joined_from_segments(folder):
    spans = [{"start": 0.0, "end": 0.2, "text": " one "}, {"start": 0.2, "end": 0.4, "text": "two"}]
    assert read(folder, {"audio": "a.wav", "language": "en", "segments": spans}).rows[0].text == "one two"


def test_recordings_without_speech_need_neither_text_nor_language(folder):
    (row,) = read(folder, {"audio": "a.wav", "no_speech": True}).rows
    assert (row.no_speech, row.text, row.language) == (True, "", "")


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("\udcff".encode("utf-8", "surrogateescape").decode("latin-1"), "not valid JSON"),
        ([1], "must be a JSON object, not list"),
        ({"text": "one", "language": "en"}, "has no audio"),
        ({**GOOD, "audio": 7}, "has no audio"),
        ({**GOOD, "audio": {"bytes": "not base64!"}}, "base64"),
        ({**GOOD, "audio": "missing.wav"}, "file not found"),
        ({**GOOD, "audio": "noise.wav"}, "cannot be read as audio"),
        ({**GOOD, "audio": "long.wav"}, "lasts 31.0 s, at most 30"),
        ({**GOOD, "duration": 30.5}, "lasts 30.5 s"),
        ({**GOOD, "duration": "long"}, "duration is 'long'"),
        ({**GOOD, "duration": float("nan")}, "duration is nan"),
        ({**GOOD, "text": " "}, "has no text"),
        ({**GOOD, "text": None}, "has no text"),
        ({**GOOD, "text": 5}, "text is 5"),
        ({**GOOD, "no_speech": True}, "has no_speech and the text 'one'"),
        ({**GOOD, "no_speech": "perhaps"}, "no_speech is 'perhaps'"),
        ({"audio": "a.wav", "text": "one"}, "has no language"),
        ({**GOOD, "language": "xx"}, "'xx'"),
        ({**GOOD, "language": "ja"}, "'ja' is not one of the model's"),
        ({**GOOD, "task": "sing"}, "task 'sing' is unknown"),
        ({**GOOD, "segments": "one"}, "segments"),
        ({**GOOD, "segments": [{"start": 0.0, "text": "one"}]}, "segments must be a list of"),
        ({**GOOD, "segments": [{"start": 0.3, "end": 0.2, "text": "one"}]}, "lasts from 0.3 to 0.2 s"),
        ({**GOOD, "segments": [{"start": -1, "end": 0.2, "text": "one"}]}, "start is -1"),
        ({**GOOD, "segments": [{"start": 0, "end": 0.7, "text": "one"}]}, "times reach 0.7 s, but the recording lasts"),
        (
            {**GOOD, "segments": [{"start": s, "end": s + 0.2, "text": "a"} for s in (0.2, 0.0)]},
            "starts at 0 s, before",
        ),
        ({**GOOD, "words": [{"word": "", "start": 0.0, "end": 0.2}]}, "words: ''"),
    ],
)
def test_a_bad_line_is_reported_by_number_and_the_others_are_read(folder, entry, reason):
    manifest = read(folder, GOOD, "", entry, GOOD, languages=["en", "de"], max_duration_s=30.0)
    assert [row.line for row in manifest.rows] == [1, 4]
    (problem,) = manifest.problems
    assert problem.line == 3
    assert reason in problem.reason
    assert "\n" not in problem.reason


def test_recordings_may_be_long_without_a_limit(folder):
    assert read(folder, {**GOOD, "audio": "long.wav"}).rows[0].duration == pytest.approx(31)


def test_languages_may_be_names_or_codes_of_the_model(folder):
    rows = read(folder, {**GOOD, "language": "German"}, {**GOOD, "language": "xx"}, languages=["de", "xx"]).rows
    assert [row.language for row in rows] == ["de", "xx"]


def test_a_default_language_applies_to_rows_without_one(folder):
    rows = [
        GOOD,
        {**GOOD, "language": None},
        {**GOOD, "language": ""},
        {"audio": "a.wav", "text": "one", "locale": "fr"},
    ]
    found = read(folder, *rows, language="German", languages=["en", "de", "fr"])
    assert [row.language for row in found.rows] == ["en", "de", "de", "fr"]
    assert [row.language for row in read(folder, *rows, needs_language=False).rows] == ["en", "", "", "fr"]
    with pytest.raises(ValueError, match="'xyz' is unknown"):
        read(folder, *rows, language="xyz")


def test_an_english_only_model_accepts_only_english_transcription(folder):
    english = small_tokenizer(languages=())
    rows = [GOOD, {**GOOD, "language": ""}, {**GOOD, "language": "de"}, {**GOOD, "task": "translate"}]
    found = read(folder, *rows, **limits_of(english))
    assert [row.language for row in found.rows] == ["en", "en"]
    assert [problem.line for problem in found.problems] == [3, 4]
    assert "'de' is not one of the model's" in found.problems[0].reason
    assert "only transcribes English" in found.problems[1].reason
    multilingual = read(folder, *rows, **limits_of(small_tokenizer(), "fr"))
    assert [row.language for row in multilingual.rows] == ["en", "fr", "de", "en"]


def test_a_common_voice_table_is_read_unchanged(folder):
    (folder / "clips").mkdir()
    (folder / "a.wav").rename(folder / "clips" / "a.wav")
    columns = "client_id\tpath\tsentence_id\tsentence\tsentence_domain\tup_votes\tage\tgender\tlocale\tsegment"
    texts = ['"Wait," she said', 'an inch is 1"', '"']
    lines = [f"c1\ta.wav\ts{i}\t{text}\t\t2\ttwenties\t\ten\t" for i, text in enumerate(texts)]
    table = write(folder, "validated.tsv", "\n".join([columns, *lines, "c2\tnone.mp3\ts9\tx\t\t2\t\t\ten\t"]).encode())
    manifest = read_manifest(table)
    assert [(row.text, row.language, row.line) for row in manifest.rows] == [
        (s, "en", i + 2) for i, s in enumerate(texts)
    ]
    assert {row.audio for row in manifest.rows} == {folder / "clips" / "a.wav"}
    (problem,) = manifest.problems
    assert (problem.line, problem.reason.split(": ")[1]) == (5, "file not found; check the path")


def test_a_table_row_with_too_many_fields_is_rejected(folder):
    table = write(folder, "m.csv", b'audio,text,language\na.wav,hello, world,en\na.wav,"hello, world",en\n')
    manifest = read_manifest(table)
    assert [row.text for row in manifest.rows] == ["hello, world"]
    assert [(problem.line, problem.reason.split(";")[0]) for problem in manifest.problems] == [
        (2, "has more fields than the header")
    ]


def test_a_table_may_contain_booleans_as_written_by_pandas(folder):
    manifest = read_manifest(
        write(folder, "m.csv", b"audio,text,language,no_speech\na.wav,one,en,False\na.wav,,,True\n")
    )
    assert [row.no_speech for row in manifest.rows] == [False, True]


@pytest.mark.parametrize(
    "data", [b"path\tsentence\n" + b"x" * 200_000, b"path\tsentence\na.wav\t\xff\xfe\n"], ids=["long", "no_utf8"]
)
def test_an_unreadable_table_is_named_in_one_line(folder, data):
    with pytest.raises(ValueError, match=r"m\.tsv cannot be read as a table") as raised:
        read_manifest(write(folder, "m.tsv", data))
    assert "\n" not in str(raised.value)


def test_bad_rows_are_summarized_in_one_line_per_kind(folder):
    missing = [{**GOOD, "audio": f"it's {i}.wav"} for i in range(3000)]
    silent = [{**GOOD, "text": ""}, {**GOOD, "text": " "}]
    late = [{**GOOD, "duration": 30 + i / 8} for i in range(1, 9)]
    manifest = read(folder, *silent, *missing, GOOD, *late, {**GOOD, "task": "sing"}, max_duration_s=30.0)
    assert (len(manifest.rows), len(manifest.problems)) == (1, 3011)
    assert problem_lines("m", manifest.problems) == [
        f"m:3: {folder}/it's 0.wav: file not found; check the path; 2,999 more such rows: lines 4, 5, 6, 7, 8, ...",
        "m:3004: lasts 30.1 s, at most 30 s can be used; cut it; "
        "7 more such rows: lines 3005, 3006, 3007, 3008, 3009, ...",
        'm:1: has no text; give one, or "no_speech": true if there is no speech; 1 more such row: line 2',
        "m:3012: task 'sing' is unknown; choose 'transcribe' or 'translate'",
    ]


def test_many_different_reasons_are_counted(folder):
    problems = [Problem(i, f"{chr(97 + i)} is wrong") for i in range(23)]
    lines = problem_lines("m", problems)
    assert len(lines) == 21
    assert lines[-1] == "m: 3 more rows cannot be used, for other reasons"


def test_recordings_inside_the_manifest_equal_files(folder):
    data = base64.b64encode((folder / "a.wav").read_bytes()).decode()
    inside, outside = read(folder, {**GOOD, "audio": {"bytes": data}}, GOOD).rows
    assert np.array_equal(load_audio(inside.audio), load_audio(outside.audio))
    assert inside.duration == outside.duration


def test_a_missing_manifest_is_reported_in_one_line(folder):
    with pytest.raises(FileNotFoundError, match="manifest not found"):
        read_manifest(folder / "none.jsonl")
    with pytest.raises(ValueError, match="is not a dataset"):
        read_manifest(folder)
    write(folder, "dataset_dict.json", b"{}")
    with pytest.raises(ValueError, match="several splits"):
        read_manifest(folder)


def test_a_folder_with_metadata_equals_a_manifest(folder):
    expected = read(folder, {**GOOD, "source": "x"}, {**GOOD, "audio": "missing.wav"})
    write(folder, "metadata.csv", b"file_name,transcription,language,source\na.wav,one,en,x\nmissing.wav,one,en,\n")
    from_csv = read_manifest(folder)
    lines(folder, {"file_name": "a.wav", "sentence": "one", "language": "en", "source": "x"}, name="metadata.jsonl")
    from_json = read_manifest(folder)
    for manifest in (from_csv, from_json):
        (row,) = manifest.rows
        assert (row.audio, row.text, row.source) == (expected.rows[0].audio, "one", "x")
    assert "missing.wav" in from_csv.problems[0].reason


def test_a_saved_dataset_equals_a_manifest_and_keeps_its_recordings_on_disk(folder):
    datasets = pytest.importorskip("datasets")
    data = (folder / "a.wav").read_bytes()
    spans = [{"start": 0.0, "end": 0.4, "text": "one"}]
    columns = {
        "audio": [{"path": None, "bytes": data}, {"path": str(folder / "a.wav"), "bytes": None}],
        "sentence": ["one", "one"],
        "language": ["en", "xx"],
        "segments": [spans, spans],
    }
    saved = datasets.Dataset.from_dict(columns).cast_column("audio", datasets.Audio(decode=False))
    saved.save_to_disk(str(folder / "saved"))
    manifest = read_manifest(folder / "saved")
    (row,) = manifest.rows
    assert (row.text, row.segments, row.duration) == ("one", (Span(0.0, 0.4, "one"),), pytest.approx(0.5))
    assert isinstance(row.audio, StoredAudio)
    assert len(pickle.dumps(row)) < len(data)
    assert np.array_equal(load_audio(pickle.loads(pickle.dumps(row.audio))), load_audio(data))
    assert [problem.line for problem in manifest.problems] == [2]
