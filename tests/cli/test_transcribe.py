"""The command line: what it hands on, what it refuses, and how it says so. The model behind it is faked here."""

# ruff: noqa: F811
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import weight_loader
from tests.cli.command import RESULT, Results, Run, calls, run, transcribe_module, transcribes  # noqa: F401
from whisper_nnx.cli.options import RECORDING
from whisper_nnx.runtime.options import options_of
from whisper_nnx.transcription.options import CallOptions


def fails(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """bad.wav does: an exception is its result, an interruption ends all."""

    def result(file: str, _: dict[str, Any]) -> Any:
        if file == "bad.wav" and not isinstance(error, Exception):
            raise error
        return error if file == "bad.wav" else RESULT

    transcribes(monkeypatch, result)


def refusal(run: Run, capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The one line of a usage error."""
    with pytest.raises(SystemExit) as exit_status:
        run(*arguments)
    assert exit_status.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_every_file_is_transcribed_and_written_in_every_format(run: Run, tmp_path: Path) -> None:
    assert run("a.wav", "b/c.mp3") == 0
    formats = ("json", "srt", "tsv", "txt", "vtt")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.{f}" for name in "ac" for f in formats]


def test_standard_input_is_written_to_stdin(run: Run, tmp_path: Path, calls: list) -> None:
    assert run("-f", "txt", "-") == 0
    assert (tmp_path / "stdin.txt").read_text(encoding="utf-8") == "hello\n"
    assert calls[-1][0] == "-"


def test_hyphens_and_underscores_are_the_same_in_names_of_options_only(run: Run, calls: list) -> None:
    arguments = ("--beam-size=7", "--best-of", "3", "--initial-prompt=a-b --beam-size", "--", "--odd-name.wav")
    assert run("--clip_timestamps", "0,1", *arguments) == 0
    audio, options = calls[-1]
    assert (audio, options["beam_size"], options["best_of"]) == ("--odd-name.wav", 7, 3)
    assert options["initial_prompt"] == "a-b --beam-size"


def test_a_value_that_looks_like_an_unknown_option_is_left_alone(run: Run, calls: list) -> None:
    assert run("a.wav", "--initial_prompt", "--so-called=x y") == 0
    assert calls[-1][1]["initial_prompt"] == "--so-called=x y"


def test_beginnings_of_options_are_understood(run: Run, calls: list) -> None:
    assert run("a.wav", "--lang", "de", "--word-time", "true") == 0
    assert (calls[-1][1]["language"], calls[-1][1]["word_timestamps"]) == ("de", True)


@pytest.mark.parametrize("language", ["de", "DE", "German", "german"])
def test_languages_go_by_code_and_name_in_any_case(run: Run, calls: list, language: str) -> None:
    assert run("a.wav", "--language", language) == 0
    assert calls[-1][1]["language"] == "de"


def test_phrases_may_be_in_a_file(run: Run, calls: list, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = tmp_path / "words.txt"
    words.write_text("Blücher, the Elder\t3\tBlucher\nWaterloo", encoding="utf-8")
    assert run("a.wav", "--bias", str(words)) == 0
    assert calls[-1][1]["bias"] == (("Blücher, the Elder", 3.0, ("Blucher",)), ("Waterloo", None, ()))
    assert run("a.wav", "--bias", "Blücher, Waterloo", "--bias_weight", "3") == 0
    assert [phrase.text for phrase in calls[-1][1]["bias"]] == ["Blücher", "Waterloo"]
    words.write_bytes(b"\xff")
    assert "cannot be read as UTF-8 text" in refusal(run, capsys, "a.wav", "--bias", str(words))


def test_none_switches_off(run: Run, calls: list) -> None:
    names = ("beam_size", "best_of", "language", "verbose", "logprob_threshold", "suppress_tokens")
    assert run("a.wav", *(word for name in names for word in (f"--{name}", "None"))) == 0
    defaults = {name: one.default for name, one in options_of(CallOptions, *RECORDING).items()}
    assert [{**defaults, **calls[-1][1]}[name] for name in names] == [None] * len(names)


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        (["--max_new_tokens", "9", "--max_repeats", "3"], {"max_new_tokens": 9, "max_repeats": 3}),
        (
            ["--repetition_penalty", "1.1", "--no_repeat_ngram_size", "3"],
            {"repetition_penalty": 1.1, "no_repeat_ngram_size": 3},
        ),
        (
            ["--suppress_regex", "[0-9]", "--without_timestamps", "True"],
            {"suppress_regex": "[0-9]", "without_timestamps": True},
        ),
        (
            ["--n_best", "2", "--diarize", "True", "--tinydiarize", "True"],
            {"n_best": 2, "diarize": True, "tinydiarize": True},
        ),
        (
            ["--grammar", 'root ::= "a"', "--grammar-rule", "root", "--grammar-penalty", "100"],
            {"grammar": 'root ::= "a"', "grammar_penalty": 100.0},
        ),
        (["--choices", "Yes., No."], {"choices": ("Yes.", "No.")}),
        (["--hotwords", "Flax, NNX", "--max_context", "0"], {"hotwords": "Flax, NNX", "max_context": 0}),
        (["--offset_s", "1.5", "--duration_s", "3"], {"offset_s": 1.5, "duration_s": 3.0}),
        (["--independent_clips", "True", "--batch_size", "4"], {"independent_clips": True, "batch_size": 4}),
        (["--token_timestamps", "True", "--multilingual", "True"], {"token_timestamps": True, "multilingual": True}),
        (
            ["--language_detection_segments", "4", "--language_detection_threshold", "0.7"],
            {"language_detection_segments": 4, "language_detection_threshold": 0.7},
        ),
        (["--allowed_languages", "de, French"], {"allowed_languages": ["de", "fr"]}),
        (["--print_colors", "True"], {"print_colors": True}),
        (["--token_timestamps", "True", "--alignment_heads", "2"], {"token_timestamps": True, "alignment_heads": 2}),
        (
            ["--vad_filter", "True", "--vad_threshold", "0.3", "--vad-speech-pad-ms", "100"],
            {"vad_filter": True, "vad_parameters": {"threshold": 0.3, "speech_pad_ms": 100}},
        ),
    ],
)
def test_options_of_our_own_are_handed_on_where_they_are_set(
    run: Run, calls: list, arguments: list[str], given: dict[str, Any]
) -> None:
    assert run("a.wav") == 0
    assert run("a.wav", *arguments) == 0
    without, options = (options for audio, options in calls if audio == "a.wav")
    assert options == {**without, **given}


def test_several_formats_are_written(run: Run, tmp_path: Path) -> None:
    assert run("a.wav", "--output_format", "lrc,csv") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.lrc"]


def test_files_of_a_batch_are_written_as_soon_as_each_is_done(
    run: Run, calls: list, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def results() -> Iterator[tuple[int, Any]]:
        yield 2, RESULT
        assert [path.name for path in tmp_path.iterdir()] == ["c.txt"]
        yield 0, FileNotFoundError(2, "No such file or directory", "a.wav")
        yield 1, RESULT

    def iter_transcripts(model: str, audio: list[str], **options: Any) -> Results:
        assert (audio, options["batch_size"]) == (["a.wav", "b.wav", "c.wav"], 2)
        return Results(results(), {}, {})

    monkeypatch.setattr(transcribe_module, "iter_transcripts", iter_transcripts)
    assert run("a.wav", "b.wav", "c.wav", "--batch_size", "2", "-f", "txt") == 1
    assert capsys.readouterr().err == "whisper-nnx: a.wav: No such file or directory\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.txt", "c.txt"]


def test_what_ends_a_batch_is_one_line_and_what_was_done_stays(
    run: Run, calls: list, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def result(file: str, _: dict[str, Any]) -> dict[str, Any]:
        if file == "b.wav":
            raise KeyError("start")
        return RESULT

    transcribes(monkeypatch, result)
    assert run("a.wav", "b.wav", "--batch_size", "2", "-f", "txt") == 1
    message = "whisper-nnx: error: KeyError: 'start' (unexpected: --traceback shows where it happened)\n"
    assert capsys.readouterr().err == message
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("arguments", "temperatures"),
    [
        ([], (0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0)),  # numpy's steps
        (["--temperature", "0.5"], (0.5, 0.7, 0.8999999999999999)),
        (["--temperature_increment_on_fallback", "None"], (0.0,)),
        (["--temperature", "1.5"], (1.5,)),
    ],
)
def test_temperatures_rise_by_the_increment(run: Run, calls: list, arguments: list[str], temperatures: tuple) -> None:
    assert run("a.wav", *arguments) == 0
    assert calls[-1][1]["temperature"] == temperatures


@pytest.mark.parametrize(
    ("arguments", "dtype", "warning"),
    [
        ([], None, ""),  # the default of load_model
        (["--fp16", "False"], "float32", ""),
        (["--fp16", "True"], "float32", "warning: float16 is slow on the CPU; using float32"),
        (["--dtype", "float16"], "float16", ""),
        (["--dtype", "float16", "--fp16", "True"], "float16", ""),
        (["--dtype", "bfloat16"], "bfloat16", ""),
    ],
)
def test_numbers_on_the_cpu(
    run: Run, calls: list, capsys: pytest.CaptureFixture, arguments: list[str], dtype: str, warning: str
) -> None:
    assert run("a.wav", "--device", "cpu", *arguments) == 0
    where = dict.fromkeys(("tokenizer", "cache_dir", "revision", "token"))
    assert calls[0] == ("turbo", {"dtype": dtype, "weights": None, "kv_cache_dtype": None, **where})
    assert warning in capsys.readouterr().err


@pytest.mark.parametrize(("fp16", "dtype"), [("True", "float32"), ("True", "bfloat16"), ("False", "float16")])
def test_contradicting_numbers_are_refused(run: Run, capsys: pytest.CaptureFixture, fp16: str, dtype: str) -> None:
    line = refusal(run, capsys, "a.wav", "--fp16", fp16, "--dtype", dtype)
    assert f"--fp16 {fp16} contradicts --dtype {dtype}; drop one of the two" in line


def test_where_the_model_comes_from_reaches_the_loader(run: Run, calls: list) -> None:
    arguments = ("--model", "me/mine", "--model_dir", "x", "--revision", "v2", "--token", "t", "--tokenizer", "y")
    arguments += ("--weights", "int8", "--kv_cache_dtype", "int8")
    assert run("a.wav", *arguments) == 0
    where = {"tokenizer": "y", "cache_dir": "x", "revision": "v2", "token": "t"}
    assert calls[0] == ("me/mine", {"dtype": None, "weights": "int8", "kv_cache_dtype": "int8", **where})


def test_a_draft_is_loaded_as_the_model_is(run: Run, calls: list) -> None:
    greedy = ("--model", "tiny", "--beam_size", "None", "--weights", "int8", "--revision", "v2")
    assert run("a.wav", *greedy, "--draft", "my-draft") == 0
    (_, of_model), (name, of_draft) = calls[:2]
    assert (name, of_draft) == ("my-draft", {**of_model, "revision": None})
    calls.clear()
    assert run("a.wav", *greedy, "--draft", "ngram") == 0
    assert [name for name, _ in calls] == ["tiny", "a.wav"]


def test_the_number_of_threads_is_set_before_xla_starts(run: Run) -> None:
    assert run("a.wav", "--threads", "3") == 0
    assert os.environ["PJRT_NPROC"] == "3"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--language", "klingon"], "language 'klingon' is unknown to Whisper"),
        (["--verbose", "maybe"], "'maybe' is neither True nor False"),
        (["--beam_size", "x"], "argument --beam_size: invalid int value: 'x'"),
        (["--beam_size", "0"], "--beam_size 0 must be a whole number of at least 1"),
        (["--temperature", "-1"], "--temperature -1.0 must be 0 or more"),
        (["--temperature_increment_on_fallback", "0"], "must be above 0, or None"),
        (["--length_penalty", "2"], "--length_penalty 2.0 must be between 0 and 1"),
        (["--suppress_tokens", "a,b"], "--suppress_tokens 'a,b' must be comma-separated ids"),
        (["--clip_timestamps", "5,2"], "ends before it starts"),
        (["--hallucination_silence_threshold", "1"], "set --word_timestamps True"),
        (["--highlight_words", "True"], "--highlight_words requires --word_timestamps True"),
        (["--max_line_width", "40"], "--max_line_width requires --word_timestamps True"),
        (["--max_line_width", "-4"], "'-4' is not a whole number of 0 or more"),
        (["--device", "abacus"], "'abacus' is not a device"),
        (["b/a.mp3"], "a.wav and b/a.mp3 would all be written to a.txt; rename them, or run once for each"),
        (["--unknown"], "unrecognized arguments: --unknown"),
        (["--output_format", "srt,doc"], "--output_format/-f: 'doc' is unknown; choose txt, vtt"),
        (["--output_format", "srt,json_full"], "--output_format json_full requires --token_timestamps True"),
        (["--max_len", "9"], "--max_len requires --token_timestamps True"),
        (["--max_len", "9", "--split_on_word", "True"], "--max_len requires --word_timestamps True"),
        (["--split_on_word", "True", "--word_timestamps", "True"], "give --max_len too"),
        (
            ["--max_len", "9", "--token_timestamps", "True", "--word_timestamps", "True", "--max_line_width", "9"],
            "--max_len 9 and --max_line_width 9 split cues by different rules; drop one of them",
        ),
        (["--batch_size", "0"], "'0' must be at least 1"),
        (["--vad_threshold", "0.3"], "--vad_threshold requires --vad_filter True"),
        (["--vad_filter", "True", "--vad_threshold", "3"], "error: --vad_threshold 3.0 must be a probability"),
        (["--allowed_languages", "de,klingon"], "language 'klingon' is unknown to Whisper"),
        (
            ["--allowed_languages", "de,fr", "--language", "de"],
            "--allowed_languages ('de', 'fr') and --language 'de' both",
        ),
        (["--multilingual", "True", "--language", "de"], "--multilingual True detects each window's language"),
        (["--language_detection_threshold", "0.7"], "set --language_detection_segments too"),
        (["--print_colors", "True", "--verbose", "False"], "--print_colors changes what --verbose True prints"),
        (["--offset_s", "-1"], "--offset_s -1.0 must be 0 s or more"),
        (["--duration_s", "5", "--clip_timestamps", "1,2"], "drop one or the other"),
        (["--grammar", "colors.gbnf"], "--grammar 'colors.gbnf': is neither an existing file nor a grammar"),
        (["--regex", "("], "--regex '(': is not a valid regular expression"),
        (["--choices", "yes,no", "--regex", "y"], "choices and regex both state"),
        (["--suppress_regex", "("], "is not a valid regular expression"),
        (["--repetition_penalty", "0"], "--repetition_penalty 0.0 must be above 0"),
        (["--max_repeats", "1"], "--max_repeats 1 must"),
        (["--n_best", "9"], "--n_best 9 needs --beam_size"),
        (["--bias", "one\t-2"], "--bias: bias has the weight '-2' for 'one'"),
        (["--bias_weight", "0"], "--bias_weight 0.0 must be above 0"),
        (["--draft", "ngram"], "--beam_size 5: a draft needs greedy decoding; set --beam_size None"),
    ],
)
def test_wrong_usage_is_refused_in_one_line_before_work_begins(
    run: Run, calls: list, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    line = refusal(run, capsys, "a.wav", *arguments)
    assert line.startswith("whisper-nnx: error: ")
    assert message in line
    assert not re.search(r"\w=", line)  # keyword arguments
    assert not calls


def test_messages_about_keyword_arguments_name_flags(
    run: Run, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def result(file: str, _: dict[str, Any]) -> Exception:
        warnings.warn("batch_size=4 has no effect: vad_filter=True, or independent_clips, cuts", stacklevel=1)
        return ValueError("stream=5 does not exist in ./max_len=1.wav or max_len.wav; drop diarize, or max_hours.")

    transcribes(monkeypatch, result)
    assert run("a.wav") == 1
    assert capsys.readouterr().err.splitlines() == [
        "whisper-nnx: warning: --batch_size 4 has no effect: --vad_filter True, or --independent_clips, cuts",
        "whisper-nnx: a.wav: --audio_track 5 does not exist in ./max_len=1.wav or max_len.wav; "
        "drop --diarize, or --max_hours.",
    ]


def test_a_missing_device_is_refused_with_those_that_are_there(run: Run, capsys: pytest.CaptureFixture) -> None:
    assert run("a.wav", "--device", "cpu:99") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("whisper-nnx: error: there is no device cpu:99, but cpu:0")


def test_an_output_folder_that_cannot_be_used_is_refused_before_work_begins(
    run: Run, calls: list, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    assert run("a.wav", "-o", str(tmp_path / "file")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("whisper-nnx: error: cannot write to output folder")
    assert not calls


def test_a_model_that_cannot_be_loaded_is_one_line(
    run: Run, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_model(name: str, **options: Any) -> None:
        raise FileNotFoundError(f"{name} does not exist")

    monkeypatch.setattr(weight_loader, "load_model", load_model)
    assert run("a.wav", "--model", "./nowhere") == 1
    assert capsys.readouterr().err == "whisper-nnx: error: ./nowhere does not exist\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("bad.wav is empty; give a recording"), "bad.wav is empty; give a recording"),
        (ValueError("not\nspeech"), "bad.wav: not speech"),
        (FileNotFoundError(2, "No such file or directory", "bad.wav"), "bad.wav: No such file or directory"),
        (
            KeyError("start"),
            "bad.wav: KeyError: 'start' (unexpected: --traceback shows where it happened)",
        ),
    ],
)
def test_a_file_that_fails_is_one_line_and_the_others_are_done(
    run: Run,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error: Exception,
    message: str,
) -> None:
    fails(monkeypatch, error)
    assert run("a.wav", "bad.wav", "c.wav", "-f", "txt") == 1
    assert capsys.readouterr().err == f"whisper-nnx: {message}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "c.txt"]


def test_traceback_shows_where_an_error_happened(
    run: Run, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails(monkeypatch, KeyError("start"))
    assert run("bad.wav", "--traceback") == 1
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback (most recent call last):")
    assert printed.endswith("whisper-nnx: bad.wav: KeyError: 'start'\n")


def test_interruption_ends_the_command_without_a_traceback(
    run: Run, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails(monkeypatch, KeyboardInterrupt())
    assert run("bad.wav", "c.wav") == 130
    assert capsys.readouterr().err == "whisper-nnx: interrupted\n"


def test_warnings_are_shown_as_one_line_and_only_while_the_command_runs(
    run: Run, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def result(file: str, _: dict[str, Any]) -> dict[str, Any]:
        warnings.warn("quiet\nplease", stacklevel=1)
        return RESULT

    transcribes(monkeypatch, result)
    before = warnings.showwarning
    assert run("a.wav") == 0
    assert capsys.readouterr().err == "whisper-nnx: warning: quiet please\n"
    assert warnings.showwarning is before


@pytest.mark.parametrize(
    ("arguments", "warning"),
    [
        (["--max_line_count", "2"], "--max_line_count has no effect without --max_line_width"),
        (
            ["--max_line_count", "2", "--max_line_width", "9", "--max_words_per_line", "2"],
            "--max_words_per_line has no effect with the other two limits",
        ),
    ],
)
def test_subtitle_options_without_effect_are_pointed_out(
    run: Run, capsys: pytest.CaptureFixture, arguments: list[str], warning: str
) -> None:
    assert run("a.wav", "--word_timestamps", "True", *arguments) == 0
    assert capsys.readouterr().err == f"whisper-nnx: warning: {warning}\n"
