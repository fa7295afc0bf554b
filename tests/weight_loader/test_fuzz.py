"""Damaged checkpoints of every format give one line.

`python -m tests.weight_loader.fuzz_readers` does more.
"""

import warnings
from pathlib import Path

import pytest

from tests.weight_loader.fuzz_readers import SEEDS, fuzz, limited, opened
from weight_loader.folder import CheckpointError

FINDINGS = Path(__file__).parent / "findings"  # inputs that once failed otherwise, one folder each


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", SEEDS)
def test_inputs_of_the_fuzzer_are_valid(name, tmp_path):
    files = SEEDS[name]()
    for file, data in files.items():
        (tmp_path / file).write_bytes(data)
    assert opened(tmp_path / next(iter(files)) if len(files) == 1 else tmp_path) == "read"


def test_damaged_files_are_read_or_rejected_in_one_line(tmp_path):
    (tmp_path / "scratch").mkdir()
    _, findings = fuzz(600, 0, tmp_path / "kept", tmp_path / "scratch")
    assert findings == []


@pytest.mark.parametrize("finding", sorted(FINDINGS.glob("*")), ids=lambda path: path.name)
def test_earlier_findings_are_read_or_rejected_in_one_line(finding):
    for path in [finding, *finding.iterdir()]:
        with limited():
            opened(path)


def test_the_fuzzer_detects_other_exceptions(tmp_path, monkeypatch):
    def wrong(path):
        raise KeyError("surprise") if path.is_dir() else CheckpointError("two\nlines")

    monkeypatch.setattr("tests.weight_loader.fuzz_readers.read_checkpoint", wrong)
    (tmp_path / "scratch").mkdir()
    _, findings = fuzz(12, 0, tmp_path / "kept", tmp_path / "scratch")
    assert len(findings) == 12
    assert {finding.split(": ")[1] for finding in findings} == {"KeyError", "AssertionError"}
