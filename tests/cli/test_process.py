"""The command as a whole: its options, and in a process of its own what it imports, prints and leaves behind."""

from pathlib import Path

import pytest

from tests.cli.command import FAKED, python
from whisper_nnx.cli.options import OPTIONS, OWN_OPTIONS, SUBTITLE_OPTIONS, TRANSCRIBE_OPTIONS
from whisper_nnx.cli.transcribe import main


def test_every_option_is_in_the_help_and_goes_somewhere() -> None:
    names = {name.removeprefix("--") for options in OPTIONS.values() for name, *_ in options}
    openais = {*TRANSCRIBE_OPTIONS, *SUBTITLE_OPTIONS, "temperature", "temperature_increment_on_fallback"}
    openais |= {"model", "model_dir", "output_dir", "output_format", "device", "fp16", "threads"}
    assert names | {"version", "traceback"} == openais | OWN_OPTIONS


def test_version_names_ours_and_that_of_jax(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_status:
        main(["--version"])
    assert exit_status.value.code == 0
    assert capsys.readouterr().out.startswith("whisper-nnx 0.")


def test_help_imports_neither_jax_nor_numpy() -> None:
    code = """
import sys
from whisper_nnx.cli.transcribe import main
try:
    main(["--help"])
finally:
    print({"jax", "numpy", "av", "huggingface_hub"} & sys.modules.keys())
"""
    shown = python("-c", code).stdout
    assert shown.startswith("usage: whisper-nnx [options] audio [audio ...]")
    assert shown.endswith("set()\n")


def test_the_module_is_the_same_command_under_its_own_name() -> None:
    done = python("-m", "whisper_nnx.transcribe", "--help")
    assert done.stdout.startswith("usage: python -m whisper_nnx.transcribe [options]")
    assert done.stderr == ""


def test_a_reader_that_leaves_stops_no_writing_and_shows_no_traceback(tmp_path: Path) -> None:
    no_reader = """
import os
reading, writing = os.pipe()
os.close(reading)
os.dup2(writing, 1)
"""
    done = python("-c", no_reader + FAKED, str(tmp_path))
    assert (done.returncode, done.stderr) == (141, "")
    assert len(list(tmp_path.iterdir())) == 5


def test_a_real_recording_becomes_subtitles(digits: Path, shared: Path, tmp_path: Path) -> None:
    arguments = ("--model", str(digits), "--output_dir", str(tmp_path / "out"), "--language", "en", "--beam-size=None")
    cache = ("--compilation_cache", str(tmp_path / "cache"))
    files = (str(shared / "audio" / "en_short_3s.flac"), str(tmp_path / "missing.wav"))
    done = python("-m", "whisper_nnx.transcribe", *arguments, *cache, *files)
    assert done.returncode == 1
    assert done.stderr == f"whisper-nnx: {files[1]}: No such file or directory; check the path\n"
    written = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "out").iterdir()}
    assert sorted(written) == [f"en_short_3s.{format}" for format in ("json", "srt", "tsv", "txt", "vtt")]
    assert all(line in done.stdout for line in written["en_short_3s.txt"].splitlines())
    assert list((tmp_path / "cache").glob("*_threads/*-cache"))
