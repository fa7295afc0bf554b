"""Names of files that are not UTF-8: JSON has them escaped, and the job goes on."""

import gzip
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.audio.test_loading import as_int16, write_wav
from tests.small import quick_compilation, small_model  # noqa: F401
from whisper_nnx.jobs.export import export
from whisper_nnx.jobs.in_process import run
from whisper_nnx.jobs.inputs import read_input
from whisper_nnx.jobs.job import Job, plan
from whisper_nnx.jobs.status import results, status

ODD = os.fsdecode(b"caf\xe9.wav")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    write_wav(tmp_path / "in" / ODD, as_int16(np.random.default_rng(0).normal(size=8000) / 10))
    shutil.copy2(tmp_path / "in" / ODD, tmp_path / "in" / "plain.wav")
    (tmp_path / "in" / os.fsdecode(b"broken\xff.wav")).write_bytes(b"no audio")
    return tmp_path


@pytest.mark.parametrize("source", ["in", "list.txt"])
def test_a_name_that_is_not_utf8_is_transcribed_as_any_other(folder, source):
    (folder / "list.txt").write_bytes(b"in/caf\xe9.wav\nin/plain.wav\nin/broken\xff.wav\n")
    options = {"language": "en", "temperature": 0, "max_new_tokens": 4, "output_format": "srt,json,parquet,lhotse"}
    for _ in range(2):  # once more, it is known again
        found = run(small_model(), folder / source, folder / "job", **options)
    assert (found.done, found.failed) == (2, 1)
    odd, plain = results(job := Job.open(folder / "job"))
    assert (odd["audio"], odd["segments"]) == (str(folder / "in" / ODD), plain["segments"])
    for path in job.folder.rglob("*.json*"):
        text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
        assert all(map(json.loads, text.splitlines() if path.suffix != ".json" else [text]))
    assert pq.read_table(job.folder / "export" / "000000.parquet")["audio"][0].as_py().endswith(r"caf\udce9.wav")
    assert export(job, folder / "again", "srt,parquet,lhotse") == 2


def test_ids_may_be_any_text_of_json(folder):
    (folder / "rows.jsonl").write_text(r'{"audio": "in/plain.wav", "id": "\ud800"}' + "\n")
    options = {"language": "en", "temperature": 0, "max_new_tokens": 4, "output_format": "srt,parquet"}
    assert run(small_model(), folder / "rows.jsonl", folder / "job", **options).done == 1
    assert [row["id"] for row in results(Job.open(folder / "job"))] == ["\ud800"]


def test_a_name_that_no_file_can_have_fails_alone(folder):
    (folder / "rows.jsonl").write_text('{"audio": "in/\\ud800.wav"}\n{"audio": "in/plain.wav"}\n')
    job = plan(folder / "job", read_input(str(folder / "rows.jsonl")), {})
    assert [one.size for one in job.shard(0)] == [-1, (folder / "in" / "plain.wav").stat().st_size]
    found = run(small_model(), folder / "rows.jsonl", folder / "other", language="en", temperature=0, max_new_tokens=4)
    assert (found.done, found.failed) == (1, 1)
    assert status(Job.open(folder / "other")).failed == 1
