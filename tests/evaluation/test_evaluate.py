"""`evaluate` and its command: what rows are transcribed with, what is reported of them, and what is refused."""

import importlib
import json
import os
import subprocess
import sys
import warnings
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import weight_loader
from tests.small import quick_compilation, small_model, small_tokenizer  # noqa: F401
from whisper_nnx.cli.evaluate import build_parser, main
from whisper_nnx.cli.options import OPTIONS
from whisper_nnx.data.manifest import read_manifest
from whisper_nnx.evaluation.error_rates import Counts
from whisper_nnx.evaluation.run import _CompilationClock, evaluate
from whisper_nnx.runtime.startup import ENVIRONMENT

transcribe_module = importlib.import_module("whisper_nnx.transcription.stream")

Run = Callable[..., int]


def write_wav(path: Path, duration_s: float = 0.5) -> None:
    noise = np.random.default_rng(0).normal(0, 3000, round(16000 * duration_s)).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(noise.tobytes())


@pytest.fixture
def manifest(tmp_path: Path) -> Callable[..., str]:
    """Writes rows into a manifest, and beside it the audio of those that name any."""

    def write(*rows: dict[str, Any] | str, name: str = "rows.jsonl") -> str:
        for row in rows:
            if isinstance(row, dict) and not (tmp_path / row["audio"]).exists():
                write_wav(tmp_path / row["audio"])
        path = tmp_path / name
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """File -> what the model, which is faked, says of it: text, or a transcript, or an exception. "?" is its guess."""
    texts: dict[str, Any] = {"?": "fr", "asked": []}

    def iter_transcripts(model: str, sources: list[dict[str, Any]], **options: Any) -> Iterator[tuple[int, Any]]:
        texts["options"] = options
        for number, source in reversed(list(enumerate(sources))):
            texts["asked"].insert(0, (source["language"], source["task"]))
            text = texts.get(Path(source["audio"]).name, "")
            if isinstance(text, str):
                text = {"text": f" {text}", "segments": [], "language": source["language"] or texts["?"]}
            yield number, text

    monkeypatch.setattr(transcribe_module, "iter_transcripts", iter_transcripts)
    monkeypatch.setattr(weight_loader, "load_model", lambda *_, **__: "the model", raising=False)
    return texts


@pytest.fixture
def run(says: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Run:
    for name in ("PJRT_NPROC", *ENVIRONMENT):  # the command sets them; this puts them back
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def run_command(*arguments: str) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            return main(["--compilation_cache", "False", *arguments])

    return run_command


def one(audio: str, text: str = "", language: str = "de", **more: Any) -> dict[str, Any]:
    return {"audio": audio, **({"text": text} if text else {"no_speech": True}), "language": language, **more}


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def refusal(run: Run, capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The one line of a usage error."""
    with pytest.raises(SystemExit) as exit_status:
        run(*arguments)
    assert exit_status.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_errors_are_counted_printed_and_written(run, says, manifest, tmp_path, capsys) -> None:
    says |= {"a.wav": "Eins zwei, drei!", "b.wav": "Hello there"}
    rows = manifest(one("a.wav", "eins drei drei", source="x"), one("b.wav", "hello", "en", source="y"))
    assert run("--manifest", rows, "-o", str(tmp_path / "new" / "out")) == 0
    found = report(tmp_path / "new" / "out")
    assert (found["summary"]["wer"], found["summary"]["substitutions"], found["summary"]["insertions"]) == (0.5, 1, 1)
    assert [row["name"] for row in found["rows"]] == ["a.wav", "b.wav"]
    assert list(found["by_source"]) == ["x", "y"]
    shown = capsys.readouterr()
    assert "a.wav" in shown.out
    assert shown.err == ""
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == ["report.html", "report.json"]


def test_without_an_output_folder_nothing_is_written(run, says, manifest, tmp_path, monkeypatch) -> None:
    rows = manifest(one("a.wav", "eins"))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert run("--manifest", rows) == 0
    assert sorted(tmp_path.iterdir()) == before


def test_rows_keep_their_language_and_task_unless_all_are_given_another(run, says, manifest) -> None:
    rows = manifest(one("a.wav", "eins"), one("b.wav", "two", "es", task="translate"))
    for options, expected in (
        ((), [("de", "transcribe"), ("es", "translate")]),
        (("--task", "translate"), [("de", "translate"), ("es", "translate")]),
        (("--language", "French"), [("fr", "transcribe"), ("fr", "translate")]),
        (("--detect-language", "True"), [(None, "transcribe"), (None, "translate")]),
        (("--language", "auto"), [(None, "transcribe"), (None, "translate")]),
        (("--language", "Auto", "--allowed_languages", "de,es"), [(None, "transcribe"), (None, "translate")]),
        (("--default_language", "auto"), [("de", "transcribe"), ("es", "translate")]),
    ):
        says["asked"] = []
        assert run("--manifest", rows, *options) == 0
        assert says["asked"] == expected


def test_languages_that_the_model_had_to_find_are_counted(run, says, manifest, tmp_path, capsys) -> None:
    rows = manifest(one("a.wav", "un", "fr"), one("b.wav", "eins", "de"), one("c.wav", language="fr"))
    assert run("--manifest", rows, "--detect_language", "True", "-o", str(tmp_path)) == 0
    assert report(tmp_path)["summary"]["language"] == {"guessed": 2, "right": 1}  # of silence there is no language
    assert "1 of 2" in capsys.readouterr().out
    assert run("--manifest", rows, "-o", str(tmp_path)) == 0
    assert report(tmp_path)["summary"]["language"] == {"guessed": 0, "right": 0}


def test_an_automatic_language_is_detected_and_counted(says, manifest) -> None:
    summary = evaluate("the model", read_manifest(manifest(one("a.wav", "un", "fr"))).rows, language="auto").summary()
    assert (says["asked"], summary["language"]) == ([(None, "transcribe")], {"guessed": 1, "right": 1})


def test_languages_written_without_spaces_are_scored_by_characters_and_named(run, says, manifest, capsys) -> None:
    says |= {"a.wav": "今日は雨", "b.wav": "good night", "c.wav": "hello you"}
    rows = [
        one("a.wav", "今日は晴れ", "ja"),
        one("b.wav", "hello", "ja", task="translate"),
        one("c.wav", "hello you", "en"),
    ]
    assert run("--manifest", manifest(*rows)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(line.split()[:4] for line in lines if line.startswith("ja  ")) == ["ja", "1", "5", "40.00"]
    assert lines[-1] == "Written without spaces, so that each character counts as a word: ja."
    assert run("--manifest", manifest(*rows[1:])) == 0
    assert "Written without spaces" not in capsys.readouterr().out


def test_a_manifest_given_twice_is_read_once(run, says, manifest, capsys) -> None:
    rows = manifest(one("a.wav", "eins"), "{")
    assert run("--manifest", rows, rows) == 1
    errors = capsys.readouterr().err.splitlines()
    assert [line.startswith(f"whisper-nnx: {rows}:2: ") for line in errors] == [True, False]
    assert errors[1] == "whisper-nnx: 1 of 2 rows cannot be used and are left out"


def test_a_translation_is_english(says, manifest) -> None:
    says["a.wav"] = "The colour, um, is grey"
    rows = read_manifest(manifest(one("a.wav", "the color is gray", task="translate"))).rows
    evaluation = evaluate("the model", rows)
    assert evaluation.wer == 0
    assert list(evaluation.by_language()) == ["de to en"]


def test_text_where_nobody_speaks_is_an_insertion(says, manifest) -> None:
    says |= {"a.wav": "danke schön", "b.wav": ""}
    rows = read_manifest(manifest(one("a.wav"), one("b.wav", language=""))).rows
    total = evaluate("the model", rows).total
    assert (total.rates.words, total.silent, total.invented) == (Counts(insertions=2), 2, 1)


def test_bad_rows_are_named_by_their_line_and_the_others_still_evaluated(run, says, manifest, tmp_path, capsys) -> None:
    says |= {"a.wav": ValueError("a.wav holds no sound"), "b.wav": "zwei"}
    first = manifest(one("a.wav", "eins"), "", one("b.wav", "zwei"), "{", name="first.jsonl")
    second = manifest(one("b.wav", "zwei", "xx"), name="second.jsonl")
    assert run("--manifest", first, second, "-o", str(tmp_path / "out")) == 1
    errors = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in errors[:2]] == [f"{first}:4", f"{second}:1"]
    assert errors[2:] == [
        "whisper-nnx: 2 of 4 rows cannot be used and are left out",
        f"whisper-nnx: {first}:1: a.wav holds no sound",
    ]
    found = report(tmp_path / "out")
    assert (found["summary"]["recordings"], found["summary"]["failed"], found["summary"]["wer"]) == (1, 1, 0.0)
    assert len(found["about"]["rows_left_out"]) == 2


def test_rows_without_a_language_are_used_where_the_command_names_or_detects_it(run, says, manifest, capsys) -> None:
    rows = manifest(one("a.wav", "eins", ""), one("b.wav", "two", "en"))
    for options, expected in (
        ((), ["en"]),
        (("--language", "de"), ["de", "de"]),
        (("--default_language", "German"), ["de", "en"]),
        (("--default_language", "auto"), [None, "en"]),
        (("--detect_language", "True"), [None, None]),
        (("--language", "auto"), [None, None]),
    ):
        says["asked"] = []
        assert run("--manifest", rows, *options) == int(not options)
        assert [language for language, _ in says["asked"]] == expected
    assert f"{rows}:1: has no language" in capsys.readouterr().err


def test_thousands_of_rows_that_fail_are_a_line_for_each_kind(run, says, manifest, capsys) -> None:
    says |= {"a.wav": ValueError("a.wav holds no sound"), "b.wav": "two"}
    rows = manifest(*[one("a.wav", "eins", duration=1)] * 1000, one("b.wav", "two", "en"), *["{"] * 1000)
    assert run("--manifest", rows) == 1
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.endswith("; 999 more such rows: lines 1003, 1004, 1005, 1006, 1007, ...")
    assert second == "whisper-nnx: 1000 of 2001 rows cannot be used and are left out"
    assert third == f"whisper-nnx: {rows}:1: a.wav holds no sound; 999 more such rows: lines 2, 3, 4, 5, 6, ..."


def test_an_english_only_model_detects_no_languages() -> None:
    model = small_model(tokenizer=small_tokenizer(languages=()))
    with pytest.raises(ValueError, match="detect_language=True needs a multilingual checkpoint"):
        evaluate(model, [], detect_language=True)


def test_one_bad_row_of_either_kind_makes_the_exit_status_1(run, says, manifest) -> None:
    says["a.wav"] = "eins"
    assert run("--manifest", manifest(one("a.wav", "eins"))) == 0
    assert run("--manifest", manifest(one("a.wav", "eins"), "{")) == 1
    says["b.wav"] = ValueError("b.wav holds no sound")
    assert run("--manifest", manifest(one("a.wav", "eins"), one("b.wav", "zwei"))) == 1


def test_a_text_that_a_normalizer_fails_on_ends_no_evaluation(says, manifest) -> None:
    says |= {"a.wav": "9" * 5000, "b.wav": "two"}
    rows = read_manifest(manifest(one("a.wav", "one", "en"), one("b.wav", "two", "en"))).rows
    evaluation = evaluate("the model", rows)
    assert evaluation.rows[0].error.startswith("AssertionError")
    assert evaluation.wer == 0


def test_word_times_are_compared_where_both_sides_have_them(says, manifest) -> None:
    found = [{"word": " Eins", "start": 0.25, "end": 0.5}, {"word": " zwei.", "start": 0.5, "end": 0.75}]
    says["a.wav"] = {"text": " Eins zwei.", "segments": [{"words": found}], "language": "de"}
    says["b.wav"] = {"text": " Eins.", "segments": [{}], "language": "de"}
    true = [{"word": "eins", "start": 0.0, "end": 0.25}, {"word": "zwei", "start": 0.25, "end": 0.5}]
    rows = read_manifest(manifest(one("a.wav", "eins zwei", words=true), one("b.wav", "eins", words=true[:1]))).rows
    times = evaluate("the model", rows).total.times
    assert (times.words, times.starts, times.ends) == (2, (0.25, 0.25), (0.25, 0.25))
    assert evaluate("the model", rows, task="translate").total.times.words == 0


def test_options_of_transcribe_are_handed_on(run, says, manifest) -> None:
    arguments = ("--beam-size", "None", "--temperature", "0.5", "--batch_size", "3", "--word_timestamps", "True")
    assert run("--manifest", manifest(one("a.wav", "eins")), *arguments) == 0
    given = says["options"]
    assert (given.get("beam_size"), given["temperature"][0], given["batch_size"]) == (None, 0.5, 3)
    assert given["word_timestamps"] is True


def test_every_option_of_transcribe_is_offered_or_left_out_on_purpose() -> None:
    offered = {action.dest for action in build_parser()._actions}
    here = {flag.dest for flags in OPTIONS.values() for flag in flags if flag.option.evaluate}
    own = {"manifest", "normalizer", "detect_language", "default_language", "task", "output_dir", "worst", "verbose"}
    assert offered == here | own | {"help", "traceback"}
    assert not offered & {"n_best", "clip_timestamps", "diarize", "highlight_words", "recursive", "print_colors"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "arguments are required: --manifest"),
        (("--manifest", "m", "--normalizer", "french"), "invalid choice: 'french'"),
        (("--manifest", "m", "--output_format", "srt"), "unrecognized arguments: --output_format"),
        (("--manifest", "m", "--detect_language", "True", "--language", "de"), "exclude each other"),
        (("--manifest", "m", "--allowed_languages", "de"), "requires --detect_language True"),
        (("--manifest", "m", "--beam_size", "0"), "--beam_size 0 must be"),
        (("--manifest", "m", "--hallucination_silence_threshold", "1"), "set --word_timestamps True"),
    ],
)
def test_wrong_usage_is_reported_in_one_line(run, capsys, arguments, complaint) -> None:
    assert complaint in refusal(run, capsys, *arguments)


def test_what_cannot_be_read_or_written_is_reported_in_one_line_before_the_model_is_loaded(
    run, manifest, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.delattr(weight_loader, "load_model")
    rows = manifest(one("a.wav", "eins"))
    for arguments, complaint in (
        (("--manifest", str(tmp_path / "none.jsonl")), "manifest not found"),
        (("--manifest", rows, "-o", rows), "it is not a folder"),
        (("--manifest", manifest(name="empty.jsonl")), "empty.jsonl: no row can be used"),
    ):
        assert run(*arguments) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("whisper-nnx: error: ")
        assert complaint in line


def test_reports_are_written_whole_or_not_at_all(run, says, manifest, tmp_path, capsys, monkeypatch) -> None:
    out = tmp_path / "out"
    rows = manifest(one("a.wav", "eins"))
    assert run("--manifest", rows, "-o", str(out)) == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    says["a.wav"] = "zwei"

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(os, "replace", full)
        assert run("--manifest", rows, "-o", str(out)) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_half_characters_of_a_manifest_can_be_reported(run, says, manifest, tmp_path) -> None:
    rows = manifest('{"audio": "a.wav", "text": "eins \\ud800 zwei", "language": "de", "duration": 1}')
    write_wav(tmp_path / "a.wav")
    assert run("--manifest", rows, "-o", str(tmp_path / "out")) == 0
    assert report(tmp_path / "out")["rows"][0]["reference"] == "eins ? zwei"


def test_options_that_exclude_each_other_are_refused_from_python_too(manifest) -> None:
    with pytest.raises(ValueError, match="detect_language=True and language='de' exclude each other"):
        evaluate("the model", [], detect_language=True, language="de")
    with pytest.raises(ValueError, match="normalizer='x' is unknown"):
        evaluate("the model", [], normalizer="x")


def test_without_rows_there_is_nothing_but_no_error(says) -> None:
    evaluation = evaluate("the model", [])
    assert (evaluation.rows, evaluation.wer) == ((), None)


def test_a_real_model_is_evaluated_on_what_it_says_row_by_row_or_together(manifest, tmp_path) -> None:
    from whisper_nnx.transcription.stream import transcribe

    model = small_model(encoder_ffn_dim=40)  # whose programs no other test has compiled
    options = {"temperature": 0.0, "logprob_threshold": None, "no_speech_threshold": None, "max_new_tokens": 4}
    write_wav(tmp_path / "b.wav", 1.5)
    path = manifest(one("a.wav", "one two"), one("b.wav", "the one", "en"), one("a.wav", "uno", "it"))
    (tmp_path / "c.wav").write_bytes(b"no sound")
    rows = read_manifest(manifest(*Path(path).read_text().splitlines(), one("c.wav", "one", duration=1))).rows
    alone = evaluate(model, rows, **options)
    together = evaluate(model, rows, batch_size=2, **options)
    assert alone.rows == together.rows
    assert [result.error is None for result in alone.rows] == [True, True, False, False]
    text = transcribe(model, str(tmp_path / "a.wav"), language="de", **options)["text"]
    assert alone.rows[0].hypothesis == text.strip()
    assert 0 < alone.compile_s < alone.wall_s
    assert alone.total.audio_s == pytest.approx(2.0)


def test_time_of_compilation_counts_once_where_it_is_nested() -> None:
    clock = _CompilationClock()
    clock._spans_s = [(1.0, 2.0), (0.5, 3.0), (2.5, 3.5), (5.0, 6.0)]
    assert clock.seconds == pytest.approx(4.0)


def test_the_help_imports_no_jax_and_running_the_module_gives_no_warning() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "importtime", "-m", "whisper_nnx.evaluate", "--help"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert done.stdout.startswith("usage: python -m whisper_nnx.evaluate --model MODEL")
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"jax", "flax", "jiwer"}
    assert all(line.startswith("import time:") for line in done.stderr.splitlines())
