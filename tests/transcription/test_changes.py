"""The options as editors and type checkers see them: a module that is written from the fields.

`python -m tests.transcription.test_changes` writes it anew.
"""

import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.runtime.options import options_of
from whisper_nnx.transcription import changes
from whisper_nnx.transcription.fallback import FallbackOptions
from whisper_nnx.transcription.longform import LongformOptions
from whisper_nnx.transcription.options import CallOptions, TranscribeOptions

FILE = Path(changes.__file__)
CLASSES: dict[str, tuple[str, tuple[type, ...], str]] = {
    "DecodingChanges": ("TypedDict, total=False", (DecodingOptions,), "Fields of `DecodingOptions`."),
    "RecordingChanges": (
        "TypedDict, total=False",
        (FallbackOptions, DecodingOptions, LongformOptions, TranscribeOptions),
        "Options of a recording: all that `TranscribeOptions.of` takes.",
    ),
    "TranscribeChanges": ("RecordingChanges, total=False", (CallOptions,), "All that `transcribe` takes."),
}


def written() -> str:
    parts = [FILE.read_text().split("\nclass ")[0].rstrip()]
    for name, (base, kinds, text) in CLASSES.items():
        # `prompt` is for single windows.
        options = [one for one in options_of(*kinds).values() if (name, one.name) != ("RecordingChanges", "prompt")]
        lines = [f'class {name}({base}):\n    """{text}"""\n', *(f"    {one.name}: {one.accepts}" for one in options)]
        parts.append("\n".join(lines))
    return "\n\n\n".join(parts) + "\n"


def test_the_types_are_those_of_the_fields() -> None:
    assert FILE.read_text() == written(), "run python -m tests.transcription.test_changes"
    for name in CLASSES:
        assert typing.get_type_hints(getattr(changes, name))  # every name in them can be resolved


@pytest.mark.slow
def test_type_checkers_see_the_options(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text("""
from whisper_nnx import TranscribeOptions, Whisper, decode, iter_segments, iter_transcripts, transcribe, warmup
def use(model: Whisper, options: TranscribeOptions) -> None:
    reveal_type(transcribe(model, "a.wav", language="en", beam_size=5, batch_size=2, temperature=(0.0, 0.5)))
    reveal_type(transcribe(model, ["a.wav"], options, word_timestamps=True))
    iter_segments(model, "a.wav", options, verbose=True)
    iter_transcripts(model, ["a.wav"], suppress_tokens=[1, 2])
    warmup(model, (1, 2), options, best_of=2)
    decode(model, None, temperature=0.5)
    transcribe(model, "a.wav", beam_size="five")
    iter_segments(model, "a.wav", beem_size=5)
    warmup(model, batch_size=5)
    decode(model, None, hotwords="a")
""")
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", str(tmp_path / "user.py")],  # with the cache and settings of the repository
        capture_output=True,
        text=True,
        cwd=FILE.parents[2],
    ).stdout
    assert re.findall(r"user.py:(\d+): error: .*?\[([\w-]+)\]$", checked, re.MULTILINE) == [
        ("10", "call-overload"),
        *((number, "call-arg") for number in ("11", "12", "13")),
    ], checked
    one, several = re.findall(r'Revealed type is "([^(]*)', checked)
    assert (one, several) == ("TypedDict", "list[TypedDict")
    assert 'did you mean "beam_size"?' in checked


if __name__ == "__main__":
    FILE.write_text(written())
