"""The command `whisper-nnx batch`."""

import json
import os
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest

from tests.audio.test_loading import as_int16, write_wav
from tests.small import quick_compilation, quick_environment, small_model  # noqa: F401
from weight_loader import load_model, save_pretrained
from whisper_nnx import transcribe
from whisper_nnx.cli import batch as command
from whisper_nnx.cli.batch import build_parser, restored_options, stored_options
from whisper_nnx.cli.transcribe import transcribe_options
from whisper_nnx.jobs.in_process import planned, run
from whisper_nnx.jobs.inputs import read_input
from whisper_nnx.jobs.job import Job, plan
from whisper_nnx.jobs.status import results
from whisper_nnx.jobs.worker import work
from whisper_nnx.runtime.console import Terminated


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_pretrained(small_model(), folder)
    return folder


@pytest.fixture
def sounds(tmp_path):
    (tmp_path / "sounds").mkdir()
    for n in range(5):
        samples = np.random.default_rng(n).normal(size=8000 * (n + 1)) / 10
        write_wav(tmp_path / "sounds" / f"{n}.wav", as_int16(samples))
    (tmp_path / "sounds" / "broken.wav").write_text("no audio")
    return tmp_path / "sounds"


def batch(*arguments):
    command = [sys.executable, "-m", "whisper_nnx", "batch", *map(str, arguments)]
    return subprocess.run(command, env=quick_environment(), capture_output=True, text=True, timeout=300)


def test_a_folder_is_transcribed_as_by_transcribe_and_the_same_command_finds_it_done(model, sounds, tmp_path):
    arguments = [sounds, "--output", tmp_path / "job", "--model", model, "--language", "en"]
    arguments += ["--temperature_increment_on_fallback", "None", "--beam_size", "None", "-f", "srt,json"]
    first = batch(*arguments)
    assert first.returncode == 1
    assert first.stderr.splitlines()[-1] == (
        "whisper-nnx: 5 of 6 recordings done, 1 failed, 0 left; 1 of 1 shards; 0 workers"
    ), first.stderr
    rows = list(results(Job.open(tmp_path / "job")))
    expected = transcribe(load_model(model), [str(sounds / f"{n}.wav") for n in range(5)], language="en", temperature=0)
    assert [row["tokens"] for one in rows for row in one["segments"]] == [
        row["tokens"] for one in expected for row in one["segments"]
    ]
    assert [row["duration"] for row in rows] == [0.5, 1.0, 1.5, 2.0, 2.5]
    [failed] = map(json.loads, (tmp_path / "job" / "failed" / "000000.jsonl").read_text().splitlines())
    assert failed["error"] == "AudioError"

    assert batch(*arguments).stderr == first.stderr.splitlines(keepends=True)[-1]  # no worker is started
    written = sorted((tmp_path / "job" / "export" / "000000").iterdir())
    assert [path.suffix for path in written] == [".json", ".srt"] * 5
    assert json.loads(written[0].read_text()) == rows[0]
    batch("export", tmp_path / "job", "-f", "json", "-o", tmp_path / "other")
    assert (tmp_path / "other" / "000000" / written[0].name).read_bytes() == written[0].read_bytes()
    assert "holds a job with --output_format 'json,srt', not 'srt'" in batch(*arguments[:-1], "srt").stderr
    other = batch(*arguments, "--patience", "2", "--beam_size", "3")
    assert other.returncode == 1
    assert "holds a job with --beam_size None, not 3" in other.stderr
    shown = batch("status", tmp_path / "job")
    assert (shown.returncode, shown.stdout) == (0, first.stderr.splitlines()[-1].partition(": ")[2] + "\n")
    assert json.loads(batch("report", tmp_path / "job").stdout)["languages"] == {"en": 5}


def test_a_model_in_this_process_does_the_same_and_another_is_refused(sounds, tmp_path):
    found = run(small_model(), sounds, tmp_path / "job", temperature=0)
    assert (found.done, found.failed) == (5, 1)
    assert all(0 < row["language_probability"] <= 1 for row in results(Job.open(tmp_path / "job")))
    with pytest.raises(ValueError, match="was started with another model"):
        run(small_model(spread=0.5), sounds, tmp_path / "job", temperature=0)


@pytest.mark.parametrize(
    "options",
    [
        ["--beam_size", "None", "--best_of", "3", "--temperature", "0.4"],
        ["--vad_filter", "True", "--vad_threshold", "0.3", "--clip_timestamps", "0,4,5"],
        ["--initial_prompt", "a=b, --c", "--suppress_tokens", "1,2", "--word_timestamps", "True"],
        ["--alignment_heads", "1:0,2:1", "--word_timestamps", "True", "--hallucination_silence_threshold", "2"],
        ["--audio_track", "1", "--max_hours", "2", "--follow_timestamps", "False"],
        ["--bias", "Grimm, Kubernetes", "--bias_weight", "2", "--regex", "a,b|c"],
        ["--choices", "yes,no", "--hotwords", "a, b", "--suppress_regex", "x,y"],
        ["--json_schema", '{"type": "object", "properties": {"a": {"enum": ["b", "c"]}}}'],
        ["--allowed_languages", "de,French", "--compression_ratio_threshold", "None", "--length_penalty", "0.5"],
    ],
)
def test_workers_have_the_options_of_the_command(options):
    parser = build_parser()
    given = parser.parse_args(["-", "--model", "base", *options])
    stored = json.loads(json.dumps(stored_options(given)))
    assert {name.removeprefix("--") for name in options[::2]} <= {*stored, "beam_size"}  # None is its default
    worker = restored_options(stored | {"input": "-", "version": "1"})
    assert json.dumps(transcribe_options(worker)) == json.dumps(transcribe_options(given))
    assert json.loads(json.dumps(stored_options(worker))) == stored


def test_files_of_options_are_stored_as_what_is_in_them(tmp_path):
    (tmp_path / "g.gbnf").write_text('root ::= " yes" | " no"\n')
    (tmp_path / "words.txt").write_text("Grimm\t2\tgrim\nKubernetes\n")
    options = ["--grammar", str(tmp_path / "g.gbnf"), "--bias", str(tmp_path / "words.txt")]
    given = build_parser().parse_args(["-", *options])
    expected = transcribe_options(given)
    stored = json.loads(json.dumps(stored_options(given)))
    assert str(tmp_path) not in json.dumps(stored)
    found = transcribe_options(restored_options(stored))
    assert found["bias"] == expected["bias"]
    assert found["grammar"] == (tmp_path / "g.gbnf").read_text()


@pytest.mark.parametrize(("interrupt", "status"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_an_interrupted_worker_leaves_the_line_to_the_command_that_has_started_it(
    sounds, tmp_path, monkeypatch, capsys, interrupt, status
):
    plan(tmp_path / "job", read_input(str(sounds)), {"input": str(sounds)})

    def interrupted(*_):
        raise interrupt

    monkeypatch.setattr(command, "_as_worker", interrupted)
    assert command.main(["work", str(tmp_path / "job"), "--worker_name=a"]) == status
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(command, "_supervised", interrupted)
    assert command.main(["work", str(tmp_path / "job")]) == status
    assert capsys.readouterr().err == "whisper-nnx: interrupted\n"


def test_wrong_use_is_one_line(tmp_path, model, monkeypatch):
    for arguments, message in (
        ([tmp_path], "--output FOLDER is required"),
        ([tmp_path / "nowhere", "--output", tmp_path / "job", "--model", model], "nowhere: no such file, folder or"),
        ([tmp_path, "--output", tmp_path / "job", "--model", "tubro"], "unknown model 'tubro'; give a folder"),
        (["status", tmp_path], "holds no planned job; start one with its input"),
        ([tmp_path, "--output", tmp_path / "job", "--workers", "0"], "--workers 0 must be at least 1"),
        ([tmp_path, "--output", tmp_path / "job", "--shard_s", "-1"], "--shard_s -1 must be above 0"),
        ([tmp_path, "--output", tmp_path / "job", "--expires_s", "0"], "--expires_s 0 must be above 0"),
        ([tmp_path, "--output", tmp_path / "job", "-f", "srt,doc"], "'doc' is unknown; choose txt,"),
        ([tmp_path, "--output", tmp_path / "job", "-f", "srt", "--max_len", "9"], "requires --token_timestamps True"),
        (
            [tmp_path, "--output", tmp_path / "job", "--temperature_increment_on_fallback", "0"],
            "--temperature_increment_on_fallback must be above 0",
        ),
        (
            [tmp_path, "--output", tmp_path / "job", "--device", "gpu", "--workers", "3"],
            "--workers 3: each needs a GPU, but CUDA_VISIBLE_DEVICES=0,1 has 2",
        ),
        (
            [tmp_path, "--output", tmp_path / "job", "--device", "gpu:1", "--workers", "2"],
            "--device gpu:1 is one device, but each of --workers 2 has a GPU of its own; drop the number",
        ),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        ended = batch(*arguments)
        assert ended.returncode in (1, 2)
        assert message in ended.stderr
        assert len(ended.stderr.splitlines()) == 1
        assert not os.path.exists(tmp_path / "job")


def one_line_of(capsys, *arguments):
    with suppress(SystemExit):
        assert command.main([str(one) for one in arguments]) == 1
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_jobs_that_were_planned_in_python_or_by_another_version_are_refused(sounds, tmp_path, capsys, monkeypatch):
    planned(sounds, tmp_path / "job", 60.0, {"beam_size": 2}, {})
    assert "was planned in Python; continue it there" in one_line_of(capsys, "work", tmp_path / "job")
    plan(tmp_path / "other", read_input(str(sounds)), {"model": "demo"})
    monkeypatch.setattr(command, "__version__", "9")
    assert "was planned by version" in one_line_of(capsys, "work", tmp_path / "other")


def test_options_of_subtitles_need_results_with_words(sounds, tmp_path, capsys):
    plan(tmp_path / "job", read_input(str(sounds)), {"model": "demo"})
    line = one_line_of(capsys, "export", tmp_path / "job", "-f", "srt", "--max_line_width", "20")
    assert "--max_line_width 20 requires --word_timestamps True" in line


@pytest.mark.filterwarnings("default")
def test_a_planned_job_names_local_files_by_absolute_paths(sounds, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "_supervised", lambda plan, args: plan(1) and 0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokens").mkdir()
    arguments = ["sounds", "--output=job", "--model=demo", "--tokenizer=tokens", "--word_timestamps", "-f=srt"]
    assert command.main([*arguments, "--max_line_count=2"]) == 0
    assert "--max_line_count has no effect without --max_line_width" in capsys.readouterr().err
    settings = Job.open("job").settings
    assert (settings["model"], settings["tokenizer"]) == ("demo", str(tmp_path / "tokens"))


def test_workers_share_the_cores_that_the_command_may_use(monkeypatch):
    monkeypatch.setattr(command, "usable_cores", lambda: 6)
    monkeypatch.setattr("whisper_nnx.runtime.cores.usable_cores", lambda: 12)
    shared = build_parser().parse_args(["-", "--workers=3"])
    assert "--threads=2" in command._machine_flags(shared, 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not [flag for flag in command._machine_flags(shared, 3) if "readers" in flag]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert "--readers=3" in command._machine_flags(shared, 3)
    assert "--readers=0" in command._machine_flags(build_parser().parse_args(["-", "--workers=3", "--readers=0"]), 3)


def test_what_failed_again_is_named_and_tried_with_another_flag(sounds, tmp_path, monkeypatch, capsys):
    def supervised(plan, args):
        found = plan(1)
        work(found, lambda paths: ((n, OSError("away")) for n, _ in enumerate(paths)))
        retried.append((found.folder / "retried" / "000000.jsonl").read_text().count("\n") if retried else 0)
        return 0

    retried, line = list[int](), "6 failed again for the same reason, and stay failed; --retry_all tries them once more"
    monkeypatch.setattr(command, "_supervised", supervised)
    for flag in ("--device=cpu", "--retry_failed", "--retry_failed", "--retry_all"):
        command.main([str(sounds), "--output", str(tmp_path / "job"), "--model", "tiny", flag])
    assert retried == [0, 6, 6, 12]
    assert capsys.readouterr().err == f"whisper-nnx: {line}\n"


@pytest.mark.parametrize(
    ("flags", "visible", "expected"),
    [
        (["--workers=3"], None, ["0", "1", "0"]),
        (["--workers=3"], "2,5,7", ["2", "5", "7"]),
        (["--workers=3"], "", [None] * 3),
        (["--workers=3", "--device=gpu"], None, ["0", "1", "2"]),
        (["--workers=3", "--device=cpu"], None, [None] * 3),
        (["--workers=3", "--devices=2"], None, [None] * 3),
        ([], None, [None]),
    ],
)
def test_workers_on_a_machine_with_two_gpus_have_one_each(tmp_path, monkeypatch, flags, visible, expected):
    monkeypatch.setattr(command, "_GPUS", tmp_path)
    for name in ("0000:1b:00.0", "0000:43:00.0"):
        (tmp_path / name).mkdir()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    args = build_parser().parse_args(["-", *flags])
    found = [command._own_gpu(args, place).get("CUDA_VISIBLE_DEVICES") for place in range(args.workers or 1)]
    assert found == expected


def test_without_gpus_nothing_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_GPUS", tmp_path / "none")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert command._own_gpu(build_parser().parse_args(["-", "--workers=2"]), 1) == {}
