"""Files are read in another process as in this one: samples, warnings and errors; its death is an error of the file."""

import io
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from tests.audio.test_loading import write_wav as write_samples
from tests.output.test_progress import write_wav
from whisper_nnx.audio import loading, reader_process
from whisper_nnx.audio.background import Background, Stopped
from whisper_nnx.audio.loading import AudioError, load_audio, load_channels
from whisper_nnx.audio.reader_process import ReaderProcess

# The process kills itself for files of that name, as a fault in a codec does.
POISONED = """
import os, sys
sys.path[:] = sys.argv[1:]
from whisper_nnx.audio import files
real = files.read_file
def read_file(file, name, *options):
    if name.endswith("poison.wav"):
        os.kill(os.getpid(), 11)
    if name.endswith("odd.wav"):
        raise Odd("a", "b")
    if name.endswith("slow.wav"):
        import time
        time.sleep(60)
    print("libraries print")
    return real(file, name, *options)
class Odd(Exception):
    def __init__(self, a, b):
        super().__init__(a + b)
files.read_file = read_file
from whisper_nnx.audio import reader_process
reader_process.serve()
"""


@pytest.fixture
def process() -> Iterator[ReaderProcess]:
    with ReaderProcess() as process:
        yield process


def in_process(process: ReaderProcess) -> Background:
    background = Background()
    background.process = process
    return background


def test_samples_warnings_and_errors_are_those_of_this_process(process: ReaderProcess, tmp_path: Path) -> None:
    stereo = np.stack([np.arange(30_000), -np.arange(30_000) // 2], axis=1).astype("<i2")
    write_samples(tmp_path / "stereo.wav", stereo)
    short, silent = write_wav(tmp_path / "short.wav", 0.05), tmp_path / "silent.wav"
    write_samples(silent, np.zeros(16_000, "<i2"))
    (tmp_path / "text.wav").write_text("no audio")
    with Background() as here:
        mixed, (_, channels) = load_audio(tmp_path / "stereo.wav"), load_channels(str(tmp_path / "stereo.wav"))
        load_audio(short), load_audio(silent)
    with in_process(process) as there:
        np.testing.assert_array_equal(load_audio(tmp_path / "stereo.wav"), mixed)
        np.testing.assert_array_equal(load_audio((tmp_path / "stereo.wav").read_bytes()), mixed)
        np.testing.assert_array_equal(load_channels(tmp_path / "stereo.wav")[1], channels)
        load_audio(short), load_audio(silent)
        for bad in ("text.wav", "none.wav"):
            with pytest.raises((AudioError, FileNotFoundError)) as error:
                load_audio(tmp_path / bad)
            there.process = None
            with pytest.raises(error.type) as expected:
                load_audio(tmp_path / bad)
            assert str(error.value) == str(expected.value)
            there.process = process
    assert there.warnings == here.warnings
    assert len(here.warnings) == 2


def test_what_has_no_path_is_sent_and_arrays_and_long_files_stay_in_this_process(
    process: ReaderProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_wav(tmp_path / "a.wav", 0.5)
    data = file.read_bytes()
    fsspec.filesystem("memory").pipe({"/read/a.wav": data, "/read/b.wav": b"no audio"})
    with in_process(process):
        monkeypatch.setattr(loading, "_MOST_SENT", len(data) - 1)
        for long in (np.zeros(8_000, np.float32), data, "memory://read/a.wav", io.BytesIO(data)):
            assert len(load_audio(long)) == 8_000
        assert process._process is None
        monkeypatch.setattr(loading, "_MOST_SENT", len(data))
        for short in (data, "memory://read/a.wav", io.BytesIO(data)):
            assert len(load_audio(short)) == 8_000
            assert process._process is not None
            process._end()
        with pytest.raises(AudioError, match=r"memory://read/b.wav cannot be read as audio"):
            load_audio("memory://read/b.wav")


def test_a_file_that_ends_processes_fails_and_the_next_is_read(
    process: ReaderProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_process, "_START", POISONED)
    good = write_wav(tmp_path / "good.wav", 0.5)
    for name in ("poison.wav", "odd.wav"):
        (tmp_path / name).write_bytes(good.read_bytes())
    with in_process(process):
        with pytest.raises(AudioError, match=r"poison.wav: decoding it ended 2 processes \(signal 11\); is it damaged"):
            load_audio(tmp_path / "poison.wav")
        assert len(load_audio(good)) == 8_000
        with pytest.raises(RuntimeError, match=r"^Odd: ab$"):
            load_audio(tmp_path / "odd.wav")
        assert len(load_audio(good)) == 8_000


def test_a_process_that_is_killed_between_two_files_is_replaced(process: ReaderProcess, tmp_path: Path) -> None:
    file = write_wav(tmp_path / "a.wav", 0.5)
    with in_process(process):
        first = load_audio(file)
        assert process._process is not None
        os.kill(process._process.pid, signal.SIGKILL)
        np.testing.assert_array_equal(load_audio(file), first)


def test_closing_ends_a_file_that_is_being_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_process, "_START", POISONED)
    process, raised = ReaderProcess(), []
    write_wav(tmp_path / "slow.wav", 0.5)

    def read() -> None:
        with process, in_process(process):
            try:
                load_audio(tmp_path / "slow.wav")
            except Stopped as error:
                raised.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    while process._process is None:
        time.sleep(0.01)
    process.close()
    thread.join(20)
    assert len(raised) == 1
    with in_process(process), pytest.raises(Stopped):
        load_audio(tmp_path / "slow.wav")


@pytest.mark.parametrize("executable", ["/none", "/bin/true", None])
def test_where_no_process_can_be_started_this_one_reads(
    process: ReaderProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executable: str | None
) -> None:
    monkeypatch.setattr(reader_process.sys, "executable", executable)
    with in_process(process) as background:
        for _ in range(2):
            assert len(load_audio(write_wav(tmp_path / "a.wav", 0.5))) == 8_000
    assert [text.split(": no other")[0] for text in background.warnings] == ["files are decoded in this process"]


def test_paths_are_those_of_this_process(
    process: ReaderProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative ones, also after a change of folder, and descriptors; the package is this one, whatever sys.path has."""
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        write_wav(tmp_path / str(number) / "a.wav", 0.5 + number)
    monkeypatch.setattr(reader_process.sys, "path", [None, "elsewhere", *reader_process.sys.path])
    with in_process(process), open(tmp_path / "1" / "a.wav", "rb") as file:
        for number in range(2):
            monkeypatch.chdir(tmp_path / str(number))
            assert len(load_audio("a.wav")) == 8_000 + number * 16_000
        with pytest.raises(FileNotFoundError, match=r"^b.wav: No such file"):
            load_audio("b.wav")
        assert len(load_audio(f"/dev/fd/{file.fileno()}")) == 24_000
        assert process._process is not None
