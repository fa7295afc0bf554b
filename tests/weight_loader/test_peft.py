"""PEFT: LoRA is merged into its base model, in any format; other kinds are rejected with the fix."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tests.small import small_model
from weight_loader import CheckpointError, get_whisper_config, load_model, save_model, save_pretrained
from weight_loader.__main__ import main
from weight_loader.names import path_of

Q = "encoder.layers.0.self_attn.q_proj"
FC1 = "decoder.layers.1.fc1"
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "fc1"]}
RANDOM = np.random.default_rng(0)


def factors(layer: str, n_in: int, n_out: int, rank: int = 4) -> dict[str, np.ndarray]:
    """As peft saves them: A [r,in] and B [out,r]."""
    a, b = RANDOM.normal(size=(rank, n_in)), RANDOM.normal(size=(n_out, rank))
    start = f"base_model.model.model.{layer}"
    return {f"{start}.lora_A.weight": a.astype("f4"), f"{start}.lora_B.weight": b.astype("f4")}


TENSORS = {**factors(Q, 16, 16), **factors(FC1, 16, 64)}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    model = small_model(encoder_ffn_dim=64, decoder_ffn_dim=64)
    save_pretrained(model, folder / "hf")
    for format in ("openai", "mlx"):
        save_model(model, folder / format, format)
    return folder


def adapter(folder: Path, base: Path | str, tensors=TENSORS, **changes) -> Path:
    folder.mkdir()
    config = {**CONFIG, "base_model_name_or_path": str(base), **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def weights(path: Path) -> dict[str, np.ndarray]:
    return {".".join(map(str, p)): np.asarray(v[...]) for p, v in nnx.to_flat_state(nnx.state(load_model(path)))}


def addition(layer: str, scale: float, tensors=TENSORS) -> np.ndarray:
    a, b = (tensors[f"base_model.model.model.{layer}.lora_{side}.weight"] for side in "AB")
    return scale * (b @ a).T  # the model's kernels are [in,out]


@pytest.mark.parametrize(
    ("changes", "q", "fc1"),
    [
        ({}, 6 / 4, 6 / 4),
        ({"use_rslora": True}, 3, 3),
        ({"alpha_pattern": {"fc1": 20}}, 6 / 4, 20 / 4),
        ({"alpha_pattern": {"encoder.layers.0.self_attn.q_proj": 2}}, 2 / 4, 6 / 4),
        ({"fan_in_fan_out": True}, 6 / 4, 6 / 4),  # for layers that store [in,out], which Whisper does not have
    ],
)
@pytest.mark.parametrize("base", ["hf", "openai", "mlx"])
@pytest.mark.filterwarnings("ignore:.*no tokenizer:")
def test_only_adapted_weights_change_by_the_scaled_product(bases, tmp_path, base, changes, q, fc1):
    found, before = weights(adapter(tmp_path / "a", bases / base, **changes)), weights(bases / base)
    assert found.keys() == before.keys()
    for name, array in before.items():
        layer = name.removesuffix(".kernel")
        scale = {Q: q, FC1: fc1}.get(layer) if name.endswith(".kernel") else None
        expected = array if scale is None else array + addition(layer, scale)
        np.testing.assert_allclose(found[name], expected, atol=1e-5 if scale else 0, err_msg=name)


def test_the_rank_is_read_from_the_factors(bases, tmp_path):
    tensors = {**factors(Q, 16, 16, rank=2), **factors(FC1, 16, 64)}
    found = weights(adapter(tmp_path / "a", bases / "hf", tensors, rank_pattern={"q_proj": 2}))
    for layer, scale in ((Q, 3), (FC1, 1.5)):
        before = weights(bases / "hf")[f"{layer}.kernel"]
        np.testing.assert_allclose(found[f"{layer}.kernel"], before + addition(layer, scale, tensors), atol=1e-5)


def test_whole_parameters_replace_those_of_the_base(bases, tmp_path):
    bias, conv = RANDOM.normal(size=16).astype("f4"), RANDOM.normal(size=(16, 8, 3)).astype("f4")
    whole = {
        "base_model.model.model.encoder.layer_norm.bias": bias,
        "base_model.model.model.encoder.conv1.modules_to_save.weight": conv,
        f"base_model.model.model.{Q}.base_layer.bias": bias,
    }
    found = weights(adapter(tmp_path / "a", bases / "hf", {**TENSORS, **whole}))
    np.testing.assert_array_equal(found["encoder.layer_norm.bias"], bias)
    np.testing.assert_array_equal(found[f"{Q}.bias"], bias)
    np.testing.assert_array_equal(found["encoder.conv1.kernel"], conv.transpose(2, 1, 0))


def test_names_without_output_layer_and_with_adapter_name(bases, tmp_path):
    def renamed(name: str) -> str:
        return name.replace("base_model.model.model.", "base_model.model.").replace(".weight", ".default.weight")

    found = adapter(tmp_path / "b", bases / "hf", {renamed(name): array for name, array in TENSORS.items()})
    expected = weights(adapter(tmp_path / "a", bases / "hf"))
    for name, array in weights(found).items():
        np.testing.assert_array_equal(array, expected[name])


def test_tokenizer_and_configuration_come_from_the_base_unless_the_adapter_has_its_own(bases, tmp_path):
    folder = adapter(tmp_path / "a", bases / "hf")
    assert load_model(folder).tokenizer == load_model(bases / "hf").tokenizer
    assert get_whisper_config(folder) == get_whisper_config(bases / "hf")
    own = json.loads((bases / "hf" / "added_tokens.json").read_text())
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(bases / "hf" / name, folder)
    (folder / "added_tokens.json").write_text(json.dumps({**own, "hello": max(own.values()) + 1}))
    assert load_model(folder).tokenizer.encode("hello") == [max(own.values()) + 1]


def test_inspect_and_convert_accept_an_adapter(bases, tmp_path, capsys):
    folder = adapter(tmp_path / "a", bases / "hf")
    assert main(["inspect", str(folder)]) == 0
    assert f"LoRA of 2 layers and 0 whole parameters, merged into {bases / 'hf'}" in capsys.readouterr().out
    assert main(["convert", str(folder), str(tmp_path / "merged"), "--to", "hf"]) == 0
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    before = load_file(bases / "hf" / "model.safetensors")[f"model.{Q}.weight"]
    np.testing.assert_allclose(stored[f"model.{Q}.weight"], before + addition(Q, 1.5).T, atol=1e-5)


EMBEDDING = {"base_model.model.model.decoder.embed_tokens.lora_embedding_A": np.ones((4, 338), "f4")}
CONVOLUTION = {f"base_model.model.model.encoder.conv1.lora_{side}.weight": np.ones((4, 8, 3), "f4") for side in "AB"}
OUTPUT = {"base_model.model.proj_out.weight": np.ones((338, 16), "f4")}


@pytest.mark.parametrize(
    ("tensors", "changes", "message"),
    [
        (TENSORS, {"peft_type": "IA3"}, "adapters of type 'IA3' are not supported, only LORA; merge it with peft"),
        (TENSORS, {"peft_type": None}, "adapters of type None"),
        (TENSORS, {"init_lora_weights": "pissa"}, "with 'pissa' also changes its base and is not supported"),
        (TENSORS, {"use_dora": True}, "LoRA with use_dora is not supported; merge it with peft: "),
        (TENSORS, {"alpha_pattern": {"(a|b)+": 3}}, r"alpha_pattern '\(a\|b\)\+' is not a plain name; merge it"),
        (TENSORS, {"alpha_pattern": 7}, "is damaged or not a Whisper checkpoint"),
        (TENSORS, {"lora_alpha": "many"}, "lora_alpha='many' with rank 4 is invalid"),
        (TENSORS, {"lora_alpha": float("inf")}, "lora_alpha=inf"),
        (TENSORS, {"base_model_name_or_path": None}, "names no base model; set its base_model_name_or_path"),
        (TENSORS, {"base_model_name_or_path": "/not/there"}, r"/not/there does not exist.*; or set base_model_name"),
        ({**TENSORS, **EMBEDDING}, {}, r"1 of its tensors cannot be merged here \(.*lora_embedding_A\); merge it"),
        ({**TENSORS, **CONVOLUTION}, {}, r"2 of its tensors cannot be merged here \(.*conv1"),
        ({**TENSORS, **OUTPUT}, {}, r"cannot be merged here \(base_model.model.proj_out.weight\)"),
        (dict([*TENSORS.items()][:1]), {}, "q_proj without A or B"),
        ({}, {}, "its adapter has no tensors"),
        (factors(Q, 16, 8), {}, r"q_proj has A \(4, 16\) and B \(8, 4\) for a weight \(16, 16\)"),
        (factors("encoder.layers.7.fc1", 16, 64), {}, r"layers.7.fc1.lora_A.weight"),
    ],
)  # fmt: skip
def test_unsupported_adapters_are_rejected_in_one_line_with_the_fix(bases, tmp_path, capsys, tensors, changes, message):
    folder = adapter(tmp_path / "a", bases / "hf", tensors, **changes)
    with pytest.raises(CheckpointError, match=message) as raised:
        load_model(folder)
    assert str(tmp_path) in str(raised.value)
    assert main(["convert", str(folder), str(tmp_path / "to"), "--to", "hf"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "to").exists()


def test_an_adapter_of_an_adapter_is_rejected(bases, tmp_path):
    with pytest.raises(CheckpointError, match=r"its base model .* is also an adapter; merge that first"):
        load_model(adapter(tmp_path / "a", tmp_path / "a"))


def test_weights_of_a_complete_model_take_precedence(bases, tmp_path):
    folder = adapter(tmp_path / "a", "/not/there")
    for file in (bases / "hf").iterdir():
        shutil.copy(file, folder)
    before = weights(bases / "hf")
    for name, array in weights(folder).items():
        np.testing.assert_array_equal(array, before[name])


def test_the_layers_of_these_tests_exist():
    model = small_model()
    for layer in (Q, FC1):
        assert (*path_of(layer), "kernel") in dict(nnx.to_flat_state(nnx.state(model)))
