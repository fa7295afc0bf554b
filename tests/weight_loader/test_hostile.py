"""Malicious files: nothing is executed, little memory is used, and the error is one line."""

import collections
import io
import json
import os
import pickle
import re
import struct
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.small import small_model
from weight_loader import CheckpointError, load_model, save_model
from weight_loader.readers import READERS, reader
from weight_loader.readers.openai import dimensions_of

MEGABYTE = 2**20


pytestmark = pytest.mark.filterwarnings("ignore:.*no tokenizer:")
_HARM = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class"}
_events: list[str] | None = None  # events of Python's audit hook; None: disabled


def _audit(event: str, arguments: tuple) -> None:
    evaluated = event == "exec" and getattr(arguments[0], "co_filename", "") == "<string>"
    if _events is not None and (event in _HARM or evaluated):
        _events.append(event)


sys.addaudithook(_audit)  # cannot be removed
for _name in READERS:
    reader(_name)  # imported now, since named tuples evaluate code


class Calls:
    """Pickles to a function call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def torch_file(path: Path, data: bytes, members: dict[str, bytes] | None = None, compress: bool = False) -> Path:
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        archive.writestr("a/data.pkl", data)
        for name, content in (members or {}).items():
            archive.writestr(f"a/{name}", content)
    return path


def refused(path: Path, memory: int = 64 * MEGABYTE) -> str:
    """Returns load_model's error line; checks that nothing was executed and little memory used."""
    global _events
    _events = []
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as raised:
            load_model(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        events, _events = _events, None
    message = str(raised.value)
    assert events == []
    assert peak < memory
    assert "\n" not in message
    assert len(message) < 5000
    return message


def whole(value) -> bytes:
    return pickle.BININT + struct.pack("<i", value)


def text(value: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()


def tensor(shape=(2, 2), strides=(2, 1), offset=0, length=4, key="0", kind="torch\nFloatStorage\n") -> bytes:
    """Pickle instructions of a tensor, as written by torch.save."""

    def several(numbers):
        return pickle.MARK + b"".join(map(whole, numbers)) + pickle.TUPLE

    named = pickle.GLOBAL + kind.encode()
    storage = pickle.MARK + text("storage") + named + text(key) + text("cpu") + whole(length) + pickle.TUPLE
    arguments = pickle.MARK + storage + pickle.BINPERSID + whole(offset) + several(shape) + several(strides)
    arguments += pickle.NEWFALSE + pickle.NONE + pickle.TUPLE
    return pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n" + arguments + pickle.REDUCE


def state(*items: bytes) -> bytes:
    """A pickle of {"dims": {}, "model_state_dict": {...}} with these keys and values."""
    inner = pickle.EMPTY_DICT + pickle.MARK + b"".join(items) + pickle.SETITEMS
    outer = text("dims") + pickle.EMPTY_DICT + text("model_state_dict") + inner
    return pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.MARK + outer + pickle.SETITEMS + pickle.STOP


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("made", "named"),
    [
        (Calls(os.system, "echo hostile"), r"(posix|nt)\.system"),
        (Calls(eval, "hostile"), r"(builtins|__builtin__)\.eval"),
        (Calls(exec, "import hostile"), r"(builtins|__builtin__)\.exec"),
        (Calls(getattr, "hostile", "upper"), r"(builtins|__builtin__)\.getattr"),
        (Calls(pickle.loads, b"hostile"), r"_?pickle\.loads|_codecs\.encode"),
        (Calls(collections.OrderedDict, Calls(os.system, "hostile")), r"(posix|nt)\.system"),
        (np.array([Calls(os.system, "hostile")], object), r"numpy.*(_reconstruct|_frombuffer)"),
        (Path("hostile"), r"pathlib.*Path"),
        ({"dims": {}, "model_state_dict": {"a": Calls(os.system, "hostile")}}, r"(posix|nt)\.system"),
    ],
)
def test_a_pickle_with_calls_is_rejected_with_their_names(tmp_path, made, named, protocol):
    file = torch_file(tmp_path / "model.pt", pickle.dumps(made, protocol))
    message = rf"its pickle has the (global '({named})'|instruction \w+), which weights do not need"
    assert re.search(message, refused(file))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"cos\nsystem\n(S'echo hostile'\ntR.", r"the global 'os.system'"),
        (b"(S'echo hostile'\nios\nsystem\n.", "the instruction (STRING|INST)"),
        (b"(cos\nsystem\nS'echo hostile'\no.", r"the global 'os.system'"),
        (b"\x82\x01.", "the instruction EXT1"),
        (b"cbuiltins\neval\n(V1+1\ntR.", r"the global 'builtins.eval'"),
        (b"ccollections\nOrderedDict\n(](K\x01K\x02etR.", "damaged"),
        (b"(K\x01K\x02ccollections\nOrderedDict\nR.", "a call of 2"),
        (b"}(](K\x01eK\x02u.", "a dictionary's key of type list"),
        (b"}()K\x02u.", "a dictionary's key of type tuple"),
        (b"r\xff\xff\xff\x7f.", "nothing to memoize"),
        (b"j\xff\xff\xff\x7f.", "a value number 2147483647 that was never memoized"),
        (b"Kr", "damaged"),
        (b"Kr.", "without a checkpoint"),
        (b"", "damaged"),
        (b".", "without its values"),
        (b"u.", "damaged|mark"),
        (b"\x8d" + b"\xff" * 7 + b"\x7f.", "damaged"),
        (b"\x8b\xff\xff\xff\x7f.", "damaged"),
        (b"I" + b"9" * 100_000 + b"\n.", "damaged"),
        (b"\x80\x02" + b"]" * 10_000 + b"a" * 9_999 + b".", "not dictionaries|zip archive"),
        (b")" + b"\x85" * 30_000 + b".", "without a checkpoint"),
        (b"(tq\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"Q.", "the storage"),
        (b"(tq\x00" + b"h\x00h\x00\x86q\x00" * 60 + b")R.", "a call of"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_pickle_with_unusual_instructions_is_rejected(tmp_path, data, message):
    assert re.search(message, refused(torch_file(tmp_path / "model.pt", data)))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (tensor(shape=(10**9, 10**9), strides=(0, 0)), "exceeds its storage"),
        (tensor(shape=(2, 3)), "exceeds its storage"),
        (tensor(offset=1), "exceeds its storage"),
        (tensor(offset=-1), "a tensor of shape"),
        (tensor(shape=(2, -2)), "a tensor of shape"),
        (tensor(strides=(-2, 1)), "a tensor of shape"),
        (tensor(shape=(4,)), "a tensor of shape"),
        (tensor(shape=(1,) * 9, strides=(1,) * 9), "a tensor of shape"),
        (tensor(length=-1), "the storage"),
        (tensor(key="../../etc/passwd"), "the storage"),
        (tensor(key=""), "the storage"),
        (tensor(kind="os\nsystem\n"), "the global 'os.system'"),
        (tensor(kind="torch._utils\n_rebuild_parameter\n"), "the storage"),
        (whole(7), "contains more than tensors"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_tensor_that_exceeds_its_storage_is_rejected(tmp_path, made, message):
    file = torch_file(tmp_path / "model.pt", state(text("a"), made), {"data/0": bytes(16)})
    assert message in refused(file)


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("valid") / "model.pt"
    save_model(small_model(encoder_ffn_dim=64, decoder_ffn_dim=64), path, "openai")
    return path


def members(file: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {name.removeprefix("archive/"): archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.pop("data/3"), "has no member"),
        (lambda held: held.update({"data/3": bytes(3)}), "has 3 bytes, expected"),
        (lambda held: held.update(byteorder=b"big"), "byte order b'big'"),
        (lambda held: held.update({"data.pkl": held["data.pkl"][:-200]}), "its pickle is damaged"),
    ],
)
def test_an_archive_that_contradicts_its_pickle_is_rejected(valid, tmp_path, change, message):
    held = members(valid)
    change(held)
    data = held.pop("data.pkl")
    assert message in refused(torch_file(tmp_path / "model.pt", data, held))


def test_a_compressed_archive_is_rejected_before_decompression(valid, tmp_path):
    held = members(valid)
    bomb = {"data/0": bytes(256 * MEGABYTE)}
    file = torch_file(tmp_path / "data.pt", held["data.pkl"], bomb, compress=True)
    pickle_bomb = torch_file(tmp_path / "pickle.pt", bytes(256 * MEGABYTE), compress=True)
    for path in (file, pickle_bomb):
        assert path.stat().st_size < MEGABYTE
        assert "is compressed or encrypted, unlike torch.save's files" in refused(path)


def test_an_archive_with_false_sizes_is_rejected(valid, tmp_path):
    data = bytearray(valid.read_bytes())
    for at in range(len(data) - 22, 0, -1):
        if data[at : at + 4] == b"PK\1\2":  # sizes of each member in the list: a terabyte less one
            data[at + 20 : at + 28] = b"\xfe\xff\xff\xff" * 2
    (tmp_path / "model.pt").write_bytes(data)
    assert refused(tmp_path / "model.pt")
    data[-10:-6] = b"\xfe\xff\xff\xff"
    (tmp_path / "model.pt").write_bytes(data)
    assert refused(tmp_path / "model.pt")


def test_every_truncation_of_a_file_is_rejected_in_one_line(valid, tmp_path):
    data = valid.read_bytes()
    for size in [*range(60), *range(60, len(data), len(data) // 40), len(data) - 1]:
        (tmp_path / "model.pt").write_bytes(data[:size])
        refused(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_vocab": 10**9}, "vocab_size=1000000000 exceeds the supported maximum"),
        ({"n_text_layer": 10**6}, "decoder_layers=1000000 exceeds the supported maximum"),
        ({"n_text_layer": 5}, "missing: decoder.blocks.2.attn_ln.weight"),
        ({"n_audio_ctx": 10**5}, "misshapen: encoder.positional_embedding"),
        ({"n_text_head": 0}, "decoder_attention_heads=0"),
        ({"n_text_state": 32}, "n_audio_state=16 and n_text_state=32 must be equal"),
        ({"n_mels": True}, "not whole numbers"),
        ({"n_mels": 8.0}, "not whole numbers"),
    ],
)
def test_sizes_that_do_not_fit_are_rejected(valid, tmp_path, changes, message):
    held = members(valid)
    end = held["data.pkl"].index(b"model_state_dict")  # rewrite the sizes before it
    sizes = {**dimensions_of(small_model(encoder_ffn_dim=64, decoder_ffn_dim=64).config), **changes}
    start = pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.MARK + text("dims")
    data = start + pickle.dumps(sizes, 2)[2:-1] + text("model_state_dict") + held.pop("data.pkl")[end + 16 :]
    assert message in refused(torch_file(tmp_path / "model.pt", data, held))


def test_the_old_format_of_torch_is_rejected_with_the_fix(tmp_path):
    (tmp_path / "model.pt").write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2))
    assert "has the format of torch before 1.6; load and save it again" in refused(tmp_path / "model.pt")


def test_a_safetensors_header_of_a_gigabyte_is_rejected_without_reading_it(tmp_path):
    (tmp_path / "config.json").write_text('{"d_model": 16}')
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", 2**30) + b"{")
        stream.truncate(2**30 + 64)  # a hole: takes no room on the disk
    assert "is not a safetensors file (a header of 1073741824 bytes)" in refused(file)
    save_model(small_model(), tmp_path / "hf")
    os.replace(file, tmp_path / "hf" / "model.safetensors")
    assert "is not a safetensors file (a header of 1073741824 bytes)" in refused(tmp_path / "hf")


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("shard", ["../model{}", "/etc/passwd{}", "a/b{}", "a\\b{}", "a\0b{}", "", "a.txt"])
def test_an_index_with_files_outside_its_folder_is_rejected(tmp_path, name, shard):
    save_model(small_model(), tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    suffix = ".safetensors" if "safetensors" in name else ".bin"
    (tmp_path / "hf" / name).write_text(json.dumps({"weight_map": {"a": shard.format(suffix)}}))
    kind = suffix.removeprefix(".")
    assert f"not a {kind} file in its folder; it may be malicious" in refused(tmp_path / "hf")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "vocab.json"])
@pytest.mark.parametrize("content", ["[" * 200_000, '{"a":' * 200_000, "1" * 5000, "\0", '["a", 1]'])
def test_too_deep_or_unusual_json_is_rejected(tmp_path, name, content):
    save_model(small_model(), tmp_path / "hf")
    (tmp_path / "hf" / name).write_text(content)
    refused(tmp_path / "hf")


@pytest.mark.parametrize("heads", [[[0, 0, 0]], [[[]]], 7, [["a", "b"]]])
def test_alignment_heads_that_are_not_pairs_are_ignored(tmp_path, heads):
    save_model(small_model(), tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps({"alignment_heads": heads}))
    with pytest.warns(UserWarning, match="alignment_heads are ignored"):
        assert load_model(tmp_path / "hf").config.alignment_heads is None


def test_infinite_alignment_heads_are_rejected(tmp_path):
    save_model(small_model(), tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").write_text('{"alignment_heads": [[1e400, 0]]}')
    assert "cannot convert float infinity" in refused(tmp_path / "hf")


def test_a_zip_archive_of_something_else_is_rejected(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("word/document.xml", "<hostile/>")
    assert "is a zip archive without a checkpoint, or damaged" in refused(tmp_path / "model.pt")


def test_a_pickle_without_an_archive_is_no_checkpoint(tmp_path):
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Calls(os.system, "echo hostile")))
    assert "is not a readable checkpoint" in refused(tmp_path / "model.pt")


def test_the_instructions_of_these_tests_make_a_tensor_when_they_are_right(tmp_path):
    from weight_loader.readers import torch_pickle

    numbers = io.BytesIO()
    numbers.write(np.arange(4, dtype=np.float32).tobytes())
    file = torch_file(tmp_path / "model.pt", state(text("a"), tensor()), {"data/0": numbers.getvalue()})
    saved = torch_pickle.load(file)["model_state_dict"]
    np.testing.assert_array_equal(dict(torch_pickle.arrays(file, saved))["a"], [[0, 1], [2, 3]])
