"""The command line with a faked model behind it: fixtures for tests of what it hands on and prints."""

import importlib
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import weight_loader
from tests.small import quick_environment
from whisper_nnx.cli.transcribe import main
from whisper_nnx.runtime.startup import ENVIRONMENT

RESULT = {"text": " hello", "segments": [{"id": 0, "start": 0.0, "end": 1.0, "text": " hello"}], "language": "en"}
transcribe_module = importlib.import_module("whisper_nnx.transcription.stream")

# The whole command, for a process of its own: writes one transcript of the faked model to the folder that it is given.
FAKED = """
import sys
class Results(list):
    empty = {}
def iter_transcripts(model, audio, **options):
    print("a segment")
    return Results([(0, {"text": " hello", "segments": []})])
import whisper_nnx.transcription.stream
sys.modules["whisper_nnx.transcription.stream"].iter_transcripts = iter_transcripts
import weight_loader
weight_loader.load_model = lambda *args, **options: None
from whisper_nnx.cli.transcribe import main
sys.exit(main(["-", "--output_dir", sys.argv[1], "--compilation_cache", "False"]))
"""

Run = Callable[..., int]


def python(*arguments: str, stdout: Any = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """Runs Python in a process of its own, where nothing is imported yet."""
    return subprocess.run(
        [sys.executable, *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=100,
        env=quick_environment(),
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What the command asked of the loader and, for each recording, of `iter_transcripts`, which both do nothing."""
    made: list[tuple[str, dict[str, Any]]] = []

    def load_model(name: str, **options: Any) -> str:
        made.append((name, options))
        return "the model"

    def result(file: str, options: dict[str, Any]) -> dict[str, Any]:
        made.append((file, options))
        return RESULT

    monkeypatch.setattr(weight_loader, "load_model", load_model, raising=False)
    transcribes(monkeypatch, result)
    return made


class Results:
    """As `transcribe.Transcripts`."""

    def __init__(self, results: Iterable[tuple[int, Any]], empty: dict[int, str], unfinished: dict[int, Any]):
        self._results, self.empty = iter(results), empty
        self.unfinished = lambda: unfinished

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return self._results


def transcribes(
    monkeypatch: pytest.MonkeyPatch,
    result: Callable[[str, dict[str, Any]], Any],
    empty: dict[int, str] | None = None,
    unfinished: dict[int, Any] | None = None,
) -> None:
    """Lets `iter_transcripts` give, or raise, what `result` makes of each file and the options."""

    def iter_transcripts(model: str, audio: list[str], **options: Any) -> Results:
        results = ((number, result(file, options)) for number, file in enumerate(audio))
        return Results(results, empty or {}, unfinished or {})

    monkeypatch.setattr(transcribe_module, "iter_transcripts", iter_transcripts)


@pytest.fixture
def run(calls: list, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command, in a folder with some files to transcribe."""
    monkeypatch.chdir(tmp_path_factory.mktemp("recordings"))
    Path("b").mkdir()
    for file in ("a.wav", "b.wav", "c.wav", "bad.wav", "--odd-name.wav", "b/a.mp3", "b/c.mp3"):
        Path(file).touch()
    for name in ("PJRT_NPROC", *ENVIRONMENT):  # the command sets them; this puts them back
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def run_command(*arguments: str) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            return main(["--output_dir", str(tmp_path), "--compilation_cache", "False", *arguments])

    return run_command
