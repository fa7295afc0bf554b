"""What a job's transcripts are written as."""

import gzip
import json
import os
import shutil
import sys
import tarfile
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.audio.test_loading import encode, write_wav
from tests.jobs.echo import transcript
from whisper_nnx.jobs.export import export, export_settings, exportable
from whisper_nnx.jobs.inputs import read_input
from whisper_nnx.jobs.job import Job, plan
from whisper_nnx.jobs.journal import reopen_failed
from whisper_nnx.jobs.status import results
from whisper_nnx.jobs.worker import work
from whisper_nnx.runtime.packages import MissingPackageError


def transcribe(paths):
    for number, path in enumerate(paths):
        row = transcript(path) | {"duration": 2.0}
        words = [{"word": " one", "start": 0.25, "end": 0.75, "probability": 0.5}]
        row["segments"][0] |= {"id": 0, "text": f" {path[-8:]}", "tokens": [7], "no_speech_prob": 0.1, "words": words}
        yield number, row | ({"retries": {"logprob": 2}} if "stereo" in path else {})


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """The input: three recordings, two of one name; the ids of two differ in what a file's name cannot hold."""
    rows = [("x/1", "a/talk.wav"), ("x:1", "b/talk.wav"), ("third", "b/stereo.wav")]
    for _, path in rows:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        samples = np.full((2 * 8000, 2), 900, "<i2") if "stereo" in path else np.full(2 * 8000, 900, "<i2")
        write_wav(tmp_path / path, samples, 8000)
    lines = [json.dumps({"id": id_, "audio": path}) + "\n" for id_, path in rows]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    return str(tmp_path / "rows.jsonl")


@pytest.fixture
def job(rows: str, tmp_path: Path) -> Job:
    job = plan(tmp_path / "job", read_input(rows), {"language": "en", "word_timestamps": True}, shard_s=2)
    work(job, transcribe)
    return job


def test_recordings_of_one_name_have_files_of_their_own(job, tmp_path):
    assert export(job, tmp_path / "out", "srt,txt") == 3
    written = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    assert len(written) == 6
    assert {name.split("/")[1].split(".")[0] for name in written} == {"talk", "stereo"}
    assert "000002/stereo.third.srt" in written
    text = (tmp_path / "out" / "000002" / "stereo.third.srt").read_text()
    assert text == "1\n00:00:00,250 --> 00:00:00,750\none\n\n"


def test_what_is_exported_outlasts_a_loss_of_power(job, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    synced, real = set[int](), os.fsync

    def fsync(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    export(job, tmp_path / "out", "srt,parquet")
    assert {path.stat().st_ino for path in (tmp_path / "out").rglob("*.*")} <= synced


def test_parquet_holds_the_same_rows_and_how_they_were_made(job, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    (job.folder / "model.txt").write_text("0123")
    export(job, tmp_path / "out", "parquet")
    files = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in files] == [f"{n:06d}.parquet" for n in range(job.shards)]
    found = parquet.read_table(tmp_path / "out")
    for row, expected in zip(found.to_pylist(), results(job), strict=True):
        assert row["segments"][0]["words"] == expected["segments"][0]["words"]
        assert dict(row["retries"]) == expected.get("retries", {})
        assert (row["version"], row["model"]) == (expected.get("version"), expected.get("model"))
        assert json.loads(row["options"]) == expected["options"] == {"language": "en", "word_timestamps": True}
        assert {key: row[key] for key in ("id", "audio", "text", "language", "duration")} == {
            key: expected[key] for key in ("id", "audio", "text", "language", "duration")
        }
    about = parquet.read_schema(files[0]).metadata
    assert (json.loads(about[b"settings"])["language"], about[b"model"]) == ("en", b"0123")


def test_cuts_have_a_supervision_for_each_segment(job, tmp_path):
    export(job, tmp_path / "out", "lhotse")
    texts = [gzip.decompress(path.read_bytes()) for path in sorted((tmp_path / "out").iterdir())]
    cuts = [json.loads(line) for text in texts for line in text.splitlines()]
    first, _, stereo = cuts
    assert (first["type"], first["channel"], first["duration"]) == ("MonoCut", 0, 2.0)
    assert first["recording"] == {
        "id": "x/1",
        "sources": [{"type": "file", "channels": [0], "source": str(tmp_path / "a" / "talk.wav")}],
        "sampling_rate": 8000,
        "num_samples": 16000,
        "duration": 2.0,
    }
    [segment] = first["supervisions"]
    assert (segment["start"], segment["duration"], segment["text"]) == (0.0, 1.0, "talk.wav")
    assert segment["alignment"] == {"word": [["one", 0.25, 0.5, 0.5]]}
    assert (stereo["type"], stereo["channel"], stereo["supervisions"][0]["channel"]) == ("MultiCut", [0, 1], [0, 1])


def test_a_cut_keeps_the_channel_that_was_transcribed(job, tmp_path):
    row = json.loads(job.path("results", 2).read_text())
    job.path("results", 2).write_text(json.dumps(row | {"offset": 0.5, "channels": [1]}) + "\n")
    export(job, tmp_path / "out", "lhotse")
    found = json.loads(gzip.decompress((tmp_path / "out" / "cuts.000002.jsonl.gz").read_bytes()))
    assert (found["type"], found["channel"], found["supervisions"][0]["channel"], found["start"]) == (
        "MonoCut",
        1,
        1,
        0.5,
    )


def test_cuts_refer_to_the_track_that_was_transcribed_or_are_left_out(tmp_path):
    """Lhotse reads the track that ffmpeg chooses: here the second, which has more channels."""
    encode(tmp_path / "two.mka", np.zeros((1, 16000), "f4"), np.zeros((2, 48000), "f4"), codec="aac")
    encode(tmp_path / "one.mka", np.zeros((1, 16000), "f4"), codec="aac")
    (tmp_path / "list.txt").write_text("one.mka\ntwo.mka")
    for track, expected in ((None, ["one", "two"]), (0, ["one"])):
        settings = {} if track is None else {"audio_track": track}
        job = plan(tmp_path / f"job{track}", read_input(str(tmp_path / "list.txt")), settings)
        work(job, lambda sources: enumerate(transcript("a.wav") | {"segments": []} for _ in sources))
        caught = pytest.warns(UserWarning, match=r"two.mka: audio_track=0 was transcribed, but .* another track")
        with nullcontext() if track is None else caught:
            export(job, tmp_path / f"out{track}", "lhotse")
        lines = gzip.decompress((tmp_path / f"out{track}" / "cuts.000000.jsonl.gz").read_bytes()).splitlines()
        cuts = [json.loads(line) for line in lines]
        sources = [cut["recording"]["sources"][0] for cut in cuts]
        assert [Path(source["source"]).stem for source in sources] == expected
        assert [source["channels"] for source in sources] == [[0], [0, 1]][: len(expected)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("again", [False, True])
def test_workers_write_the_formats_of_their_job_whenever_they_are_interrupted(job, rows, tmp_path, monkeypatch, again):
    pytest.importorskip("pyarrow")
    export(job, tmp_path / "out", "srt,parquet,lhotse", max_line_width=2)
    settings = {
        "language": "en",
        "word_timestamps": True,
        **export_settings("parquet,lhotse,srt", {"max_line_width": 2}, {"word_timestamps": True}),
    }
    written = plan(tmp_path / "written", read_input(rows), settings, shard_s=2)
    real, most, count = {"replace": os.replace, "link": os.link}, 0, 0

    def write(name, *args):
        nonlocal count
        if (count := count + 1) > most:
            raise KeyboardInterrupt
        real[name](*args)

    if again:
        work(written, lambda paths: ((n, OSError("away")) for n, _ in enumerate(paths)))
        reopen_failed(written)
    for name in real:
        monkeypatch.setattr(os, name, partial(write, name))
    while not all(map(written.is_done, range(written.shards))):
        most, count = most + 1, 0
        with suppress(KeyboardInterrupt):
            work(written, transcribe)
        for shard in filter(written.is_done, range(written.shards)):
            assert (written.folder / "export" / f"cuts.{shard:06d}.jsonl.gz").exists()
            assert list((written.folder / "export" / f"{shard:06d}").glob("*.srt"))
    assert most > 5
    assert contents(written.folder / "export") == contents(tmp_path / "out")
    assert contents(written.folder / "results") == contents(job.folder / "results")


@pytest.mark.parametrize(
    ("formats", "subtitles", "message"),
    [
        ("srt,doc", {}, "format='doc' is unknown; choose txt, .*, all$"),
        (None, {"max_line_width": 2}, "max_line_width=2 has no effect without output_format=srt"),
        ("parquet", {"max_line_width": 2}, "max_line_width=2 has no effect without output_format=srt"),
        ("srt", {"max_line_width": 2}, "max_line_width=2 requires word_timestamps=True"),
        ("srt", {"max_len": 2}, "max_len=2 requires token_timestamps=True"),
        ("json_full", {}, "output_format=json_full requires token_timestamps=True"),
        ("srt", {"max_line_width": -2}, "max_line_width=-2 must be at least 1"),
    ],
)
def test_formats_that_cannot_be_written_are_refused_before(formats, subtitles, message):
    with pytest.raises(ValueError, match=message):
        export_settings(formats, subtitles, {})


def test_parquet_without_its_package_is_refused_by_planners_and_workers(job, rows, tmp_path, monkeypatch):
    settings = {"output_format": "parquet"}
    other = plan(tmp_path / "other", read_input(rows), settings)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="parquet needs the package pyarrow; pip install"):
        export_settings("srt,parquet", {}, {})
    with pytest.raises(MissingPackageError, match="parquet needs the package pyarrow; pip install"):
        work(other, transcribe)
    assert not list((other.folder / "work").iterdir())


def test_cuts_need_recordings_that_are_files(job, rows, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "a" / "talk.wav", "talk.wav")
    with pytest.raises(ValueError, match=r"tar://talk.wav::.* is not a file, which cuts refer to"):
        list(exportable(read_input(str(tmp_path / "a.tar")), {"output_format": "lhotse,srt"}))
    (tmp_path / "b" / "talk.wav").unlink()  # since it was transcribed
    with pytest.warns(UserWarning, match=r"b/talk.wav: No such file or directory; .*; lhotse's cuts are without it"):
        export(job, tmp_path / "out", "lhotse")
    found = [gzip.decompress(path.read_bytes()) for path in sorted((tmp_path / "out").iterdir())]
    assert [len(text.splitlines()) for text in found] == [1, 0, 1]


def test_an_unknown_format_is_named(job, tmp_path):
    with pytest.raises(ValueError, match=r"format='doc' is unknown; choose txt, .*, parquet, lhotse"):
        export(job, tmp_path / "out", "srt,doc")


def test_options_that_the_results_of_a_job_do_not_allow_are_refused(rows, tmp_path):
    work(job := plan(tmp_path / "job", read_input(rows), {}), transcribe)
    with pytest.raises(ValueError, match="max_line_width=2 requires word_timestamps=True"):
        export(job, tmp_path / "out", "srt", max_line_width=2)
    assert not (tmp_path / "out").exists()


def test_workers_export_long_names_and_colons_and_leave_out_what_cannot_be_read(rows, tmp_path):
    names = ["語" * 82, "std::vector"]
    for name in names:
        shutil.copy(tmp_path / "a" / "talk.wav", tmp_path / f"{name}.wav")
    (tmp_path / "broken.wav").write_text("no audio")
    listed = [*(f"{name}.wav" for name in names), "broken.wav", "memory://gone.wav"]
    (tmp_path / "list.txt").write_text("\n".join(listed))
    found = exportable(read_input(str(tmp_path / "list.txt")), settings := {"output_format": "lhotse,txt"})
    with pytest.warns(UserWarning, match="cuts are without it") as warned:
        work(job := plan(tmp_path / "job", found, settings), transcribe)
    messages = [str(one.message) for one in warned if "lhotse's cuts are without it" in str(one.message)]
    assert ["broken.wav" in messages[0], "memory://gone.wav" in messages[1], len(messages)] == [True, True, 2]
    cuts = gzip.decompress((job.folder / "export" / "cuts.000000.jsonl.gz").read_bytes()).splitlines()
    sources = [json.loads(cut)["recording"]["sources"][0] for cut in cuts]
    assert [one["source"] for one in sources] == [str(tmp_path / f"{name}.wav") for name in names]
    assert {one["type"] for one in sources} == {"file"}
    written = {path.name.split(".")[0] for path in (job.folder / "export" / "000000").iterdir()}
    assert written == {"語" * 26, "std_vector", "broken", "gone"}


def test_a_member_of_an_archive_that_a_list_names_is_refused(tmp_path):
    (tmp_path / "list.txt").write_text("tar://talk.wav::/data/a.tar")
    with pytest.raises(ValueError, match="is not a file, which cuts refer to"):
        list(exportable(read_input(str(tmp_path / "list.txt")), {"output_format": "lhotse"}))
