"""Tests that need eight devices: `test_devices.py` runs them in a process that has as many."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from tests.cli.test_bad_input import write_wav
from tests.small import quick_compilation, small_mel, small_model  # noqa: F401
from weight_loader import load_model, save_pretrained
from whisper_nnx import align, decode, detect_language, make_mesh, score, shard_model, transcribe, warmup
from whisper_nnx.cli.transcribe import main
from whisper_nnx.model.sharding import mesh_of
from whisper_nnx.model.whisper import Whisper
from whisper_nnx.transcription.batch import Batch
from whisper_nnx.transcription.windows import encode_windows

MESHES = {"data 8": (8, 1), "model 4": (1, 4), "data 2 x model 4": (2, 4)}
GREEDY = {"temperature": 0.0, "sample_len": 12, "no_speech_threshold": None}
BEAM = {**GREEDY, "beam_size": 3, "patience": 2.0}
SAMPLES = {**GREEDY, "temperature": 0.7, "best_of": 2, "repetition_penalty": 1.2, "language": "en"}
DECODED = {"sample_len": 9, "language": "en"}
WORDS = {**GREEDY, "word_timestamps": True, "refine_word_times": True}
RECORDINGS = [np.random.default_rng(n).normal(0, 0.1, 9_000 * (n + 1)).astype(np.float32) for n in range(4)]


@pytest.fixture(scope="module")
def model() -> Whisper:
    """Eight heads, as base."""
    return small_model(encoder_attention_heads=8, decoder_attention_heads=8, alignment_heads=[[1, 0], [1, 5]])


@pytest.fixture(scope="module", params=MESHES)
def meshed(request: pytest.FixtureRequest, model: Whisper) -> Whisper:
    return shard_model(model, make_mesh(*MESHES[request.param]))


def bytes_by_device(tree: Any) -> set[int]:
    held = dict.fromkeys(jax.devices(), 0)
    for array in jax.tree.leaves(tree):
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return {size for size in held.values() if size}


def texts(results: list[Any]) -> list[Any]:
    return [[(s["tokens"], s["text"], s["start"], s["end"]) for s in result["segments"]] for result in results]


@pytest.mark.parametrize("options", [BEAM, SAMPLES, WORDS], ids=["beam", "samples", "greedy with words"])
def test_transcripts_are_those_of_one_device(model: Whisper, meshed: Whisper, options: dict[str, Any]) -> None:
    one = transcribe(model, RECORDINGS, batch_size=3, **options)
    several = transcribe(meshed, RECORDINGS, batch_size=3, **options)
    assert texts(several) == texts(one)
    assert any(segment["tokens"] for result in one for segment in result["segments"])
    if "word_timestamps" in options:
        words = [[[word["word"] for word in s["words"]] for s in result["segments"]] for result in several]
        times = [[word["start"] for s in result["segments"] for word in s["words"]] for result in several]
        assert words == [[[word["word"] for word in s["words"]] for s in result["segments"]] for result in one]
        assert times == [[word["start"] for s in result["segments"] for word in s["words"]] for result in one]
        assert sum(map(len, times)) > 5


def test_each_device_holds_its_part(model: Whisper, meshed: Whisper) -> None:
    mesh = mesh_of(meshed)
    data, parts = mesh.shape["data"], mesh.shape["model"]
    [whole] = bytes_by_device(model)
    layers = [bytes_by_device(module.layers).pop() for module in (model.encoder, model.decoder)]
    norms = sum(x.nbytes for path, x in nnx.to_flat_state(nnx.state(model)) if "layers" in path and x.size <= 16)
    [own] = bytes_by_device(meshed)
    assert own <= whole - sum(layers) + sum(layers) / parts + norms
    mel = small_mel(8)
    [own] = bytes_by_device(encode_windows(meshed, mel).cross)
    assert own * data * parts == bytes_by_device(encode_windows(model, mel).cross).pop()


def test_other_functions_follow_the_model(model: Whisper, meshed: Whisper) -> None:
    mel = small_mel(3)
    one, several = (decode(m, mel, sample_len=9) for m in (model, meshed))
    assert [result.tokens for result in several] == [result.tokens for result in one]
    assert detect_language(meshed, mel)[0] == detect_language(model, mel)[0]
    assert detect_language(meshed, mel[0])[0] == detect_language(model, mel[0])[0]
    text = "one two and the one"
    one, several = (score(m, RECORDINGS[0], [text, "two"], language="en") for m in (model, meshed))
    assert [s.logprob for s in several] == pytest.approx([s.logprob for s in one], abs=1e-3)
    one, several = (align(m, RECORDINGS[3], text * 2, language="en")["words"] for m in (model, meshed))
    assert [(w["word"], w["start"]) for w in several] == [(w["word"], w["start"]) for w in one]


def test_warmup_compiles_all_that_a_mesh_runs(model: Whisper, compilations: list[str]) -> None:
    on_mesh, options = shard_model(model, make_mesh(2, 4)), {**GREEDY, "word_timestamps": True}
    warmup(on_mesh, (1, 3), **options)
    compilations.clear()
    transcribe(on_mesh, RECORDINGS[0], **options)
    transcribe(on_mesh, RECORDINGS, batch_size=3, **options)
    assert compilations == []


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_a_loaded_model_is_where_the_table_says(model: Whisper, tmp_path: Path, weights: str) -> None:
    save_pretrained(model, tmp_path)
    loaded = load_model(tmp_path, mesh=make_mesh(2, 4), weights=weights)
    same = shard_model(load_model(tmp_path, weights=weights), make_mesh(2, 4))
    for (path, a), (_, b) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (loaded, same)), strict=True):
        assert a.sharding == b.sharding, path
        np.testing.assert_array_equal(a[...], b[...], err_msg=str(path))
    assert decode(loaded, small_mel(2), **DECODED)[1].tokens == decode(same, small_mel(2), **DECODED)[1].tokens


def test_devices_are_an_option_of_a_call(model: Whisper) -> None:
    one = texts(transcribe(model, RECORDINGS, **GREEDY))
    for devices in (8, jax.make_mesh((2,), ("data",))):  # whose axis is Explicit
        assert texts(transcribe(model, RECORDINGS, devices=devices, **GREEDY)) == one


def test_the_command_divides_its_work(
    model: Whisper, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pretrained(model, tmp_path / "model")
    for number, samples in enumerate(RECORDINGS):
        write_wav(tmp_path / f"{number}.wav", 32767 * samples[:, None])
    files = sorted(map(str, tmp_path.glob("*.wav")))
    written, used, fill = {}, [], Batch.__init__

    def init(self: Batch, model: Whisper, *args: Any, **options: Any) -> None:
        used.append(mesh_of(model))
        fill(self, model, *args, **options)

    monkeypatch.setattr(Batch, "__init__", init)
    for name, devices in {"one": [], "all": ["--devices", "all"], "mesh": ["--mesh", "data=2,model=4"]}.items():
        arguments = ["--model", str(tmp_path / "model"), "-o", str(tmp_path / name), "-f", "json", "--batch_size", "3"]
        assert main([*files, *arguments, *devices, "--compilation_cache", "False"]) == 0
        written[name] = [json.loads(path.read_text()) for path in sorted((tmp_path / name).glob("*.json"))]
    assert [mesh and dict(mesh.shape) for mesh in used] == [None, {"data": 8, "model": 1}, {"data": 2, "model": 4}]
    assert len(written["one"]) == len(files)
    for name in ("all", "mesh"):
        assert texts(written[name]) == texts(written["one"])
    capsys.readouterr()
    for devices, line in {
        "--devices 9": "error: --devices 9 is more than there are; choose at most 8",
        "--mesh data=8,model=2": "error: a mesh of 8 x 2 devices (data x model) needs 16, but there are 8",
        "--mesh model=3": "error: a mesh of 3 parts of each layer does not divide encoder_attention_heads=8; "
        "choose a divisor",
    }.items():
        assert main([*files, *arguments, *devices.split(), "--compilation_cache", "False"]) == 1
        assert capsys.readouterr().err == f"whisper-nnx: {line}\n"
