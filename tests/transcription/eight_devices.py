"""Tests that need eight devices: `test_devices.py` runs them in a process that has as many."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from tests.cli.test_bad_input import write_wav
from tests.ops.test_fused import interpreted, normal, value_and_slopes
from tests.small import quick_compilation, small_mel, small_model  # noqa: F401
from tests.transcription.test_moving_up import check_moving_up
from weight_loader import load_model, save_pretrained
from whisper_nnx import (
    align,
    decode,
    detect_language,
    keep_programs,
    make_mesh,
    ops,
    score,
    shard_model,
    transcribe,
    warmup,
)
from whisper_nnx.audio.features import RecordingMel
from whisper_nnx.cli.transcribe import main
from whisper_nnx.model.whisper import Whisper
from whisper_nnx.ops import fused, reference
from whisper_nnx.runtime.flat import flat
from whisper_nnx.transcription import row_decoder
from whisper_nnx.transcription.windows import encode_windows

GREEDY = {"temperature": 0.0, "sample_len": 12, "no_speech_threshold": None}
BEAM = {**GREEDY, "beam_size": 3, "patience": 2.0}
SAMPLES = {**GREEDY, "temperature": 0.7, "best_of": 2, "repetition_penalty": 1.2, "word_timestamps": True}
WORDS = {**GREEDY, "word_timestamps": True, "refine_word_times": True}
RECORDINGS = [np.random.default_rng(n).normal(0, 0.1, 9_000 * (n + 1)).astype(np.float32) for n in range(3)]


@pytest.fixture(scope="module")
def model() -> Whisper:
    """Eight heads, as base."""
    return small_model(encoder_attention_heads=8, decoder_attention_heads=8, alignment_heads=[[1, 0], [1, 5]])


@pytest.fixture(scope="module")
def meshed(model: Whisper) -> Whisper:
    return shard_model(model, make_mesh(2, 4))


def of_segments(results: list[Any]) -> list[Any]:
    """Tokens and times of transcripts, and of their words."""
    words = [[w for s in result["segments"] for w in s.get("words", [])] for result in results]
    return [
        [[(s["tokens"], s["text"], s["start"], s["end"]) for s in result["segments"]] for result in results],
        [[(word["word"], word["start"], word["end"]) for word in own] for own in words],
    ]


def transcribed(model: Whisper, options: dict[str, Any], **more: Any) -> list[Any]:
    return of_segments(transcribe(model, RECORDINGS, batch_size=2, **options, **more))


def test_layers_are_divided_over_model(model: Whisper) -> None:
    found, words = transcribed(model, WORDS, devices=make_mesh(1, 4))
    assert [found, words] == transcribed(model, WORDS)
    assert sum(map(len, words)) > 3


NESTED = 'root ::= " "? ("one" | "(" root ")")'  # parsed on the host


def test_each_part_of_a_mesh_asks_the_host_about_its_rows(model: Whisper, meshed: Whisper) -> None:
    def decoded(model: Whisper) -> list[tuple[int, ...]]:
        return [result.tokens for result in decode(model, small_mel(2), language="de", grammar=NESTED)]

    expected = decoded(model)
    assert len(set(expected)) == 2
    assert decoded(shard_model(model, make_mesh(2))) == expected
    assert decoded(shard_model(model, make_mesh(1, 4))) == expected
    with pytest.raises(ValueError, match=r"not regular cannot be used on a mesh of 2 x 4 devices \(data x model\)"):
        decoded(meshed)


def test_the_cache_is_moved_up_on_a_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    begin, moved = row_decoder.begin, []

    def watched(*args: Any) -> Any:
        before = [x.sharding for x in jax.tree.leaves(args[4])]
        begun = begin(*args)
        moved.extend(x.shape for x, old in zip(jax.tree.leaves(begun), before, strict=True) if x.sharding != old)
        return begun

    monkeypatch.setattr(row_decoder, "begin", watched)
    check_moving_up(monkeypatch, devices=make_mesh(2))
    assert not moved  # idle rows are placed as those that are decoded


def test_a_step_sums_over_the_devices_what_three_blocks_of_a_layer_add(
    meshed: Whisper, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance, programs = row_decoder.advance, set()

    def watched(*args: Any) -> Any:
        programs.add(advance.jitted.lower(*map(flat, args)).compile().as_text())
        return advance(*args)

    monkeypatch.setattr(row_decoder, "advance", watched)
    with ops.using("accelerator"):
        transcribed(meshed, GREEDY)
    (program,) = programs
    summed = re.findall(r"= (\S+)\{[\d,]*\} all-reduce\(", program)
    assert summed == [f"f32[1,{meshed.config.d_model}]"] * 3 * meshed.config.decoder_layers
    assert "all-gather(" not in program


def test_both_are_divided_and_warmup_compiles_all_that_is_run(
    model: Whisper, meshed: Whisper, compilations: list[str]
) -> None:
    expected = transcribed(model, SAMPLES)
    warmup(meshed, (1,), **SAMPLES)
    compilations.clear()
    assert transcribed(meshed, SAMPLES) == expected
    assert compilations == []


@pytest.mark.real
def test_a_real_checkpoint_transcribes_on_two_devices_as_on_one(real_tiny_en: Path, real_speech: Any) -> None:
    model = load_model(real_tiny_en)
    audio = [real_speech(name) for name in ("en_libri_5s.flac", "en_lj_2s.wav")]
    one, two = (transcribe(model, audio, batch_size=2, temperature=0.0, devices=devices) for devices in (1, 2))
    assert of_segments(two) == of_segments(one)
    assert all(result["text"] for result in one)


@pytest.mark.parametrize("heads", [4, 2])
def test_each_device_computes_fused_attention_of_its_rows_and_heads(
    monkeypatch: pytest.MonkeyPatch, heads: int
) -> None:
    """On four devices; a head alone on each is what the kernel cannot compute."""
    sharding = NamedSharding(make_mesh(2, 2), PartitionSpec("data", "model"))
    monkeypatch.setattr(fused, "usable", lambda: ("cpu",))
    monkeypatch.setattr(fused, "KERNELS", {"cpu": interpreted})
    inputs = [normal(2, heads, 128, 64, dtype=jnp.bfloat16) for _ in range(3)]
    expected = value_and_slopes(reference.attention, *inputs)
    placed = jax.device_put(inputs, sharding)
    program = jax.jit(lambda *inputs: fused.attention(*inputs), out_shardings=sharding).lower(*placed).compile()
    assert ("all-gather" in program.as_text()) == (heads == 2)
    for found, exact in zip(jax.jit(partial(value_and_slopes, fused.attention))(*placed), expected, strict=True):
        np.testing.assert_allclose(found.astype(jnp.float32), exact.astype(jnp.float32), atol=0.05)


def test_other_functions_follow_the_model(model: Whisper, meshed: Whisper) -> None:
    mel = small_mel(1)[0]  # one row, where a mesh has two at least
    one, several = (decode(m, mel, sample_len=9) for m in (model, meshed))
    assert (several.tokens, several.language) == (one.tokens, one.language)
    _, probs = detect_language(meshed, mel)
    assert max(probs, key=probs.__getitem__) == one.language
    one, several = (score(m, RECORDINGS[0], ["one two", "two"], language="en") for m in (model, meshed))
    assert [s.logprob for s in several] == pytest.approx([s.logprob for s in one], abs=1e-3)
    one, several = (align(m, RECORDINGS[2], "one two and the one", language="en")["words"] for m in (model, meshed))
    assert [(w["word"], w["start"]) for w in several] == [(w["word"], w["start"]) for w in one]


def bytes_by_device(tree: Any) -> set[int]:
    held = dict.fromkeys(jax.devices(), 0)
    for array in jax.tree.leaves(tree):
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return {size for size in held.values() if size}


@pytest.mark.parametrize(("data", "parts"), [(8, 1), (1, 4), (2, 4)])
def test_each_device_holds_its_part(model: Whisper, data: int, parts: int) -> None:
    meshed = shard_model(model, make_mesh(data, parts))
    [whole], [own] = bytes_by_device(model), bytes_by_device(meshed)
    matrices = sum(x[...].nbytes for p, x in nnx.to_flat_state(nnx.state(model)) if "layers" in p and p[-1] == "kernel")
    assert own <= whole - matrices + matrices / parts
    mel = small_mel(8)
    [whole], [own] = (bytes_by_device(encode_windows(m, mel).cross) for m in (model, meshed))
    assert own * data * parts == whole


def test_keys_and_values_of_8_bits_are_divided_by_heads_too() -> None:
    heads = {"encoder_attention_heads": 8, "decoder_attention_heads": 8}
    model = small_model(kv_cache_dtype="int8", **heads)
    meshed, mel = shard_model(model, make_mesh(2, 4)), small_mel(4)
    with ops.using("accelerator"):  # heads side by side
        [whole], [own] = (bytes_by_device(encode_windows(m, mel).cross) for m in (model, meshed))
        assert 8 * own == whole
        one, several = (decode(m, mel, beam_size=3, sample_len=6) for m in (model, meshed))
    assert [result.tokens for result in several] == [result.tokens for result in one]


def test_a_loaded_model_is_where_the_table_says(model: Whisper, meshed: Whisper, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path)
    loaded = load_model(tmp_path, mesh=make_mesh(2, 4))
    for (path, a), (_, b) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (loaded, meshed)), strict=True):
        assert a.sharding == b.sharding, path
        np.testing.assert_array_equal(a[...], b[...], err_msg=str(path))
    layer = load_model(tmp_path, mesh=make_mesh(2, 4), weights="int8").decoder.layers[0]
    parts = [x[...].addressable_shards[0].data for m in (layer.fc1, layer.fc2) for x in (m.kernel, m.scale)]
    assert [part.shape for part in parts] == [(16, 8), (8,), (8, 16), (16,)]
    assert parts[0].dtype == parts[2].dtype == np.int8


def test_stored_programs_run_on_any_device(model: Whisper, tmp_path: Path) -> None:
    window = (0, 2 * model.config.max_source_positions)
    kept, encoded = [], []
    keep_programs(tmp_path)
    try:
        for device in (0, 3):
            elsewhere = jax.device_put(model, jax.devices()[device])
            mel = RecordingMel(RECORDINGS[0], model.config.num_mel_bins, window[1]).window(*window)
            encoded.append(encode_windows(elsewhere, mel[None]).features)
            kept.append(sorted(file.name for file in tmp_path.glob("*.stablehlo")))
    finally:
        keep_programs(None)
    assert [x.device.id for x in encoded] == [0, 3]
    np.testing.assert_array_equal(*encoded)
    assert kept[0] == kept[1] != []


def test_the_command_divides_its_work(model: Whisper, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_pretrained(model, tmp_path / "model")
    files = [write_wav(tmp_path / f"{n}.wav", 32767 * x[:, None]) for n, x in enumerate(RECORDINGS)]
    common = [*map(str, files), "--model", str(tmp_path / "model"), "--compilation_cache", "False"]
    options = ["--temperature", "0", "--temperature_increment_on_fallback", "None", "--no_speech_threshold", "None"]
    options += ["--max_new_tokens", "12", "--beam_size", "3", "--patience", "2", "--batch_size", "2", "-f", "json"]
    written = {}
    for name, devices in {"one": [], "all": ["--devices", "all"], "mesh": ["--mesh", "data=4,model=2"]}.items():
        assert main([*common, *options, *devices, "-o", str(tmp_path / name)]) == 0
        written[name] = [json.loads(path.read_text()) for path in sorted((tmp_path / name).glob("*.json"))]
    assert of_segments(written["all"]) == of_segments(written["mesh"]) == of_segments(written["one"])
    assert len(written["one"]) == len(files)
    capsys.readouterr()
    for devices, line in {
        "--devices 9": "--devices 9 is more than there are; choose at most 8",
        "--mesh data=8,model=2": "a mesh of 8 x 2 devices (data x model) needs 16, but there are 8",
        "--mesh model=3": "a mesh of 3 parts of each layer does not divide encoder_attention_heads=8; choose a divisor",
    }.items():
        assert main([*common, *devices.split(), "-o", str(tmp_path)]) == 1
        assert capsys.readouterr().err == f"whisper-nnx: error: {line}\n"
