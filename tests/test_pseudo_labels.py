"""The recipe that trains on the transcripts of a job: which of them, and that training can read them."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.audio.test_loading import encode, write_wav
from tests.jobs.echo import transcript
from whisper_nnx import load_audio
from whisper_nnx.data.manifest import Manifest, read_manifest
from whisper_nnx.jobs.inputs import read_input
from whisper_nnx.jobs.job import Job, plan
from whisper_nnx.jobs.worker import work
from whisper_nnx.training.config_file import load_config

RECIPE = Path(__file__).parents[1] / "examples" / "pseudo_labels"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Of four recordings: a good one that is a little shorter than its last segment, a loop, silence, and another."""
    (tmp_path / "sounds").mkdir()
    for name in "abcd":
        write_wav(tmp_path / "sounds" / f"{name}.wav", np.full(15_000, 900, "<i2"))
    job = plan(tmp_path / "job", read_input(str(tmp_path / "sounds")), {})

    def transcribe(paths):
        for number, path in enumerate(paths):
            row = transcript(path) | {"duration": 0.94}
            row["segments"][0] |= {"text": row["text"]}
            if path.endswith("b.wav"):
                row["segments"][0]["compression_ratio"] = 5.0
            yield number, row | ({"text": "", "segments": []} if path.endswith("c.wav") else {})

    work(job, transcribe)
    return job


def names(manifest: Manifest) -> list[str]:
    return [Path(str(row.audio)).name for row in manifest.rows]


def test_manifests_hold_the_transcripts_that_are_not_suspicious(job, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["make_manifest.py", str(job.folder), str(tmp_path / "data"), "--validation", "0"])
    runpy.run_path(str(RECIPE / "make_manifest.py"), run_name="__main__")
    assert capsys.readouterr().out == "2 left out, 2 train\n"
    found = read_manifest(tmp_path / "data" / "train.jsonl", max_duration_s=1)
    assert (names(found), found.problems) == (["a.wav", "d.wav"], [])
    assert found.rows[0].segments[0].end == found.rows[0].duration == 0.94
    assert (tmp_path / "data" / "validation.jsonl").read_text() == ""


def test_a_long_recording_is_cut_between_segments(tmp_path):
    script = runpy.run_path(str(RECIPE / "make_manifest.py"))
    write_wav(tmp_path / "long.wav", np.repeat(np.arange(40, dtype="<i2") * 500, 16_000))  # each second is louder
    times = [(0, 10), (12, 25), (25, 31), (32, 40.5)]
    like = transcript("long.wav")["segments"][0]
    segments = [like | {"start": float(a), "end": float(b), "text": f" from {a} to {b} seconds"} for a, b in times]
    text = "".join(s["text"] for s in segments)
    row = {"id": "x", "audio": str(tmp_path / "long.wav"), "language": "en", "duration": 40.0, "text": text}
    (tmp_path / "clips").mkdir()
    [recording] = read_input(str(tmp_path / "long.wav"))
    made = list(script["manifest_rows"](row | {"segments": segments}, recording, tmp_path / "clips", {}))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in made))
    found = read_manifest(tmp_path / "train.jsonl", max_duration_s=30)
    assert found.problems == []
    assert [(r.duration, len(r.segments)) for r in found.rows] == [(25.0, 2), (15.0, 2)]
    assert found.rows[1].previous_text == "from 0 to 10 seconds from 12 to 25 seconds"
    samples = load_audio(found.rows[1].audio)
    assert len(samples) == 15 * 16_000
    assert samples[0] == pytest.approx(25 * 500 / 32768, abs=1e-4)
    assert found.rows[1].segments[1].start == 7.0


def test_a_part_of_a_recording_is_a_clip_of_its_own(job, tmp_path):
    script = runpy.run_path(str(RECIPE / "make_manifest.py"))
    (row, recording), *_ = script["rows_of"](job)
    part = replace(recording, part={"start": 0.25, "duration": 0.5})
    [made] = script["manifest_rows"](row | {"duration": 0.5}, part, tmp_path, {})
    assert len(load_audio(tmp_path / Path(made["audio"]).name)) == 0.5 * 16_000


def test_clips_of_different_recordings_have_different_names_and_loud_ones_stay_loud(job, tmp_path):
    script = runpy.run_path(str(RECIPE / "make_manifest.py"))
    encode(tmp_path / "loud.wav", np.full((1, 16_000), 2, np.float32), codec="pcm_f32le")
    (row, recording), *_ = script["rows_of"](job)
    part = replace(recording, audio=str(tmp_path / "loud.wav"), part={"start": 0.25, "duration": 0.5})
    rows = [row | {"duration": 0.5, "id": id_} for id_ in ("plumless", "buckeroo")]  # of one CRC-32
    clips = [made["audio"] for row in rows for made in script["manifest_rows"](row, part, tmp_path, {})]
    assert len(set(clips)) == 2
    assert load_audio(tmp_path / Path(clips[0]).name) == pytest.approx(np.ones(8_000), abs=1e-3)


@pytest.mark.parametrize("whole", [True, False])
def test_clips_are_of_the_track_that_the_job_has_transcribed(tmp_path, monkeypatch, whole):
    tracks = [np.full((1, 16_000), level, np.float32) for level in (0.5, 0.25)]
    encode(tmp_path / "talk.mkv", *tracks, codec="pcm_s16le")
    offset = {} if whole else {"offset": 0.0}
    (tmp_path / "rows.jsonl").write_text(json.dumps({"audio": "talk.mkv", "duration": 1.0} | offset))
    job = plan(tmp_path / "job", read_input(str(tmp_path / "rows.jsonl")), {"audio_track": 1, "max_hours": 1})

    def transcribe(sources):
        for number, _ in enumerate(sources):
            row = transcript("talk.mkv") | {"duration": 1.0}
            row["segments"][0]["text"] = row["text"]
            yield number, row

    work(job, transcribe)
    monkeypatch.setattr(sys, "argv", ["make_manifest.py", str(job.folder), str(tmp_path / "data"), "--validation", "0"])
    runpy.run_path(str(RECIPE / "make_manifest.py"), run_name="__main__")
    [row] = read_manifest(tmp_path / "data" / "train.jsonl").rows
    assert load_audio(row.audio) == pytest.approx(tracks[1][0], abs=1e-4)


def test_results_are_a_manifest_whose_rows_without_text_are_problems(job):
    found = read_manifest(job.path("results", 0))
    assert names(found) == ["a.wav", "b.wav", "d.wav"]
    assert [problem.line for problem in found.problems] == [3]


def test_the_configuration_reads_what_the_script_writes():
    config = load_config(RECIPE / "train.toml")
    text = (RECIPE / "README.md").read_text("utf-8")
    for path in (*config.data.train, *config.evaluate.manifest):
        assert Path(path).parent.as_posix() in text
    assert f"--model {config.output}/export" in text
