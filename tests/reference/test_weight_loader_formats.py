"""Files of torch.save, of transformers' and openai-whisper's models, load bit for bit; what we write runs there.

The other formats are compared with their owners in test_mlx.py, test_ggml.py and test_ct2.py.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import whisper
from flax import nnx
from safetensors.torch import load_file

from weight_loader import load_model, save_model
from weight_loader.names import parameters
from weight_loader.readers import open_checkpoint
from weight_loader.readers.openai import dimensions_of
from whisper_nnx import transcribe
from whisper_nnx.model.config import RELEASED

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no tokenizer:"),
    pytest.mark.filterwarnings("ignore:unclosed file.*tiktoken:ResourceWarning"),  # openai-whisper's
]
SPOKEN = ("en_short_3s", "en_quick_20s")


def arrays(model) -> dict:
    return {path: np.asarray(variable[...]) for path, variable in nnx.to_flat_state(nnx.state(model))}


def assert_same(ours, theirs):
    ours, theirs = arrays(ours), arrays(theirs)
    assert ours.keys() == theirs.keys()
    for path, array in ours.items():
        np.testing.assert_array_equal(array, theirs[path], err_msg=str(path))


def openai_state(config, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {p.stored["openai"].name: state[p.stored["hf"].name] for p in parameters(config)}


@pytest.fixture(scope="module")
def bins(digits, tmp_path_factory) -> dict[str, Path]:
    """The digits as transformers wrote them before it wrote safetensors: whole, in shards, and as the bare model."""
    root, state = tmp_path_factory.mktemp("bins"), load_file(digits / "model.safetensors")
    folders = {}
    for kind in ("whole", "shards", "bare"):
        folders[kind] = folder = root / kind
        folder.mkdir()
        for name in ("config.json", "generation_config.json", "tokenizer.json"):
            shutil.copy(digits / name, folder)
    torch.save(
        {**state, "proj_out.weight": state["model.decoder.embed_tokens.weight"]}, root / "whole/pytorch_model.bin"
    )
    torch.save({n.removeprefix("model."): t for n, t in state.items()}, root / "bare/pytorch_model.bin")
    names, weight_map = sorted(state), {}
    for shard in range(3):
        file = f"pytorch_model-{shard + 1:05}-of-00003.bin"
        torch.save({name: state[name] for name in names[shard::3]}, root / "shards" / file)
        weight_map |= dict.fromkeys(names[shard::3], file)
    (root / "shards/pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folders


@pytest.fixture(scope="module")
def ours(digits):
    return load_model(digits)


@pytest.mark.parametrize("kind", ["whole", "shards", "bare"])
def test_pytorch_model_bin_equals_safetensors(bins, ours, kind):
    loaded = load_model(bins[kind])
    assert_same(loaded, ours)
    assert loaded.config == ours.config


@pytest.mark.slow
def test_the_true_shape_of_tiny_loads_bit_for_bit_from_every_file_of_torchs(tmp_path):
    config = RELEASED["tiny"]
    none = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"), 0)
    torch.manual_seed(0)
    theirs = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**config.to_hf(), **none)).half()
    for name, folder in (("safetensors", tmp_path / "a"), ("bin", tmp_path / "b")):
        theirs.save_pretrained(folder)
        if name == "bin":
            torch.save(theirs.state_dict(), folder / "pytorch_model.bin")  # a state_dict with its metadata
            (folder / "model.safetensors").unlink()
    reference = whisper.model.Whisper(whisper.ModelDimensions(**dimensions_of(config))).half()
    reference.load_state_dict(openai_state(config, theirs.state_dict()))
    torch.save({"dims": asdict(reference.dims), "model_state_dict": reference.state_dict()}, tmp_path / "tiny.pt")
    expected = load_model(tmp_path / "a", dtype="float16")
    for path in (tmp_path / "b", tmp_path / "tiny.pt"):
        assert_same(load_model(path, dtype="float16"), expected)


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": torch.arange(12.0).reshape(3, 4).T},
        {"a": torch.arange(12.0)[3:9:2], "b": torch.zeros(0), "c": torch.tensor(2.5)},
        {"a": torch.nn.Parameter(torch.ones(2, 3))},
        {"a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).expand(2, 3)},
        {
            "a": torch.arange(5, dtype=torch.int64),
            "b": torch.tensor([True, False]),
            "c": torch.ones(2, dtype=torch.half),
        },
        torch.nn.Linear(3, 2).state_dict(),
    ],
    ids=["transposed", "strided, empty, scalar", "parameter", "bfloat16", "other dtypes", "state_dict"],
)
def test_any_tensors_of_torchs_are_read_as_torch_reads_them(tmp_path, tensors):
    from weight_loader.readers import torch_pickle

    torch.save(tensors, tmp_path / "file")
    read = dict(torch_pickle.arrays(tmp_path / "file", torch_pickle.load(tmp_path / "file")))
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        theirs = tensor.detach()
        assert str(theirs.dtype) == f"torch.{read[name].dtype}"
        exact = theirs.double().numpy() if theirs.is_floating_point() else theirs.numpy()
        np.testing.assert_array_equal(read[name].astype(exact.dtype), exact)


def test_a_whole_pickled_module_is_rejected_by_its_class(tmp_path):
    torch.save(torch.nn.Linear(3, 2), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"the global 'torch.nn.modules.linear.Linear', which weights do not need"):
        open_checkpoint(tmp_path / "model.pt")


def test_torchs_old_format_is_rejected_with_the_way_out(digits, tmp_path):
    state = load_file(digits / "model.safetensors")
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(
        ValueError, match=r"has the format of torch before 1.6; .*torch.save\(torch.load\(FILE\), NEW\)"
    ):
        open_checkpoint(tmp_path / "pytorch_model.bin")
    torch.save(torch.load(tmp_path / "pytorch_model.bin"), tmp_path / "new.bin")
    shutil.copy(digits / "config.json", tmp_path)
    assert open_checkpoint(tmp_path / "new.bin").format == "hf"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_openai_whisper_loads_what_we_write_bit_for_bit(digits, ours, tmp_path, dtype):
    save_model(ours, tmp_path / "digits.pt", "openai", dtype)
    written = torch.load(tmp_path / "digits.pt", weights_only=True, mmap=True)["model_state_dict"]
    expected = torch.load(digits / "openai.pt", weights_only=True)["model_state_dict"]
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(written[name], tensor.to(getattr(torch, dtype))), name
        assert written[name].data_ptr() % 64 == 0  # where torch aligns them too


@pytest.mark.slow
def test_openai_whisper_says_the_same_with_what_we_write(ours, recordings, tmp_path):
    save_model(ours, tmp_path / "digits.pt", "openai")
    theirs = whisper.load_model(str(tmp_path / "digits.pt"), device="cpu")
    for name in SPOKEN:
        result = theirs.transcribe(recordings[name], fp16=False, temperature=0.0)
        mine = transcribe(ours, recordings[name], temperature=0.0)
        assert mine["text"] == result["text"]
        assert [s["tokens"] for s in mine["segments"]] == [s["tokens"] for s in result["segments"]]


def test_the_alignment_heads_that_are_said_to_be_lost_can_be_set(ours, tmp_path):
    (lost,) = [text for text in save_model(ours, tmp_path / "digits.pt", "openai") if "alignment heads" in text]
    theirs = whisper.load_model(str(tmp_path / "digits.pt"), device="cpu")
    theirs.set_alignment_heads(eval(lost[lost.index("(") + 1 : -1]))  # b'...', as a person would copy it
    assert theirs.alignment_heads.indices().T.tolist() == [list(head) for head in ours.config.alignment_heads]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("int8", marks=pytest.mark.slow)])
def test_faster_whisper_says_the_same_with_what_its_own_converter_makes_of_ours(ours, recordings, tmp_path, dtype):
    faster_whisper = pytest.importorskip("faster_whisper")
    save_model(ours, tmp_path / "digits", "ct2", dtype)
    # In float32, whatever is stored: int8 would round activations too, on each processor in its own way.
    theirs = faster_whisper.WhisperModel(str(tmp_path / "digits"), device="cpu", compute_type="float32")
    mine = ours if dtype == "float32" else load_model(tmp_path / "digits")
    for name in SPOKEN:
        segments, _ = theirs.transcribe(recordings[name], beam_size=1, temperature=0.0, language="en")
        said = transcribe(mine, recordings[name], temperature=0.0, language="en")["text"]
        assert said == "".join(segment.text for segment in segments)
        assert said
