"""Recordings are read ahead on other threads, in their order and within limits, until they are no longer needed."""

import contextlib
import io
import itertools
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from tests.cli.command import python
from tests.output.test_progress import write_wav
from tests.small import quick_compilation, small_model  # noqa: F401
from whisper_nnx import iter_transcripts, transcribe
from whisper_nnx.audio import background
from whisper_nnx.audio.arrays import Later
from whisper_nnx.audio.loading import load_audio
from whisper_nnx.runtime.cores import reader_processes
from whisper_nnx.transcription import stream
from whisper_nnx.transcription.opening import Samples, read_samples
from whisper_nnx.transcription.options import TranscribeOptions
from whisper_nnx.transcription.reading import ReadAhead

SECOND = 16_000
OPTIONS = TranscribeOptions.of(language="en")
PLAIN: dict[str, Any] = {"temperature": 0.0, "language": "en", "without_timestamps": True}


def wait_for(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.005)


def threads() -> int:
    return sum(thread.name == "read ahead" for thread in threading.enumerate())


class Reader:
    """Reads arrays whose first sample is their name; waits where it is to."""

    def __init__(self, waiting: bool = False):
        self.begun: list[int] = []
        self.threads: set[threading.Thread] = set()
        self.go_on = threading.Event()
        if not waiting:
            self.go_on.set()

    def __call__(self, source: Any, options: TranscribeOptions) -> Samples:
        self.begun.append(int(source[0]))
        self.threads.add(threading.current_thread())
        while not self.go_on.wait(0.005):
            background.check_stopped()
        background.warn(f"warned of {source[0]}")
        if source[0] % 3 == 2:
            raise ValueError(f"{source[0]} cannot be read")
        return Samples(source, None, None)


def arrays(n: int | None = None, length: int = 4) -> Iterator[tuple[Any, TranscribeOptions]]:
    numbers = itertools.count() if n is None else range(n)
    return ((np.full(length, number, np.float32), OPTIONS) for number in numbers)


def test_results_errors_and_warnings_come_in_order() -> None:
    reader = Reader()
    read = ReadAhead(arrays(7), reader, 3, threads=3)
    found = []
    for number, reading in enumerate(read):
        assert reading.number == number
        assert reading.warnings == [f"warned of {number}.0"]
        found.append(str(reading.result) if isinstance(reading.result, Exception) else reading.result.samples[0])
    assert found == [0, 1, "2.0 cannot be read", 3, 4, "5.0 cannot be read", 6]
    assert threading.current_thread() not in reader.threads
    read.close()
    assert threads() == 0


def test_as_many_are_read_ahead_as_the_batch_has_rows() -> None:
    drawn, reader = [], Reader()
    endless = (drawn.append(number) or source for number, source in enumerate(arrays()))
    read = ReadAhead(endless, reader, 5, threads=2)
    next(read)
    wait_for(lambda: len(reader.begun) == 6)
    assert len(drawn) == 6
    next(read)
    wait_for(lambda: len(reader.begun) == 7)
    time.sleep(0.02)
    assert (len(drawn), sorted(reader.begun)) == (7, [*range(7)])
    read.close()


def test_memory_of_what_is_read_ahead_is_bounded() -> None:
    reader = Reader()
    read = ReadAhead(arrays(9, SECOND), reader, 9, threads=2, max_bytes=3 * 4 * SECOND)
    next(read)
    wait_for(lambda: len(reader.begun) == 4)
    time.sleep(0.05)
    assert reader.begun == [0, 1, 2, 3]
    assert [reading.number for reading in read] == [*range(1, 9)]
    read.close()
    longer = ReadAhead(arrays(4, 9 * SECOND), reader := Reader(), 4, threads=2, max_bytes=3 * 4 * SECOND)
    next(longer)
    wait_for(lambda: len(reader.begun) == 2)
    time.sleep(0.05)
    assert reader.begun == [0, 1]  # one alone may be longer
    assert len([*longer]) == 3
    longer.close()


def test_urls_are_read_ahead_within_the_memory_that_their_headers_state(tmp_path: Path) -> None:
    urls = []
    for n in range(6):
        urls.append(f"memory://read-ahead/{n}.wav")
        with fsspec.open(urls[-1], "wb") as file:
            file.write(write_wav(tmp_path / f"{n}.wav", 1.0).read_bytes())
    begun: list[tuple[str, str]] = []

    def read(source: Any, options: TranscribeOptions) -> Samples:
        begun.append((source, threading.current_thread().name))
        return read_samples(source, options)

    with closing(ReadAhead(((url, OPTIONS) for url in urls), read, 5, threads=2, max_bytes=3 * 4 * SECOND)) as ahead:
        next(ahead)
        wait_for(lambda: len(begun) == 4)
        time.sleep(0.05)
        assert sorted(begun) == [(url, "read ahead") for url in urls[:4]]
        lengths = [len(reading.result.samples) for reading in ahead]
    assert lengths == [SECOND] * 5
    with closing(ReadAhead(iter([("memory://read-ahead/none.wav", OPTIONS)] * 2), read, 1)) as ahead:
        assert [type(reading.result) for reading in ahead] == [FileNotFoundError] * 2


def test_a_length_that_is_understated_counts_once_it_is_known(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("of no length")
    reader, begun = Reader(), []

    def read(source: Any, options: TranscribeOptions) -> Samples:
        begun.append(source)
        return reader(np.zeros(4 * SECOND, np.float32), options)

    files = ((name, OPTIONS) for name in [write_wav(tmp_path / "short.wav", 0.1)] * 4 + [tmp_path / "text.wav"])
    ahead = ReadAhead(files, read, 9, threads=1, max_bytes=6 * 4 * SECOND)
    next(ahead)
    wait_for(lambda: len(begun) == 3)  # two of four seconds: the second was begun when one was held
    time.sleep(0.05)
    assert len(begun) == 3
    assert len([*ahead]) == 4
    ahead.close()


def test_what_is_shared_or_read_once_is_read_on_the_callers_thread() -> None:
    file = io.BytesIO(b"0123456789")
    by: list[tuple[bytes, bool]] = []

    def read(source: Any, options: TranscribeOptions) -> Samples:
        data = source.read(4) if hasattr(source, "read") else source
        by.append((data, threading.current_thread() is threading.main_thread()))
        return Samples(np.zeros(1), None, None)

    read_ahead = ReadAhead(iter([(x, OPTIONS) for x in (file, b"bytes", file, file)]), read, 4, threads=3)
    for _ in read_ahead:
        pass
    assert sorted(by) == sorted([(b"0123", True), (b"4567", True), (b"89", True), (b"bytes", False)])
    assert [data for data, own in by if own] == [b"0123", b"4567", b"89"]
    read_ahead.close()


def test_closing_stops_what_is_being_read() -> None:
    reader = Reader(waiting=True)
    read = ReadAhead(arrays(), reader, 4, threads=2)
    threading.Timer(0.1, read.close).start()
    assert list(read) == []
    wait_for(lambda: threads() == 0)
    assert len(reader.begun) == 2
    assert all(thread.daemon for thread in reader.threads)  # nor does one keep the process
    assert list(read) == []


def test_a_process_ends_while_recordings_are_read() -> None:
    code = """
import sys, time
from contextlib import closing
from types import SimpleNamespace
import numpy as np
from whisper_nnx.audio.background import check_stopped
from whisper_nnx.transcription.options import TranscribeOptions
from whisper_nnx.transcription.reading import ReadAhead

def read(source, options):
    while source != b"0":
        time.sleep(0.01)
        check_stopped()
    return SimpleNamespace(samples=np.zeros(1), channels=None)

def results(ahead):
    with closing(ahead):
        yield from ahead

running = results(ReadAhead(((b"%d" % n, TranscribeOptions.of()) for n in range(9)), read, 3, threads=2))
assert next(running).number == 0
sys.exit(3)
"""
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (3, "")


# Of a call.


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    return [write_wav(folder / f"{n}.wav", seconds) for n, seconds in enumerate((2.0, 0.5, 1.5, 1.0))]


def test_an_unbounded_iterator_is_read_as_far_as_the_batch_needs(files: list[Path]) -> None:
    drawn: list[int] = []
    calls: list[tuple[float, float]] = []

    def endless() -> Iterator[Any]:
        for number in itertools.count():
            drawn.append(number)
            yield files[number % 4]

    results = iter_transcripts(
        small_model(), endless(), batch_size=2, progress=lambda *call: calls.append(call), **PLAIN
    )
    found = dict(itertools.islice(results, 12))
    assert len(drawn) <= 12 + 2 + 2 + 2 + 1  # rows, prepared, read ahead, in hand
    assert calls
    assert {whole_s for _, whole_s in calls} == {math.inf}
    assert threads() > 0
    del results
    assert threads() == 0
    alone = transcribe(small_model(), files[0], **PLAIN)
    assert found[0]["text"] == found[8]["text"] == alone["text"]


def test_an_iterator_gives_what_a_list_gives_and_its_total_is_known_at_the_end(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = small_model(), []
    sources = [files[0], files[1].read_bytes(), load_audio(files[2]), {"audio": files[3], "language": "de"}, "none.wav"]
    expected = transcribe(model, sources, batch_size=2, **PLAIN)
    options = {"batch_size": 2, "progress": lambda *call: calls.append(call), **PLAIN}
    found = dict(iter_transcripts(model, iter(sources), **options))
    assert [found[n] for n in range(4)] == expected[:4]
    assert isinstance(found[4], FileNotFoundError)
    assert str(found[4]) == str(expected[4])
    assert calls[-1] == (5.0, 5.0)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    monkeypatch.setattr(stream, "ReadAhead", lambda sources, read, depth, processes: ReadAhead(sources, read, 0))
    assert [str(x) for x in transcribe(model, sources, batch_size=2, **PLAIN)] == [str(x) for x in expected]


def test_processes_read_what_threads_read(files: list[Path], tmp_path: Path) -> None:
    model, cut = small_model(), tmp_path / "cut.wav"
    cut.write_bytes(files[0].read_bytes()[:40_000])
    sources = [Later(lambda: files[2], 1.5), files[0], files[1].read_bytes(), load_audio(files[2]), cut, "none.wav"]
    with pytest.warns(UserWarning, match="cut.wav is damaged"):
        expected = transcribe(model, sources, batch_size=3, **PLAIN)
    before = children()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        results = [
            (*one, children() - before) for one in iter_transcripts(model, sources, batch_size=3, readers=2, **PLAIN)
        ]
    found = {number: result for number, result, _ in results}
    assert [str(one.message).split(" (")[0] for one in warned] == [f"{cut} is damaged"]
    assert max(processes for *_, processes in results) == 2
    assert [found[n] for n in range(5)] == expected[:5]
    assert str(found[5]) == str(expected[5])
    assert children() == before
    assert threads() == 0


def test_readers_are_processes_where_a_cpu_is_not_busy_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whisper_nnx.runtime.cores.usable_cores", lambda: 12)
    assert [reader_processes(platform) for platform in ("cpu", "gpu", "tpu")] == [0, 9, 9]
    assert reader_processes("gpu", workers=4) == 2
    with pytest.raises(ValueError, match="readers=-1 must be a whole number"):
        iter_transcripts(small_model(), [], readers=-1)


def children() -> int:
    """How many processes read files for this one."""
    return sum(b"reader_process" in command for command in children_of(os.getpid()))


def children_of(pid: int) -> list[bytes]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            with contextlib.suppress(OSError):
                found.append(Path(f"/proc/{child}/cmdline").read_bytes())
    return found


def test_an_error_of_the_iterator_follows_the_recordings_before_it(files: list[Path]) -> None:
    def broken() -> Iterator[Any]:
        yield from files[:3]
        raise LookupError("no more")

    results = iter_transcripts(small_model(), broken(), batch_size=2, **PLAIN)
    found = dict(itertools.islice(results, 3))
    assert [isinstance(found[number], dict) for number in range(3)] == [True] * 3
    with pytest.raises(LookupError, match="no more"):
        next(results)
    assert threads() == 0


def test_warnings_reach_the_caller_on_its_thread(files: list[Path], tmp_path: Path) -> None:
    cut = tmp_path / "cut.wav"
    cut.write_bytes(files[0].read_bytes()[:40_000])
    on: list[tuple[str, bool]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: on.append(  # type: ignore[assignment]
            (str(message), threading.current_thread() is threading.main_thread())
        )
        results = transcribe(small_model(), [files[1], cut, np.zeros(SECOND, np.float32)], **PLAIN)
    assert all(isinstance(result, dict) for result in results)
    assert [(text.split(" is ")[0], own) for text, own in on] == [(str(cut), True), ("the array", True)]
    with warnings.catch_warnings(action="error"):
        _, failed, _ = transcribe(small_model(), [files[1], cut, files[0]], **PLAIN)
    assert isinstance(failed, UserWarning)
    assert "damaged" in str(failed)


def test_one_recording_takes_no_thread(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    by: set[threading.Thread] = set()

    def read(source: Any, options: TranscribeOptions) -> Samples:
        by.add(threading.current_thread())
        return read_samples(source, options)

    monkeypatch.setattr(stream, "read_samples", read)
    [only] = transcribe(small_model(), [files[0]], **PLAIN)
    assert (only["text"], by) == (transcribe(small_model(), files[0], **PLAIN)["text"], {threading.main_thread()})


@pytest.mark.parametrize(
    "one", ["a.wav", Path("a.wav"), b"", np.zeros(3), (SECOND, np.zeros(3)), {"audio": "a.wav"}, 3]
)
def test_one_recording_is_not_taken_for_several(one: Any) -> None:
    with pytest.raises(TypeError, match="give a list"):
        iter_transcripts(small_model(), one)
