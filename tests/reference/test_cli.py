"""The command line against that of openai-whisper: the same options, the same defaults, the same work asked for."""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import whisper

import weight_loader
from whisper_nnx.cli.options import RECORDING
from whisper_nnx.cli.transcribe import build_parser, main
from whisper_nnx.runtime.options import options_of
from whisper_nnx.transcription.options import CallOptions

reference = importlib.import_module("whisper.transcribe")
ours = importlib.import_module("whisper_nnx.transcription.stream")

RESULT = {"text": "one", "segments": [], "language": "en"}
# What the machine decides (the reference asks CUDA when it builds its parser, and takes float16 where it can), or the
# checkpoint, which may say that it is not to be told the text before.
DECIDED_LATER = {"device", "fp16", "condition_on_previous_text"}


class _Results(list):
    """What `iter_transcripts` gives."""

    empty: ClassVar = {}


class _ParserSeen(Exception):
    pass


@pytest.fixture
def their_parser(monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    seen: list[argparse.ArgumentParser] = []

    def parse_args(parser: argparse.ArgumentParser, *_: Any) -> None:
        seen.append(parser)
        raise _ParserSeen

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with pytest.raises(_ParserSeen):
            reference.cli()
    return seen[0]


def options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {name: action for action in parser._actions for name in action.option_strings}


def test_every_option_of_openai_whisper_exists_with_its_default(their_parser: argparse.ArgumentParser) -> None:
    known = options(build_parser())
    theirs = options(their_parser)
    assert not theirs.keys() - known.keys()
    different = {name for name in theirs if known[name].default != theirs[name].default}
    assert different == {f"--{name}" for name in DECIDED_LATER}


def test_every_beginning_of_an_option_that_is_enough_there_is_enough_here(
    their_parser: argparse.ArgumentParser,
) -> None:
    parser = build_parser()
    for name in options(their_parser):
        for length in range(3, len(name)) if name.startswith("--") else ():
            beginning = name[:length]
            if len(their_parser._get_option_tuples(beginning)) == 1:
                assert [found[1] for found in parser._get_option_tuples(beginning)] == [name]


def test_every_choice_of_openai_whisper_is_accepted(their_parser: argparse.ArgumentParser) -> None:
    parser = build_parser()
    for name, action in options(their_parser).items():
        for choice in action.choices or ():
            if name != "--model":
                parser.parse_args(["a.wav", name, choice])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--temperature", "0.3", "--temperature_increment_on_fallback", "0.1"],
        ["--temperature", "0.2", "--temperature_increment_on_fallback", "None"],
        ["--beam_size", "3", "--patience", "2.0", "--length_penalty", "0.5"],
        ["--beam_size", "None", "--best_of", "None"],
        ["--task", "translate", "--language", "fr", "--suppress_tokens", "1,2", "--verbose", "False"],
        ["--initial_prompt", "None", "--carry_initial_prompt", "True", "--condition_on_previous_text", "False"],
        ["--compression_ratio_threshold", "None", "--logprob_threshold", "-2", "--no_speech_threshold", "None"],
        ["--word_timestamps", "True", "--hallucination_silence_threshold", "1.5", "--append_punctuations", "!"],
        ["--clip_timestamps", "0,5,7", "--prepend_punctuations", ""],
    ],
)
def test_the_same_command_asks_for_the_same_work(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def transcribe(model: Any, audio: str, **asked_for: Any) -> dict[str, Any]:
        asked.append(asked_for)
        return RESULT

    def iter_transcripts(model: Any, audio: list[str], **asked_for: Any) -> _Results:
        return _Results([(0, transcribe(model, *audio, **asked_for))])

    monkeypatch.setattr(whisper, "load_model", lambda *args, **kwargs: None)
    monkeypatch.setattr(weight_loader, "load_model", lambda *args, **kwargs: None, raising=False)
    monkeypatch.setattr(reference, "transcribe", transcribe)
    monkeypatch.setattr(ours, "iter_transcripts", iter_transcripts)
    (tmp_path / "a.wav").touch()
    monkeypatch.chdir(tmp_path)
    command = ["a.wav", "--output_dir", str(tmp_path), *arguments]
    monkeypatch.setattr(sys, "argv", ["whisper", *command])
    reference.cli()
    assert main([*command, "--compilation_cache", "False"]) == 0
    theirs, our = asked
    del theirs["fp16"]
    defaults = {name: one.default for name, one in options_of(CallOptions, *RECORDING).items() if name in theirs}
    our = {**defaults, **our}  # the command passes on what differs from them
    our["condition_on_previous_text"] = our["condition_on_previous_text"] is not False
    assert {**our, "temperature": list(our["temperature"])} == {**theirs, "temperature": list(theirs["temperature"])}
