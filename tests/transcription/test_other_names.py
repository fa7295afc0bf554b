"""Options that other packages call otherwise are answered with their name here."""

import inspect
import re
from dataclasses import fields

import pytest

from whisper_nnx.cli.parser import spelled_out
from whisper_nnx.cli.transcribe import build_parser, main
from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.transcription.fallback import FallbackOptions
from whisper_nnx.transcription.longform import LongformOptions
from whisper_nnx.transcription.options import TranscribeOptions
from whisper_nnx.transcription.other_names import OTHER_KEYWORDS, OTHER_OPTIONS


def keywords() -> set[str]:
    """All that `transcribe` takes."""
    kinds = (TranscribeOptions, LongformOptions, FallbackOptions, DecodingOptions)
    return {f.name for kind in kinds for f in fields(kind)} | {"temperature", "verbose", "batch_size", "progress"}


@pytest.mark.parametrize("name", OTHER_OPTIONS)
def test_an_option_of_another_command_is_answered_in_one_line(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_status:
        main(["a.wav", name.replace("_", "-"), "1"])
    assert exit_status.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"whisper-nnx: error: {name.replace('_', '-')} {OTHER_OPTIONS[name]}")


def test_answers_name_options_that_exist_and_hide_none() -> None:
    own = {*build_parser()._option_string_actions}
    assert not own & OTHER_OPTIONS.keys()
    for answer in OTHER_OPTIONS.values():
        assert {*re.findall(r"(?<!\S)--\w+", answer)} <= own, answer


def test_answers_name_keywords_that_exist_and_hide_none() -> None:
    assert not keywords() & OTHER_KEYWORDS.keys()
    for name, answer in OTHER_KEYWORDS.items():
        if found := re.match(r"is (\w+)(=\S+)? here", answer):
            assert found[1] in keywords(), name


def test_a_keyword_of_another_package_is_answered() -> None:
    with pytest.raises(TypeError, match="no option 'log_prob_threshold': it is logprob_threshold here"):
        TranscribeOptions.of(log_prob_threshold=-1.0)
    with pytest.raises(TypeError, match=r"'compute_type': it is given when the model is loaded: load_model\(.*int8"):
        TranscribeOptions.of(compute_type="int8")
    with pytest.raises(TypeError, match="no option 'beem_size'; did you mean beam_size"):
        TranscribeOptions.of(beem_size=5)


@pytest.mark.parametrize(("class_name", "function"), [("WhisperModel", "__init__"), ("WhisperModel", "transcribe")])
def test_all_of_faster_whispers_names_are_known(class_name: str, function: str) -> None:
    faster_whisper = pytest.importorskip("faster_whisper")
    named = inspect.signature(getattr(getattr(faster_whisper, class_name), function)).parameters
    ours = keywords() | {"self", "audio", "model_size_or_path", "files", "model_kwargs", "revision", "use_auth_token"}
    assert {*named} - ours - OTHER_KEYWORDS.keys() == ({"local_files_only"} if function == "__init__" else set())


def spelled(*arguments: str) -> list[str]:
    return spelled_out(arguments, build_parser())


def test_a_flag_alone_is_true() -> None:
    assert spelled("--diarize", "a.wav") == ["--diarize=True", "a.wav"]
    assert spelled("a.wav", "--word-timestamps") == ["a.wav", "--word_timestamps=True"]
    assert spelled("--vad_filter", "--verbose", "False") == ["--vad_filter=True", "--verbose", "False"]
    assert spelled("--word", "-") == ["--word=True", "-"]
    assert spelled("--diarize", "--", "--diarize") == ["--diarize=True", "--", "--diarize"]
    assert spelled("--verbose", "none", "--beam_size", "5") == ["--verbose", "none", "--beam_size", "5"]


def test_a_flags_wrong_value_is_no_file(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["a.wav", "--diarize", "yes"])
    assert "'yes' is neither True nor False" in capsys.readouterr().err


def test_a_misspelled_option_is_answered_with_the_likely_one(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["a.wav", "--beem_size=5"])
    assert "unrecognized arguments: --beem_size=5; did you mean --beam_size?" in capsys.readouterr().err
