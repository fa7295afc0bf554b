"""The command as a whole: its options, and in a process of its own what it imports, prints and leaves behind."""

from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

from tests.cli.command import FAKED, python
from whisper_nnx.audio.options import VadOptions
from whisper_nnx.cli.options import OPTIONS, RECORDING, CommandOptions, as_flags
from whisper_nnx.cli.transcribe import main
from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.output.subtitles import SubtitleOptions
from whisper_nnx.runtime.options import Scope, options_of
from whisper_nnx.transcription.fallback import FallbackOptions
from whisper_nnx.transcription.options import CallOptions, TranscribeOptions
from whisper_nnx.transcription.other_names import OPENAI_OPTIONS

KINDS = (CommandOptions, CallOptions, *RECORDING, VadOptions, SubtitleOptions)


def test_every_field_describes_itself_and_is_a_flag_or_says_why_not() -> None:
    undescribed = {f"{kind.__name__}.{f.name}" for kind in KINDS for f in fields(kind) if "option" not in f.metadata}
    assert undescribed == {f"TranscribeOptions.{name}" for name in ("longform", "fallback", "decoding")}
    flags = {flag.dest: flag for flags in OPTIONS.values() for flag in flags}
    expected = set()
    for kind in KINDS:
        for name, one in options_of(kind).items():
            assert one.scope in get_args(Scope)
            assert one.help == one.help.strip()
            if not one.python_only:
                expected.add(f"vad_{name}" if kind is VadOptions else name)
    assert flags.keys() == expected
    assert flags.keys() >= OPENAI_OPTIONS


def test_options_have_the_scope_of_their_class() -> None:
    assert all(one.scope == "window" for one in options_of(DecodingOptions, FallbackOptions).values())
    assert {one.scope for one in options_of(CallOptions).values()} == {"call"}
    assert {one.scope for one in options_of(TranscribeOptions, VadOptions).values()} == {"recording"}
    assert {one.scope for one in options_of(SubtitleOptions).values()} == {"output"}


def test_the_help_of_an_option_names_flags_and_its_default() -> None:
    flags = {flag.dest: flag for flags in OPTIONS.values() for flag in flags}
    assert flags["max_hours"].help.endswith("(default: 24)")
    assert as_flags(flags["n_best"].help).endswith("at most --beam_size or --best_of")
    assert [flag.dest for flag in OPTIONS["task"]][:4] == ["task", "language", "detect_language", "allowed_languages"]
    assert OPTIONS["performance"][0].dest == "batch_size"


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
