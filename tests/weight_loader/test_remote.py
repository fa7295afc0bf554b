"""Models at URLs that fsspec knows: copied once, whole, and only what is needed."""

import fsspec
import jax
import numpy as np
import pytest
from flax import nnx

from tests.small import small_model
from weight_loader import CheckpointError, load_model, save_pretrained
from weight_loader.hub import checkpoint_path
from weight_loader.remote import is_elsewhere


@pytest.fixture
def memory(tmp_path):
    """fsspec's file system in memory, with a model in /bucket/model and its weights in another format, too."""
    files = fsspec.filesystem("memory")
    save_pretrained(small_model(), tmp_path / "saved")
    files.put(str(tmp_path / "saved"), "/bucket/model", recursive=True)
    files.pipe("/bucket/model/pytorch_model.bin", b"the same in another format")
    yield files
    files.rm("/bucket", recursive=True)


def copies(cache):
    return sorted(path.name for path in (cache / "copies").glob("*/*"))


def test_a_folder_is_copied_once_in_one_format(memory, tmp_path, monkeypatch):
    model = load_model("memory://bucket/model", cache_dir=tmp_path)
    expected = jax.tree.leaves(nnx.state(small_model()))
    assert all(map(np.array_equal, jax.tree.leaves(nnx.state(model)), expected))
    assert model.tokenizer is not None
    names = copies(tmp_path)
    assert {"config.json", "model.safetensors"} <= {*names}
    assert "pytorch_model.bin" not in names

    def never(*_):
        raise AssertionError("copied again")

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "get_file", never)
        load_model("memory://bucket/model", cache_dir=tmp_path)
    memory.pipe("/bucket/model/config.json", memory.cat("/bucket/model/config.json") + b" ")  # changed
    load_model("memory://bucket/model", cache_dir=tmp_path)
    assert len(copies(tmp_path)) == 2 * len(names)


def test_a_file_keeps_its_name(memory, tmp_path):
    path = checkpoint_path("memory://bucket/model/pytorch_model.bin", cache_dir=tmp_path)
    assert (path.name, path.read_bytes()) == ("pytorch_model.bin", b"the same in another format")
    folder = checkpoint_path("memory://bucket/model", files=("config.json",), cache_dir=tmp_path)
    assert [file.name for file in folder.iterdir()] == ["config.json"]


def test_a_copy_that_breaks_off_leaves_no_model(memory, tmp_path, monkeypatch):
    from_memory = type(memory).get_file

    def breaks(self, name, path, **_):
        if name.endswith("safetensors"):
            raise ConnectionError("reset")
        from_memory(self, name, path)

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "get_file", breaks)
        with pytest.raises(CheckpointError, match="memory://bucket/model cannot be read: ConnectionError: reset"):
            load_model("memory://bucket/model", cache_dir=tmp_path)
    assert all(path.name.endswith((".partial", ".lock")) for path in (tmp_path / "copies").iterdir())
    assert load_model("memory://bucket/model", cache_dir=tmp_path).tokenizer is not None


def test_a_url_that_leads_nowhere_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="memory://bucket/none: not found; check the address"):
        load_model("memory://bucket/none", cache_dir=tmp_path)
    with pytest.raises(CheckpointError, match="nosuch://x cannot be opened: Protocol not known: nosuch"):
        load_model("nosuch://x", cache_dir=tmp_path)
    assert not is_elsewhere("https://example.org/model")
