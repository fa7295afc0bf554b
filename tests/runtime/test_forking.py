"""After JAX was used, a forked child gets an error instead of hanging; other children are left alone."""

import multiprocessing
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import whisper_nnx
from tests.small import small_model
from whisper_nnx.text.languages import to_language_code

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
TIMEOUT_S = 60
SOUND = np.sin(np.arange(16_000) / 7).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model()  # whose parameters are JAX's arrays


def in_fork(work: Callable[[], Any]) -> str:
    """What `work` returns or raises in a forked child, as text; fails where the child hangs."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        try:
            answer = repr(work())
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        sender.send(answer)
        os._exit(0)  # no clean-up of what belongs to the parent

    process = context.Process(target=child)
    with warnings.catch_warnings(action="ignore"):  # JAX and Python warn of forks
        process.start()
    try:
        assert receiver.poll(TIMEOUT_S), "the child hangs"
        return receiver.recv()
    finally:
        process.kill()
        process.join()


USES: dict[str, Callable[[Any], Any]] = {
    "transcribe": lambda model: whisper_nnx.transcribe(model, SOUND, language="en"),
    "transcribe a list": lambda model: whisper_nnx.transcribe(model, [SOUND], language="en"),
    "iter_segments": lambda model: next(whisper_nnx.iter_segments(model, SOUND)),
    "warmup": lambda model: whisper_nnx.warmup(model),
    "align": lambda model: whisper_nnx.align(model, SOUND, "one two"),
    "score": lambda model: whisper_nnx.score(model, SOUND, ["one two"]),
    "find_alignment_heads": lambda model: whisper_nnx.find_alignment_heads(model, [(SOUND, "one two")], 1),
    "decode": lambda model: whisper_nnx.decode(model, np.zeros((8, 100), np.float32)),
    "detect_language": lambda model: whisper_nnx.detect_language(model, np.zeros((8, 100), np.float32)),
    "log_mel_spectrogram": lambda _: whisper_nnx.log_mel_spectrogram(SOUND),
    "load_model": lambda _: whisper_nnx.load_model("demo"),
    "create_whisper": lambda model: whisper_nnx.create_whisper(model.config),
    "encode": lambda model: model.encode(np.zeros((1, 8, 100), np.float32)),
    "the model": lambda model: model(np.zeros((1, 8, 100), np.float32), np.zeros((1, 4), np.int32)),
}


@pytest.mark.parametrize("use", USES)
def test_a_child_forked_after_use_gets_an_error_that_names_the_way_out(model: Any, use: str) -> None:
    answer = in_fork(lambda: USES[use](model))
    assert answer.startswith("RuntimeError: this process was forked after JAX was used")
    assert "get_context('spawn')" in answer


def test_an_iterator_begun_in_the_parent_is_refused_in_the_child_and_goes_on_in_the_parent(model: Any) -> None:
    results = whisper_nnx.iter_transcripts(model, [SOUND] * 4, language="en")
    next(results)
    assert "forked after JAX was used" in in_fork(lambda: next(results))
    assert len(list(results)) == 3


def test_a_child_of_the_child_gets_it_too(model: Any) -> None:
    answer = in_fork(lambda: in_fork(lambda: whisper_nnx.log_mel_spectrogram(SOUND)))
    assert "forked after JAX was used" in answer


def test_a_child_that_needs_no_jax_is_left_alone(model: Any) -> None:
    assert in_fork(lambda: to_language_code("German")) == "'de'"
    assert in_fork(lambda: whisper_nnx.load_audio(SOUND).shape) == "(16000,)"
    started = [sys.executable, "-c", "import jax.numpy as jnp; print(jnp.arange(3).sum())"]
    shown = subprocess.run(started, capture_output=True, text=True, timeout=TIMEOUT_S, env=os.environ)
    assert shown.stdout == "3\n"


def test_the_parent_goes_on_after_a_fork(model: Any) -> None:
    in_fork(lambda: 0)
    assert whisper_nnx.log_mel_spectrogram(SOUND).shape == (80, 100)


def test_a_child_forked_before_any_use_works() -> None:
    code = """
import os, numpy, whisper_nnx
pid = os.fork()
mel = whisper_nnx.log_mel_spectrogram(numpy.ones(16_000, numpy.float32))
print("parent" if pid else "child", mel.shape, flush=True)
if pid:
    assert os.waitpid(pid, 0)[1] == 0
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=environment)
    assert sorted(done.stdout.splitlines()) == ["child (80, 100)", "parent (80, 100)"]


def test_a_fork_after_the_caller_alone_used_jax_is_seen() -> None:
    code = """
import os, warnings, numpy, jax.numpy, whisper_nnx
warnings.simplefilter("ignore")
jax.numpy.zeros(3)
if pid := os.fork():
    assert os.waitpid(pid, 0)[1] == 0
else:
    try:
        whisper_nnx.log_mel_spectrogram(numpy.ones(16_000, numpy.float32))
    except RuntimeError as error:
        print(error, flush=True)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=environment)
    assert done.stdout.startswith("this process was forked after JAX was used")
