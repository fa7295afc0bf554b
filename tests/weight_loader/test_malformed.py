"""Malformed folders: bounded reads, bounded time, and one line that names the file."""

import json
import os
import shutil
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.small import small_model, small_tokenizer_files
from tests.weight_loader.test_hostile import state, tensor, text, torch_file
from weight_loader import CheckpointError, load_model, save_pretrained
from weight_loader.__main__ import main
from weight_loader.readers import open_checkpoint, read_checkpoint, torch_pickle
from weight_loader.vocabulary import tokenizer_from_tiktoken, tokenizer_of
from whisper_nnx.runtime.files import read_regular
from whisper_nnx.text.tokenizer import Tokenizer

GIGABYTE = 2**30
JSON = ["config.json", "generation_config.json", "tokenizer.json", "vocab.json", "added_tokens.json"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_pretrained(small_model(), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def refused(folder: Path, capsys) -> str:
    """Returns the error line of `load_model` and of the command."""
    with pytest.raises(CheckpointError) as raised:
        load_model(folder)
    message = str(raised.value)
    assert "\n" not in message
    assert main(["convert", str(folder), str(folder.parent / "to"), "--to", "openai"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert not (folder.parent / "to").exists()
    return message


def replaced(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as stream:
            stream.truncate(3 * GIGABYTE)  # sparse: takes no disk space


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name")
@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "large"])
@pytest.mark.parametrize("name", JSON)
def test_files_that_are_not_regular_or_too_large_are_rejected_unread(folder, capsys, name, kind):
    replaced(folder / name, kind)
    expected = "is larger than" if kind == "large" else "is not a regular file"
    assert f"{folder / name} {expected}" in refused(folder, capsys)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name")
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_a_pipe_or_device_is_not_a_checkpoint(tmp_path, capsys, kind):
    replaced(tmp_path / "model.pt", kind)
    assert "is a pipe or a device" in refused(tmp_path / "model.pt", capsys)
    with pytest.raises(CheckpointError, match="is not a regular file"):
        tokenizer_from_tiktoken(tmp_path / "model.pt", 51865)


def test_a_file_that_grows_while_it_is_read_stays_within_the_limit(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert read_regular(tmp_path / "file", 5) == b"12345"
    with pytest.raises(ValueError, match="is larger than the limit of 4 bytes"):
        read_regular(tmp_path / "file", 4)
    if Path("/proc/self/status").exists():  # says that it has 0 bytes
        with pytest.raises(ValueError, match="is larger than the limit of 4 bytes"):
            read_regular(Path("/proc/self/status"), 4)


def edited(files: dict[str, bytes], name: str, token: str, value: str) -> dict[str, bytes]:
    """Replaces an id, given as JSON."""
    content = json.loads(files[name])
    assert token in content
    content[token] = "to be replaced"
    return {**files, name: json.dumps(content).replace('"to be replaced"', value).encode()}


@pytest.mark.parametrize("value", ['"7"', "null", "1e400", "-7", "true", "1.0", "[]", str(2**63), "NaN"])
@pytest.mark.parametrize(
    ("name", "token"), [("added_tokens.json", "<|en|>"), ("added_tokens.json", "<|0.02|>"), ("vocab.json", "a")]
)
def test_an_invalid_id_is_rejected_by_name(name, token, value):
    with pytest.raises(ValueError, match=r"the id of '.*' is .*, expected a whole number from 0 to"):
        Tokenizer.from_files(edited(small_tokenizer_files(), name, token, value))


def test_ids_are_checked_in_all_files_of_a_checkpoint(folder, capsys):
    tokens = json.loads((folder / "added_tokens.json").read_text())
    listed = {str(i): {"content": name, "special": True} for name, i in tokens.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {**listed, "-7": listed["272"]}}))
    (folder / "added_tokens.json").write_text("{}")
    assert str(folder) in (message := refused(folder, capsys))
    assert "the id of '<|en|>' is -7" in message


@pytest.mark.parametrize(
    ("token", "same_as", "other"),
    [
        ("<|en|>", "<|es|>", "<|es|>"),
        ("<|transcribe|>", "<|translate|>", "<|translate|>"),
        ("<|en|>", "<|0.20|>", "a timestamp"),
        ("<|nospeech|>", "a", "the text 'a'"),
    ],
)
def test_duplicate_ids_are_rejected(token, same_as, other):
    files = small_tokenizer_files()
    ids = json.loads(files["vocab.json"]) | json.loads(files["added_tokens.json"])
    with pytest.raises(ValueError, match="have the same id") as raised:
        Tokenizer.from_files(edited(files, "added_tokens.json", token, str(ids[same_as])))
    assert token in str(raised.value)
    assert other in str(raised.value)


def safetensors_with(folder: Path, shape: list[int]) -> None:
    header = json.dumps({"model.decoder.layer_norm.bias": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}})
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(4))


def test_a_tensor_of_a_million_axes_is_rejected(folder, capsys):
    safetensors_with(folder, [1] * 1_000_000)
    assert "has 1000000 axes, expected at most 8" in refused(folder, capsys)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    sizes = "n_mels n_audio_ctx n_audio_state n_audio_head n_audio_layer n_vocab n_text_ctx n_text_state n_text_head"
    mlx = {**dict.fromkeys([*sizes.split(), "n_text_layer"], 4), "n_audio_head": 1, "n_text_head": 1}
    (folder / "config.json").write_text(json.dumps(mlx))
    assert "has 1000000 axes, expected at most 8" in refused(folder, capsys)


@pytest.mark.parametrize(
    "changes", ['{"d_model": 1e400}', '{"dropout": "much"}', '{"dropout": 1e400}', '{"vocab_size": -1}']
)
def test_invalid_sizes_are_reported_with_the_file(folder, capsys, changes):
    config = json.loads((folder / "config.json").read_text()) | json.loads(changes)
    (folder / "config.json").write_text(json.dumps(config))
    assert str(folder / "config.json") in refused(folder, capsys)


def test_unexpected_exceptions_of_readers_become_one_line_with_file_and_cause(folder, monkeypatch):
    def surprised(path):
        raise OverflowError("cannot convert\nfloat infinity")

    monkeypatch.setattr("weight_loader.readers.huggingface.read", surprised)
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(folder)
    what = "is damaged or not a Whisper checkpoint (OverflowError: cannot convert float infinity); download it again"
    assert str(raised.value) == f"{folder} {what}"
    assert isinstance(raised.value.__cause__, OverflowError)
    with pytest.raises(OverflowError):
        read_checkpoint(folder)


def test_exceptions_of_users_of_tensors_are_not_converted(folder):
    def use() -> None:
        for _ in open_checkpoint(folder).tensors:
            raise KeyError("a fault of our own")

    with pytest.raises(KeyError):
        use()


def test_a_vocabulary_of_long_tokens_is_rejected_at_once():
    many = {i: bytes([97 + i % 7]) * 200 + str(i).encode() for i in range(2_000)}
    for tokens in ({0: b"a" * 100_000}, many):
        start = time.process_time()
        with pytest.raises(ValueError, match="or more long tokens than any Whisper vocabulary"):
            tokenizer_of(tokens, {}, 5_000)
        assert time.process_time() - start < 1


def shared_file(path: Path, names: int, views: int) -> Path:
    """`views` tensors that alternate between storages."""
    items = []
    for i in range(views):
        items += [text(f"t{i}"), tensor(offset=4 * (i // names), key=str(i % names), length=4 * views)]
    return torch_file(path, state(*items), {f"data/{key}": bytes(16 * views) for key in range(names)})


def test_storages_are_read_once_in_any_order_of_tensors(tmp_path, monkeypatch):
    file = shared_file(tmp_path / "model.pt", names=2, views=400)
    reads, read = [], torch_pickle._numbers
    monkeypatch.setattr(torch_pickle, "_numbers", lambda *args: reads.append(args[1]) or read(*args))
    found = dict(torch_pickle.arrays(file, torch_pickle.load(file)["model_state_dict"]))
    assert len(found) == 400
    assert reads == ["a/data/0", "a/data/1"]


def test_tensors_that_share_their_numbers_many_times_are_rejected(tmp_path):
    items = [item for i in range(9) for item in (text(f"t{i}"), tensor())]
    file = torch_file(tmp_path / "model.pt", state(*items), {"data/0": bytes(16)})
    with pytest.raises(CheckpointError, match="9 tensors of 36 numbers share 4; it may be malicious"):
        dict(torch_pickle.arrays(file, torch_pickle.load(file)["model_state_dict"]))


def test_members_that_overlap_are_rejected(tmp_path):
    file = torch_file(tmp_path / "model.pt", state(text("a"), tensor()), {"data/0": bytes(4096)})
    with zipfile.ZipFile(file, "a") as archive:
        first = archive.getinfo("a/data/0")
        for i in range(20):
            archive.filelist.append(first)
            archive.NameToInfo[f"a/data/{i}"] = first
        archive._didModify = True
    with pytest.raises(CheckpointError, match="overlap"):
        torch_pickle.load(file)


def test_tensors_of_shared_storages_are_correct(tmp_path):
    numbers = np.arange(8, dtype=np.float32)
    items = [text("a"), tensor(length=8), text("b"), tensor(key="1", length=8), text("c"), tensor(offset=4, length=8)]
    file = torch_file(tmp_path / "m.pt", state(*items), {"data/0": numbers.tobytes(), "data/1": (-numbers).tobytes()})
    found = dict(torch_pickle.arrays(file, torch_pickle.load(file)["model_state_dict"]))
    for name, expected in (("a", numbers[:4]), ("b", -numbers[:4]), ("c", numbers[4:])):
        np.testing.assert_array_equal(found[name].reshape(-1), expected)
