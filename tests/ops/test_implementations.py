"""Which implementation is traced; that none is taken for another, and that all transcribe to the same result."""

import os
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.small import quick_compilation, small_mel, small_model  # noqa: F401
from whisper_nnx import keep_programs, ops, transcribe
from whisper_nnx.ops.cpu.operations import kernels_usable
from whisper_nnx.runtime.programs import Program
from whisper_nnx.transcription.windows import encode_windows

NOISE = np.random.default_rng(1).normal(0, 0.1, 24_000).astype(np.float32)
OPTIONS = {
    "language": "en",
    "temperature": 0.0,
    "sample_len": 8,
    "word_timestamps": True,
    "alignment_heads": [(1, 0)],
}


def times_of(result):
    return [(word["start"], word["end"]) for segment in result["segments"] for word in segment.get("words", ())]


@pytest.mark.parametrize("options", [{}, pytest.param({"beam_size": 2}, marks=pytest.mark.slow)], ids=str)
def test_every_implementation_transcribes_to_the_same(options):
    model = small_model()
    results = []
    for name in ("reference", "cpu", "accelerator"):
        with ops.using(name):
            results.append(transcribe(model, [NOISE, NOISE[:9000]], batch_size=2, **OPTIONS | options))
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            assert [s["tokens"] for s in ours["segments"]] == [s["tokens"] for s in theirs["segments"]]
            assert times_of(ours) == times_of(theirs)


def test_a_jitted_function_is_traced_anew_in_another_implementation():
    traced = []

    @jax.jit
    def double(x):
        traced.append(ops.current().name)
        return 2 * x

    for name in ("reference", "accelerator", "reference", "accelerator"):
        with ops.using(name):
            double(jnp.ones(3))
    double(jnp.ones(3))
    assert traced == ["reference", "accelerator", ops.current().name]


def test_a_program_that_was_kept_in_one_implementation_is_not_run_in_another(tmp_path, monkeypatch):
    traced, made = [], Program.exported
    monkeypatch.setattr(Program, "exported", lambda self, *args: traced.append(ops.current().name) or made(self, *args))
    model, mel = small_model(), small_mel(1)
    own = replace(ops.named("reference"), name="own")
    for _ in range(2):
        keep_programs(tmp_path)
        for implementation in ("reference", "accelerator", own):
            with ops.using(implementation):
                encode_windows(model, mel)
        keep_programs(None)
    assert traced == ["reference", "accelerator"]  # one that is not of this package is not kept


def test_a_program_that_was_kept_for_one_device_is_not_run_on_several(tmp_path, monkeypatch):
    traced, made = [], Program.exported
    monkeypatch.setattr(Program, "exported", lambda self, *args: traced.append(jax.device_count()) or made(self, *args))
    model, mel = small_model(), small_mel(1)
    for devices in (1, 2, 1, 2):
        monkeypatch.setattr(jax, "device_count", lambda devices=devices: devices)
        keep_programs(tmp_path)
        encode_windows(model, mel)
        keep_programs(None)
    assert traced == [1, 2]


@pytest.mark.parametrize("name", ["cpu", pytest.param("accelerator", marks=pytest.mark.slow)])
def test_what_is_lowered_for_another_processor_has_no_custom_call_of_ours(name, monkeypatch):
    lowered = {}

    def lower(self, *args, **options):
        if self.__name__ not in lowered:
            traced = self.jitted.trace(*args, **options)
            lowered[self.__name__] = [
                traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "cuda", "tpu")
            ]
        return self.jitted(*args, **options)

    monkeypatch.setattr(Program, "__call__", lower)
    wide = {"d_model": 64, "encoder_attention_heads": 1, "decoder_attention_heads": 1}  # what the kernels take
    with ops.using(name):
        transcribe(small_model(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, **wide), NOISE[:9000], **OPTIONS)
    assert lowered.keys() >= {"_encode", "generate", "token_times"}
    for _, *others in lowered.values():
        assert not any("whisper_nnx." in text for text in others)
    cpu, *_ = lowered["token_times"]
    assert ("whisper_nnx.FirstPositions" in cpu) == (name == "cpu" and kernels_usable())


def test_the_environment_chooses_and_a_wrong_choice_is_one_line():
    code = """
import os
from whisper_nnx import ops
try:
    ops.current()
except ValueError as error:
    print(error)
os.environ["WHISPER_NNX_OPS"] = "accelerator"
print(ops.current().name)
"""
    options = {"env": os.environ | {"WHISPER_NNX_OPS": "gpu"}, "stdout": subprocess.PIPE, "text": True, "check": True}
    assert subprocess.run([sys.executable, "-c", code], **options).stdout.splitlines() == [
        "WHISPER_NNX_OPS='gpu' is unknown; choose one of reference, cpu, accelerator",
        "accelerator",
    ]
    with pytest.raises(ValueError, match="operations 'gpu' are unknown; choose one of reference"):
        ops.using("gpu")
