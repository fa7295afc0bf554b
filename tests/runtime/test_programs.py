"""Programs that are kept: nothing is traced for them again, and what they say stays the same."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

import whisper_nnx
from tests.small import quick_compilation, small_mel, small_model  # noqa: F401
from whisper_nnx import keep_programs, ops, transcribe, warmup
from whisper_nnx.model.layers import Linear
from whisper_nnx.runtime.programs import Program, _kept, _sources
from whisper_nnx.transcription.windows import _encode, encode_windows

NOISE = np.random.default_rng(1).normal(0, 0.1, 40_000).astype(np.float32)
OPTIONS = {"temperature": 0.0, "sample_len": 8}


@pytest.fixture
def folder(tmp_path):
    keep_programs(tmp_path)
    yield tmp_path
    keep_programs(None)


@pytest.fixture
def traced(monkeypatch):
    """Grows by a name for each program that is traced."""
    seen, made = [], Program.exported

    def tell(self, *args):
        seen.append(self.__name__)
        return made(self, *args)

    monkeypatch.setattr(Program, "exported", tell)
    return seen


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"language": "en", "beam_size": 2, "word_timestamps": True, "alignment_heads": [(1, 0)]},
        pytest.param({"best_of": 3, "temperature": 0.5, "repetition_penalty": 1.1}, marks=pytest.mark.slow),
    ],
    ids=lambda options: ",".join(options) or "greedy",
)
def test_kept_programs_say_the_same_and_are_not_traced_again(options, tmp_path, traced):
    model = small_model()
    options = {**OPTIONS, **options}
    before = transcribe(model, NOISE, **options)
    for _ in range(2):  # as in another process: what this one knows is forgotten
        keep_programs(tmp_path)
        try:
            assert transcribe(model, NOISE, **options) == before
        finally:
            keep_programs(None)
        names = sorted(file.name.partition("-")[0] for file in tmp_path.glob("*.stablehlo"))
        assert sorted(traced) == names
        assert {"_encode", "generate"} <= set(names)


def test_warmup_keeps_all_that_recordings_need(folder, traced):
    model = small_model()
    warmup(model, batch_sizes=(1, 2), **OPTIONS)
    keep_programs(folder)
    traced.clear()
    transcribe(model, [NOISE, NOISE[:9000]], batch_size=2, **OPTIONS)
    transcribe(model, NOISE, initial_prompt="a b", **OPTIONS)
    assert traced == []


def test_models_of_the_same_arrays_but_other_heads_have_programs_of_their_own(folder, traced):
    for heads in (2, 4):
        model = small_model(encoder_attention_heads=heads)
        mel = small_mel(1, config=model.config)
        np.testing.assert_allclose(encode_windows(model, mel).features, model.encode(mel), atol=1e-5)
    assert traced == ["_encode", "_encode"]


@pytest.mark.parametrize("setting", [jax.default_prng_impl("rbg"), jax.default_matmul_precision("highest")])
def test_settings_of_jax_that_change_a_program_have_programs_of_their_own(folder, traced, setting):
    model, mel = small_model(), small_mel(1)
    encode_windows(model, mel)
    with setting:
        encode_windows(model, mel)
    encode_windows(model, mel)
    assert traced == ["_encode", "_encode"]


def attending_with(factor):
    """Functions of one qualified name."""

    def attend(q, k, v, mask):
        return factor * ops.attention(q, k, v, mask)

    return attend


def test_functions_and_layers_that_are_not_of_this_package_are_never_taken_for_others(folder, traced):
    for factor in (1.0, 2.0):
        model, mel = small_model(attention_fn=attending_with(factor)), small_mel(1)
        np.testing.assert_allclose(encode_windows(model, mel).features, model.encode(mel), atol=1e-5)
    for factor in (1.0, 2.0):

        class Scaled(Linear):
            def __call__(self, inputs, factor=factor):
                return factor * super().__call__(inputs)

        model = small_model()
        model.encoder.layers[0].fc1.__class__ = Scaled
        np.testing.assert_allclose(encode_windows(model, mel).features, model.encode(mel), atol=1e-5)
    assert traced == []
    assert not list(folder.iterdir())


def test_damaged_files_and_other_versions_are_made_again(folder, traced, monkeypatch):
    model, mel = small_model(), small_mel(1)
    expected = encode_windows(model, mel).features
    for file in folder.iterdir():
        file.write_bytes(b"no program")
    keep_programs(folder)
    np.testing.assert_array_equal(encode_windows(model, mel).features, expected)
    monkeypatch.setattr("whisper_nnx.runtime.programs._sources", lambda: "another")
    keep_programs(folder)
    np.testing.assert_array_equal(encode_windows(model, mel).features, expected)
    assert len(traced) == 3
    assert len(list(folder.iterdir())) == 2  # and nothing half-written


def test_a_flipped_bit_anywhere_never_runs_another_program(folder, traced):
    model, mel = small_model(), small_mel(1)
    encode_windows(model, mel)
    (file,) = folder.iterdir()
    whole, random = file.read_bytes(), np.random.default_rng(0)
    for at in [*range(50), *random.integers(0, len(whole), 150)]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(random.integers(8))
        file.write_bytes(damaged)
        assert _kept(file) is None
    for damaged in (whole[:-1], whole[:40], b"", whole + b"\0"):
        file.write_bytes(damaged)
        assert _kept(file) is None
    keep_programs(folder)
    encode_windows(model, mel)
    assert len(traced) == 2
    file.write_bytes(whole)  # what was written stands
    assert _kept(file) is not None


def test_a_program_under_the_name_of_another_is_made_again(folder):
    model = small_model()
    for rows in (1, 2):
        encode_windows(model, small_mel(rows))
    one, two = folder.iterdir()
    one.write_bytes(two.read_bytes())
    assert _kept(one) is None
    assert _kept(two) is not None


def test_programs_that_others_can_have_written_are_made_again(folder):
    encode_windows(small_model(), small_mel(1))
    (file,) = folder.iterdir()
    file.chmod(0o666)
    assert _kept(file) is None
    file.chmod(0o644)
    assert _kept(file) is not None
    if os.getuid() == 0:
        os.chown(file, 65534, -1)
        assert _kept(file) is None


def test_eight_threads_trace_a_program_once(folder, traced):
    model, mel = small_model(), small_mel(1)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: np.asarray(encode_windows(model, mel).features), range(8)))
    assert traced == ["_encode"]
    for result in results:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.slow
def test_processes_that_start_at_once_trace_a_program_once(tmp_path):
    code = f"""
from tests.small import small_mel, small_model
from whisper_nnx import keep_programs
from whisper_nnx.runtime.programs import Program
from whisper_nnx.transcription.windows import encode_windows
made = Program.exported
Program.exported = lambda self, *args: print("traced") or made(self, *args)
keep_programs({str(tmp_path)!r})
encode_windows(small_model(), small_mel(1))
"""
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    options = {"cwd": Path(__file__).parents[2], "stdout": subprocess.PIPE, "text": True, "env": environment}
    running = [subprocess.Popen([sys.executable, "-c", code], **options) for _ in range(2)]
    assert "".join(process.communicate(timeout=300)[0] for process in running) == "traced\n"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_others_can_write_to_is_refused(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(PermissionError, match=f"other users can write to {tmp_path}"):
        keep_programs(tmp_path)


def test_where_nothing_can_be_written_it_goes_on(folder):
    folder.rmdir()
    assert encode_windows(small_model(), small_mel(1)).features.shape[0] == 1


def test_a_folder_is_made_and_what_cannot_be_one_is_refused(tmp_path):
    keep_programs(tmp_path / "new" / "programs")
    keep_programs(None)
    assert (tmp_path / "new" / "programs").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        keep_programs(tmp_path / "file")


def test_only_so_many_are_kept(folder, monkeypatch):
    monkeypatch.setattr("whisper_nnx.runtime.programs._MOST_FILES", 2)
    model = small_model()
    for rows in (1, 2, 3):
        encode_windows(model, small_mel(rows))
    assert len(list(folder.iterdir())) == 2


def test_under_transforms_it_is_plain_jit(folder, traced):
    model, mel = small_model(), small_mel(2)
    expected = encode_windows(model, mel).features
    traced.clear()
    inside = jax.jit(lambda model, mel: _encode(model.encoder, model.decoder, mel))(model, mel)
    mapped = jax.vmap(lambda one: _encode(model.encoder, model.decoder, one[None]).features[0])(mel)
    for found in (inside.features, mapped):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert traced == []


def run_python(code, **environment):
    """What it prints."""
    options = {"cwd": Path(__file__).parents[2], "env": os.environ | environment, "text": True}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, **options).stdout


def test_on_several_devices_it_is_plain_jit(tmp_path):
    code = f"""
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tests.small import quick_compilation, small_mel, small_model  # noqa: F401
from whisper_nnx import keep_programs
from whisper_nnx.transcription.windows import encode_windows
model, mel = small_model(), small_mel(2)
expected = model.encode(mel)
everywhere = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
model = jax.device_put(model, NamedSharding(everywhere, PartitionSpec()))
mel = jax.device_put(mel, NamedSharding(everywhere, PartitionSpec("rows")))
keep_programs({str(tmp_path)!r})
found = encode_windows(model, mel).features
np.testing.assert_allclose(found, expected, atol=1e-5)
print(len(found.devices()))
"""
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    assert run_python(code, XLA_FLAGS="--xla_force_host_platform_device_count=2", **quick) == "2\n"
    assert not list(tmp_path.iterdir())


def test_another_process_finds_them(folder, traced):
    text = transcribe(small_model(), np.ones(9000, np.float32), **OPTIONS)["text"]
    assert traced
    code = f"""
import numpy as np
from tests.small import small_model
from whisper_nnx import keep_programs, transcribe
from whisper_nnx.runtime.programs import Program
made = Program.exported
Program.exported = lambda self, *args: print("traced") or made(self, *args)
keep_programs({str(folder)!r})
print(ascii(transcribe(small_model(), np.ones(9000, np.float32), **{OPTIONS!r})["text"]))
"""
    assert run_python(code, JAX_DISABLE_MOST_OPTIMIZATIONS="1") == ascii(text) + "\n"


def test_the_version_is_that_of_every_module_of_the_package(monkeypatch):
    read, real = [], Path.read_bytes

    def read_bytes(path):
        read.append(path)
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    _sources.__wrapped__()
    package = Path(whisper_nnx.__file__).parent
    assert sorted(read) == sorted(package.rglob("*.py"))
    assert {file.relative_to(package).parts[0] for file in read} > {"model", "ops", "decoding", "timing", "runtime"}


def test_another_source_is_another_version(monkeypatch):
    before, real = _sources.__wrapped__(), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: real(path) + b"#" * (path.name == "layers.py"))
    assert _sources.__wrapped__() != before
