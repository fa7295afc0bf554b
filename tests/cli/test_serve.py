"""The command `whisper-nnx serve`, as a process and its options."""

import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from tests.small import quick_environment
from whisper_nnx.cli import main
from whisper_nnx.cli.serve import _named, _settings, build_parser


def test_a_server_says_when_it_is_ready_serves_and_ends_with_status_0(digits, shared):
    options = ["--model", f"digits={digits}", "--port", "0", "--batch_size", "1", "--warm_up", "False"]
    command = [sys.executable, "-m", "whisper_nnx", "serve", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=quick_environment())
    assert process.stderr is not None
    try:
        lines = []
        while not (ready := re.search(r"ready: (http://127\.0\.0\.1:\d+) serves digits", lines[-1] if lines else "")):
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        recording = shared / "audio" / "en_short_3s.flac"
        with recording.open("rb") as file:
            answer = httpx.post(
                f"{ready[1]}/v1/audio/transcriptions",
                files={"file": file},
                data={"model": "whisper-1", "language": "en"},
                timeout=120,
            )
        assert answer.status_code == 200
        assert answer.json()["text"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_a_server_that_loads_ends_at_once(tmp_path):
    program = """
import sys, time
from whisper_nnx.cli import serve, main
serve.load_named_model = lambda *_: time.sleep(60)
sys.exit(main.main(sys.argv[1:]))
"""
    options = ["serve", "--model", str(tmp_path), "--port", "0"]
    process = subprocess.Popen([sys.executable, "-c", program, *options], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        assert "loading" in process.stderr.readline()
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_a_port_in_use_and_wrong_settings_cost_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main.main(["serve", "--port", str(port), "--model", "tiny"]) == 1
    assert re.fullmatch(
        rf"whisper-nnx: error: cannot listen on 127\.0\.0\.1, port {port}: .*\n", capsys.readouterr().err
    )
    for options, message in [
        (["--max_hours", "0"], "max_hours"),
        (["--model", "tiny", "--model", "tiny"], "two models have one name"),
        (["--max_upload", "x"], "'x' is not a whole number"),
        (["--modle", "x"], "did you mean --model"),
    ]:
        with pytest.raises(SystemExit) as ended:
            main.main(["serve", *options])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_models_have_names(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    assert _named(str(folder)) == ("mine", str(folder))
    assert _named("en=" + str(folder)) == ("en", str(folder))
    assert _named("openai/whisper-base") == ("openai/whisper-base", "openai/whisper-base")


def test_keys_come_from_the_command_or_the_environment(monkeypatch):
    monkeypatch.setenv("WHISPER_NNX_API_KEYS", "one, two")
    parser = build_parser()
    assert _settings(parser.parse_args([])).api_keys == ("one", "two")
    assert _settings(parser.parse_args(["--api_keys", "three"])).api_keys == ("three",)
    assert _settings(parser.parse_args(["--request_timeout_s", "none"])).request_timeout_s is None
