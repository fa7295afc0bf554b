"""Progress in seconds of audio over all recordings, with durations from their headers."""

import io
import itertools
import math
import os
import re
import sys
import time
import wave
from pathlib import Path

import numpy as np
import pytest

from tests.small import quick_compilation, small_model  # noqa: F401
from whisper_nnx import transcribe
from whisper_nnx.output import progress
from whisper_nnx.output.progress import AudioProgress, Bar, clock, stated_duration_s

RATE = 16_000


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)


def write_wav(path: Path, seconds: float) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((noise(seconds) * 2**14).astype(np.int16).tobytes())
    return path


def test_seconds_are_shown_as_on_a_clock() -> None:
    assert [clock(s) for s in (0, 9.6, 125, 3600, 360_000)] == ["0:00", "0:10", "2:05", "1:00:00", "100:00:00"]


def test_durations_come_from_headers(tmp_path: Path, real_speech) -> None:
    assert stated_duration_s(write_wav(tmp_path / "a.wav", 2.5)) == 2.5
    assert stated_duration_s(noise(3)) == 3
    assert stated_duration_s(np.zeros((2, 8000)), 8000) == 1
    assert stated_duration_s(real_speech("en_libri_5s.flac")) == pytest.approx(5, abs=0.7)
    (tmp_path / "text.wav").write_text("not audio")
    assert [stated_duration_s(x) for x in ("-", tmp_path / "none.wav", tmp_path / "text.wav", b"", io.BytesIO())] == [
        None
    ] * 5


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_opened_for_its_duration(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert stated_duration_s(tmp_path / "pipe") is None


def test_an_unknown_duration_counts_as_the_average() -> None:
    seconds = AudioProgress([10.0, None, 20.0])
    assert seconds.now() == (0.0, 45.0)
    seconds.set(1, 3.0, 30.0)
    assert seconds.now() == (3.0, 60.0)


def test_the_share_stays_constant_after_an_understated_duration() -> None:
    seconds = AudioProgress([10.0, 10.0])
    seconds.set(0, 10.0, 10.0)
    assert seconds.now() == (10.0, 20.0)
    seconds.set(1, 0.0, 90.0)
    assert seconds.now() == (50.0, 100.0)
    seconds.set(1, 60.0, 90.0)
    assert seconds.now() == (70.0, 100.0)


def test_failed_recordings_no_longer_count() -> None:
    seconds = AudioProgress([10.0, 10.0])
    seconds.set(0, 0.0, 0.0)
    assert seconds.now() == (0.0, 10.0)


def test_an_unknown_number_of_recordings_has_no_total_until_all_are_known() -> None:
    seconds = AudioProgress(None)
    seconds.add(0, 10.0)
    seconds.set(0, 10.0, 12.0)
    seconds.forget(0)
    seconds.add(1, None)
    assert seconds.now() == (10.0, math.inf)
    seconds.is_complete = True
    assert seconds.now() == (10.0, 24.0)
    seconds.set(1, 8.0, 8.0)
    assert seconds.now() == (18.0, 20.0)


def test_updates_take_constant_time() -> None:
    """Summing over all recordings for each window would take minutes."""
    seconds = AudioProgress([1.0] * 100_000)
    started_s = time.perf_counter()
    for number in range(100_000):
        seconds.set(number, 1.0, 1.0)
        seconds.now()
    assert seconds.now() == (100_000.0, 100_000.0)
    assert time.perf_counter() - started_s < 20


@pytest.mark.parametrize("batch_size", [1, 3])
def test_progress_covers_all_files_from_the_first_call_to_their_end(tmp_path: Path, batch_size: int) -> None:
    files = [write_wav(tmp_path / f"{seconds}.wav", seconds) for seconds in (3.5, 1.0, 2.0)]
    (tmp_path / "bad.wav").write_text("not audio")
    calls: list[tuple[float, float]] = []
    sources = [*files, tmp_path / "bad.wav", noise(1.5), files[0].read_bytes()]
    options = {"temperature": 0.0, "language": "en", "without_timestamps": True}
    transcribe(small_model(), sources, batch_size=batch_size, progress=lambda *call: calls.append(call), **options)
    assert all(whole_s >= 8 for _, whole_s in calls)
    assert calls[-1] == (11.5, 11.5)
    for (before_s, of_s), (done_s, whole_s) in itertools.pairwise(calls):
        assert done_s >= before_s
        assert done_s / whole_s >= before_s / of_s - 1e-6
    assert len({done_s for done_s, _ in calls}) > 5


def test_only_the_requested_part_counts() -> None:
    calls: list[tuple[float, float]] = []
    options = {"temperature": 0.0, "language": "en", "without_timestamps": True, "offset_s": 3.0, "duration_s": 2.0}
    transcribe(small_model(), noise(6), progress=lambda *call: calls.append(call), **options)
    assert calls == [(1.0, 2.0), (2.0, 2.0)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_one_bar_with_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    with Bar(100, clock, lambda rate: f"{rate:.1f}x") as bar:
        for done in range(10, 101, 10):
            time.sleep(0.02)
            bar.update(done, 100, "fine")
    drawn = shown.getvalue().split("\r")
    assert re.fullmatch(r"100%\|.+\| 1:40 / 1:40 \[00:00<00:00, \d+\.\dx, fine\] *\n", drawn[-1])
    shares = [int(match[1]) for line in drawn if (match := re.match(r" *(\d+)%", line))]
    assert shares == sorted(shares)


def test_a_bar_without_a_total_shows_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    with Bar(math.inf, clock, lambda rate: f"{rate:.1f}x") as bar:
        time.sleep(0.11)
        bar.update(65, math.inf)
    assert re.fullmatch(r"1:05 \[00:00, \d+\.\dx\] *\n", shown.getvalue().split("\r")[-1])


def test_a_log_gets_a_line_per_minute(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    now_s = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now_s)
    with Bar(3600, clock, lambda rate: f"{rate:.1f}x real time") as bar:
        for _ in range(100):
            now_s += 6
            bar.update(3 * now_s, 3600)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "whisper-nnx: 5 %: 3:00 of 1:00:00, 3.0x real time, 19:00 left"
    assert len(lines) == 10


def test_a_line_without_a_total_shows_what_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    now_s = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now_s)
    with Bar(math.inf, clock, lambda rate: f"{rate:.1f}x real time") as bar:
        now_s = 60
        bar.update(180, math.inf)
    assert capsys.readouterr().err == "whisper-nnx: 3:00, 3.0x real time\n"


def test_a_short_run_logs_no_line(capsys: pytest.CaptureFixture) -> None:
    with Bar(10, clock, str) as bar:
        bar.update(10, 10)
    assert capsys.readouterr().err == ""
