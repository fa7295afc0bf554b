"""Recordings that are part of another file: where the plan finds them, and what a worker reads."""

import gzip
import io
import json
import os
import tarfile
import threading
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.audio.test_loading import write_wav
from tests.jobs.echo import transcript
from tests.small import quick_compilation, small_model  # noqa: F401
from whisper_nnx import load_audio
from whisper_nnx.data.manifest import read_manifest
from whisper_nnx.jobs.changes import warn_of_changes
from whisper_nnx.jobs.in_process import run
from whisper_nnx.jobs.inputs import Recording, absolute, read_input
from whisper_nnx.jobs.job import Job, plan
from whisper_nnx.jobs.parts import read_part
from whisper_nnx.jobs.status import results, status
from whisper_nnx.jobs.worker import work

LEVELS = [0.125, 0.25, 0.5]  # of the recordings, which tell them apart


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three recordings of a second."""
    (tmp_path / "sounds").mkdir()
    samples = [np.full(16_000, level * 2**15, "<i2") for level in LEVELS]
    return [write_wav(tmp_path / "sounds" / f"{n}.wav", x) for n, x in enumerate(samples)]


def tar_of(files: list[Path], path: Path, mode: str = "w") -> Path:
    """As webdataset writes it: a sidecar beside each recording."""
    with tarfile.open(path, mode) as tar:
        for file in files:
            tar.add(file, f"shard/{file.name}")
            about = tarfile.TarInfo(f"shard/{file.stem}.json")
            about.size = 2
            tar.addfile(about, io.BytesIO(b"{}"))
    return path


def levels(found: list[Recording]) -> list[float]:
    return [float(load_audio(one.read())[100]) for one in found]


def planned(source: Path | str, folder: Path) -> tuple[Job, list[Recording]]:
    """What a job has planned: what has gone through JSON, and does not differ from the input."""
    job = plan(folder, read_input(str(source)), {})
    with warnings.catch_warnings(action="error"):
        warn_of_changes(job, str(source))
    return job, job.shard(0)


def test_members_of_a_tar_are_read_where_they_are(files, tmp_path):
    path = tar_of(files, tmp_path / "a.tar")
    _, found = planned(path, tmp_path / "job")
    assert levels(found) == LEVELS
    assert [one.name for one in found] == [f"tar://shard/{n}.wav::{path}" for n in range(3)]
    assert {one.n_bytes for one in found} == {files[0].stat().st_size}
    assert float(load_audio(found[1].name)[100]) == LEVELS[1]  # as fsspec reads it
    (tmp_path / "train.jsonl").write_text(json.dumps({"audio": found[2].name, "text": "x", "language": "en"}))
    [row] = read_manifest(tmp_path / "train.jsonl").rows
    assert (row.duration, float(load_audio(row.audio)[100])) == (1.0, LEVELS[2])

    tar_of(files[:2], tmp_path / "b.tar")
    both = list(read_input(str(tmp_path / "*.tar")))
    assert [os.path.basename(one.audio) for one in both] == ["a.tar"] * 3 + ["b.tar"] * 2
    assert len({one.id for one in both}) == 5


def test_a_tar_that_was_cut_off_fails_where_it_ends(files, tmp_path):
    path = tar_of(files, tmp_path / "a.tar")
    _, found = planned(path, tmp_path / "job")
    content = path.read_bytes()
    path.write_bytes(content[: found[2].part["offset"] + 10] + b"")
    with pytest.raises(ValueError, match=r"a.tar ends within shard/2.wav; copy it again"):
        found[2].read()
    for name, kind in (("a.tar.gz", "gz"), ("b.tar", "gz"), ("c.tar", "bz2"), ("d.txz", "xz")):
        with pytest.raises(ValueError, match=f"{name} is compressed: its members .* decompress it first"):
            list(read_input(str(tar_of(files, tmp_path / name, f"w:{kind}"))))
    (tmp_path / "no.tar").write_bytes(b"x" * 5000)
    with pytest.raises(ValueError, match=r"no.tar cannot be read as a tar"):
        list(read_input(str(tmp_path / "no.tar")))


def loading(sources):
    """Transcribes everything that can be loaded as x."""
    for number, source in enumerate(sources):
        try:
            load_audio(source["audio"] if isinstance(source, dict) else source)
            yield number, transcript("x")
        except Exception as error:
            yield number, error


def test_results_of_parts_name_them(files, tmp_path):
    job, found = planned(tar_of(files, tmp_path / "a.tar"), tmp_path / "job")
    fetched: list[bytes] = []

    def transcribe(sources):
        for number, source in enumerate(sources):
            fetched.append(source.fetch())
            yield number, transcript("x")

    work(job, transcribe)
    assert fetched == [file.read_bytes() for file in files]
    assert [row["audio"] for row in results(job)] == [one.name for one in found]


@pytest.mark.parametrize("error", [NotImplementedError("an unknown type"), ImportError("parquet needs pyarrow")])
def test_what_a_part_raises_fails_it_alone_but_a_missing_package_stops_the_worker(files, tmp_path, monkeypatch, error):
    job, _ = planned(tar_of(files, tmp_path / "a.tar"), tmp_path / "job")
    read = Recording.read

    def broken(self, **options):
        if self.name.startswith("tar://shard/1.wav"):
            raise error
        return read(self, **options)

    monkeypatch.setattr(Recording, "read", broken)
    stops = isinstance(error, ImportError)
    with pytest.raises(ImportError, match="needs pyarrow") if stops else nullcontext():
        work(job, loading)
    assert (status(job).done, status(job).failed) == ((1, 0) if stops else (2, 1))


@pytest.mark.parametrize("held", ["bytes", "paths", "struct", "path in struct"])
def test_parquet_holds_recordings_or_their_paths(files, tmp_path, held):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    column: list[Any] = {
        "bytes": [file.read_bytes() for file in files],
        "paths": [f"sounds/{file.name}" for file in files],
        "struct": [{"bytes": file.read_bytes(), "path": "gone.wav"} for file in files],
        "path in struct": [{"bytes": None, "path": str(file)} for file in files],
    }[held]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    kind = {"bytes": pa.binary(), "paths": pa.string()}.get(held, struct)
    table = pa.table({"audio": pa.array(column, kind), "duration": [1.0, None, 1.0], "text": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    _, found = planned(tmp_path / "a.parquet", tmp_path / "job")
    assert levels(found) == LEVELS
    assert [one.duration for one in found] == [1.0, None, 1.0]
    assert len({one.id for one in found}) == 3
    if held in ("bytes", "struct"):
        assert [one.name for one in found] == [f"{tmp_path / 'a.parquet'}#{n}" for n in range(3)]
        assert 0 < found[0].n_bytes < 2 * files[0].stat().st_size
    else:
        assert [one.name for one in found] == [str(file) for file in files]


@pytest.mark.parametrize("held", ["bytes", "paths", "struct"])
def test_rows_of_parquet_without_a_recording_fail_by_themselves(files, tmp_path, held):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    value, kind = {
        "bytes": (files[1].read_bytes(), pa.binary()),
        "paths": (str(files[1]), pa.string()),
        "struct": ({"bytes": None, "path": str(files[1])}, struct),
    }[held]
    column = pa.array([None, value, None], kind)
    pq.write_table(pa.table({"audio": column}), tmp_path / "a.parquet", row_group_size=2)  # one of them is all null
    job, found = planned(tmp_path / "a.parquet", tmp_path / "job")
    assert levels(found[1:2]) == [LEVELS[1]]
    work(job, loading)
    assert len(list(results(job))) == 1
    failed = [json.loads(line) for line in job.path("failed", 0).read_text().splitlines()]
    assert [(row["audio"], row["reason"]) for row in failed] == [
        (f"{tmp_path / 'a.parquet'}#{n}", f"{tmp_path / 'a.parquet'}, row {n + 1}: no recording") for n in (0, 2)
    ]


def test_a_container_that_changed_since_the_plan_is_not_read(files, tmp_path):
    job, _ = planned(tar_of(files, tmp_path / "a.tar"), tmp_path / "job")
    tar_of([*files[1:], files[0]], tmp_path / "a.tar")  # of the same size
    os.utime(tmp_path / "a.tar", (0, 0))
    work(job, lambda sources: ((n, transcript("x")) for n, _ in enumerate(sources)))
    failed = [json.loads(line) for line in job.path("failed", 0).read_text().splitlines()]
    assert len(failed) == 3
    assert all(row["reason"].startswith(f"{tmp_path / 'a.tar'}: modified at 1970-01-01 ") for row in failed)


def test_parquet_without_recordings_is_named(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet has no column of recordings; name it audio"):
        list(read_input(str(tmp_path / "a.parquet")))
    (tmp_path / "b.parquet").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"b.parquet cannot be read as parquet"):
        list(read_input(str(tmp_path / "b.parquet")))


def test_a_saved_dataset_holds_recordings_or_their_paths(files, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"bytes": file.read_bytes(), "path": None} for file in files[:2]] + [{"bytes": None, "path": str(files[2])}]
    data = datasets.Dataset.from_dict({"audio": [*rows, None], "id": ["x", "y", "z", "none"]})
    data = data.cast_column("audio", datasets.Audio(decode=False))
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "saved"))
    _, found = planned(tmp_path / "saved" / "train", tmp_path / "job")
    with pytest.raises(ValueError, match=r"train/, row 4: no recording"):
        found.pop().read()
    assert levels(found) == LEVELS
    assert [one.id for one in found] == ["x", "y", "z"]
    assert [one.n_bytes for one in found] == [file.stat().st_size for file in files]
    described = (tmp_path / "saved" / "train" / "state.json").stat()  # the folder itself changes when it is read
    assert (found[0].size, found[0].modified) == (described.st_size, int(described.st_mtime))
    with pytest.raises(ValueError, match=r"contains several splits; give the folder of one, such as .*train"):
        list(read_input(str(tmp_path / "saved")))


def cut(file: Path, id_: str, start: float = 0.0, duration: float = 1.0, **more: Any) -> dict[str, Any]:
    """As Lhotse writes it."""
    source = {"type": "file", "channels": [0], "source": str(file)}
    recording = {"id": file.stem, "sources": [source], "sampling_rate": 16000, "num_samples": 16000, "duration": 1.0}
    about = {"id": id_, "start": start, "duration": duration, "channel": 0, "supervisions": []}
    return about | {"recording": recording | {"channel_ids": [0]}, "type": "MonoCut"} | more


def test_cuts_of_lhotse_are_parts_of_recordings(files, tmp_path):
    samples = np.repeat(np.array([1000, 2000, 3000, 4000], "<i2"), 4000)  # a quarter of a second each
    write_wav(tmp_path / "steps.wav", np.stack([samples, samples // 2], axis=1))
    source = {"type": "file", "channels": [0, 1], "source": "steps.wav"}
    stereo = {"id": "steps", "sources": [source], "duration": 1.0, "sampling_rate": 16000, "num_samples": 16000}
    lines = [
        cut(files[1], "whole"),
        cut(files[0], "part", 0.25, 0.5),
        cut(files[0], "left", 0.5, 0.25, recording=stereo),
        cut(files[0], "right", 0.5, 0.25, recording=stereo, channel=1),
        stereo,
    ]
    with gzip.open(tmp_path / "cuts.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    job, found = planned(tmp_path / "cuts.jsonl.gz", tmp_path / "job")
    assert [one.id for one in found] == ["whole", "part", "left", "right", "steps"]
    assert [one.duration for one in found] == [1.0, 0.5, 0.25, 0.25, 1.0]
    assert found[0].read() == str(files[1])
    assert found[1].read().tolist() == [LEVELS[0]] * 8000
    assert found[2].read() == pytest.approx(np.full(4000, 3000 / 32768))
    assert found[3].read() == pytest.approx(np.full(4000, 1500 / 32768))
    assert found[4].read() == str(tmp_path / "steps.wav")
    work(job, lambda sources: ((n, transcript("x")) for n, _ in enumerate(sources)))
    assert [row.get("offset") for row in results(job)] == [None, 0.25, 0.5, 0.5, None]
    assert [row.get("channels") for row in results(job)] == [None, None, [0], [1], None]


def test_rows_with_an_offset_are_parts_of_recordings(files, tmp_path):
    row = {"audio_filepath": "sounds/1.wav", "offset": 0.75, "duration": 0.25}
    (tmp_path / "nemo.json").write_text(json.dumps(row) + "\n" + json.dumps(row | {"offset": 0.25}))
    _, found = planned(tmp_path / "nemo.json", tmp_path / "job")
    assert [len(one.read()) for one in found] == [4000, 4000]
    assert found[0].id != found[1].id
    (tmp_path / "nemo.json").write_text(json.dumps({"audio": "sounds/1.wav", "offset": 0.5}))
    with pytest.raises(ValueError, match=r"line 1: offset=0.5 begins a part of a recording; add its duration"):
        list(read_input(str(tmp_path / "nemo.json")))
    (tmp_path / "train.jsonl").write_text(
        "".join(
            json.dumps(row | {"audio": "sounds/1.wav", "text": "x", "language": "en"} | more) + "\n"
            for more in ({}, {"offset": 0.0}, {"offset": 0.0, "duration": 1.0})
        )
    )
    manifest = read_manifest(tmp_path / "train.jsonl")
    assert [problem.line for problem in manifest.problems] == [1, 2]
    assert "is a part of a recording, from 0.75 s (its offset)" in manifest.problems[0].reason


def test_sizes_of_urls_are_asked_for_together_and_the_order_is_kept(tmp_path, monkeypatch):
    import fsspec

    memory, asked, most = fsspec.filesystem("memory"), list[str](), 0
    for n in range(40):
        memory.pipe(f"/many/{n:02d}.wav", b"x" * (n + 1))
    (tmp_path / "a.wav").write_bytes(b"x")
    lines = [f"memory://many/{n:02d}.wav" for n in range(40)]
    (tmp_path / "list.txt").write_text("\n".join([*lines, "a.wav", lines[0]]))
    real, going = type(memory).size, list[str]()

    def size(self, path):
        nonlocal most
        going.append(path)
        most = max(most, len(going))
        asked.append(path)
        time.sleep(max(0, 40 - len(asked)) / 4000)  # the first one takes longest
        going.remove(path)
        return real(self, path)

    monkeypatch.setattr(type(memory), "size", size)
    found = list(read_input(str(tmp_path / "list.txt")))
    assert [one.size for one in found] == [*range(1, 41), 1, 1]
    assert [one.audio for one in found] == [*lines, str(tmp_path / "a.wav"), lines[0]]
    assert 1 < most <= 16
    asked.clear()
    assert [one.size for one in read_input("memory://many")] == [*range(1, 41)]
    assert not asked  # the listing has them


def test_parts_are_read_with_the_options_of_the_job(files, tmp_path, monkeypatch):
    row = {"audio": "sounds/1.wav", "offset": 0.5, "duration": 0.25}
    (tmp_path / "nemo.json").write_text(json.dumps(row))
    settings = {"max_hours": 0.5 / 3600, "audio_track": 0, "follow_timestamps": False}
    asked: dict[str, Any] = {}

    def load(path, **options):
        asked.update(options)
        return load_audio(path, **options)

    monkeypatch.setattr("whisper_nnx.audio.loading.load_audio", load)
    job = plan(tmp_path / "job", read_input(str(tmp_path / "nemo.json")), settings)
    work(job, loading)
    [failed] = job.path("failed", 0).read_text().splitlines()
    assert "max_hours" in json.loads(failed)["reason"]
    assert asked == {"max_hours": 0.5 / 3600, "stream": 0, "follow_timestamps": False}


def test_cuts_are_decoded_once_and_ahead(files, tmp_path, monkeypatch):
    """By the threads that read ahead, of which several may need the same recording."""
    rows = [{"audio": f"sounds/{n}.wav", "offset": at, "duration": 0.25} for at in (0.5, 0, 0.25) for n in (0, 1, 2)]
    (tmp_path / "nemo.json").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    decoded: list[tuple[str, bool]] = []

    def load(path, **options):
        time.sleep(0.05)
        decoded.append((os.path.basename(path), threading.current_thread() is threading.main_thread()))
        return load_audio(path, **options)

    monkeypatch.setattr("whisper_nnx.audio.loading.load_audio", load)
    monkeypatch.setattr("whisper_nnx.transcription.reading.usable_cores", lambda: 8)
    found = run(small_model(), tmp_path / "nemo.json", tmp_path / "job", batch_size=4, temperature=0.0, language="en")
    assert (found.done, found.failed) == (9, 0)
    assert sorted(decoded) == [(f"{n}.wav", False) for n in (0, 1, 2)]


def test_what_chose_the_samples_of_a_part_does_not_choose_again(files, tmp_path):
    row = {"audio": "sounds/1.wav", "offset": 0.5, "duration": 0.25}
    (tmp_path / "nemo.json").write_text(json.dumps(row))
    job = plan(tmp_path / "job", read_input(str(tmp_path / "nemo.json")), {"audio_track": 0})
    taken = []

    def transcribe_all(sources):
        for number, source in enumerate(sources):
            taken.append(load_audio(source["audio"], stream=source["audio_track"]))
            yield number, transcript("x")

    work(job, transcribe_all)
    assert [len(samples) for samples in taken] == [4000]


def test_tars_and_parquet_may_be_urls(files, tmp_path):
    pytest.importorskip("pyarrow")
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq

    memory = fsspec.filesystem("memory")
    pq.write_table(pa.table({"audio": [file.read_bytes() for file in files]}), tmp_path / "b.parquet")
    for path in (tar_of(files, tmp_path / "a.tar"), tmp_path / "b.parquet"):
        memory.put(str(path), f"/data/{path.name}")
    _, found = planned("memory://data/*", tmp_path / "job")
    assert levels(found) == LEVELS * 2
    memory.pipe("/data/list.jsonl.gz", gzip.compress(b'{"audio": "c.wav"}'))
    memory.put(str(files[2]), "/data/c.wav")
    assert absolute("memory://data/*") == "memory://data/*"
    assert levels([*read_input("memory://data/*.gz")]) == [LEVELS[2]]
    assert levels([*read_input("memory://data/list.jsonl.gz")]) == [LEVELS[2]]
    assert found[0].name == "tar://shard/0.wav::memory:///data/a.tar"
    assert float(load_audio(found[1].name)[100]) == LEVELS[1]
    memory.rm("/data", recursive=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "MixedCut", "recording": None}, "a MixedCut without a recording of its own cannot be transcribed"),
        ({"recording": {"sources": [], "duration": 1.0}}, "must have one source of the type file or url"),
        ({"recording": {"sources": [], "transforms": [{"name": "Speed"}]}}, "is changed by transforms"),
        ({"duration": -1}, "must have one source of the type file or url, and times"),
    ],
)
def test_cuts_that_are_no_part_of_a_file_are_named(files, tmp_path, change, message):
    (tmp_path / "cuts.jsonl").write_text(json.dumps(cut(files[0], "x") | change))
    with pytest.raises(ValueError, match=f"cuts.jsonl, line 1: .*{message}"):
        list(read_input(str(tmp_path / "cuts.jsonl")))


def test_lists_that_are_no_text_and_damaged_tables_are_refused_by_name(tmp_path: Path):
    (tmp_path / "latin.txt").write_bytes(b"a.wav\n\xe9.wav\n")
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8 text; convert it"):
        list(read_input(str(tmp_path / "latin.txt")))
    (tmp_path / "rows.jsonl.gz").write_text('{"audio": "a.wav"}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl.gz is damaged, or not compressed: .*; copy it again"):
        list(read_input(str(tmp_path / "rows.jsonl.gz")))
    (tmp_path / "x.parquet").write_bytes(b"PAR1" + bytes(200) + (100).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(ValueError, match=r"x.parquet cannot be read as parquet .*; copy it again"):
        list(read_input(str(tmp_path / "x.parquet")))
    for wrong in ('["a"]', '""', "true"):
        (tmp_path / "rows.jsonl").write_text(f'{{"audio": "a.wav", "id": {wrong}}}\n')
        with pytest.raises(ValueError, match=r"rows.jsonl, line 1: id=.* must be text or a whole number"):
            list(read_input(str(tmp_path / "rows.jsonl")))
    (tmp_path / "null.txt").write_text("a\0b.wav\n")
    assert [one.size for one in read_input(str(tmp_path / "null.txt"))] == [-1]


def test_links_to_nothing_and_to_themselves_are_listed(files: list[Path]):
    (folder := files[0].parent).joinpath("a.wav").symlink_to("nowhere")
    folder.joinpath("b.wav").symlink_to("b.wav")
    folder.joinpath("loop").symlink_to(".")
    (folder / "c.wav").mkdir()
    found = {Path(one.audio).name: one.size for one in read_input(str(folder))}
    assert found.keys() == {"a.wav", "b.wav", "0.wav", "1.wav", "2.wav"}
    assert found["a.wav"] == found["b.wav"] == -1


def test_parquet_of_categories_names_paths_and_other_types_are_refused(tmp_path: Path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"audio": pa.array(["x.wav", "y.wav"]).dictionary_encode()}), tmp_path / "a.parquet")
    assert [one.name for one in read_input(str(tmp_path / "a.parquet"))] == [
        str(tmp_path / "x.wav"),
        str(tmp_path / "y.wav"),
    ]
    for column in ([1, 2], [["x.wav"]]):
        parquet.write_table(pa.table({"audio": column}), tmp_path / "b.parquet")
        with pytest.raises(ValueError, match=r"b.parquet: column audio is of type .*; give paths, bytes, or both"):
            list(read_input(str(tmp_path / "b.parquet")))


def test_a_part_does_not_keep_its_whole_recording_in_memory(files):
    assert read_part(str(files[0]), {"start": 0.25, "duration": 0.5}).base is None
