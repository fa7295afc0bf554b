"""CTranslate2's files, written after its specification: dtypes and damage."""

import json
import re
import struct
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from tests.small import small_config, small_tokenizer, small_tokenizer_files
from weight_loader import CheckpointError, load_model
from weight_loader.load import abstract_model
from weight_loader.names import parameters
from weight_loader.readers import ctranslate2 as reader

CONFIG = small_config(encoder_layers=2, alignment_heads=((1, 0), (1, 1)))
DTYPES = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4, "bfloat16": 5}
PARTS = {"/self_attention/linear_0/": "qkv", "/attention/linear_1/": "kv"}


def state() -> dict:
    random = np.random.default_rng(0)
    shapes = dict(nnx.to_flat_state(nnx.state(abstract_model(CONFIG))))
    return {path: random.standard_normal(v.shape, np.float32) for path, v in shapes.items()}


def variables(state: dict) -> dict[str, np.ndarray]:
    """CTranslate2's names, fused projections, and a zero bias for keys."""
    stored = {p.stored["ct2"].name: state[p.path].transpose(p.stored["ct2"].stored_axes) for p in parameters(CONFIG)}
    fused: dict[str, dict[str, np.ndarray]] = {}
    for name, array in stored.items():
        module, _, part = name.partition(":")
        fused.setdefault(module, {})[part] = array
    found = {"encoder/num_heads": np.int16(2), "decoder/num_heads": np.int16(2), "decoder/pre_norm": np.int8(1)}
    for name, parts in fused.items():
        order = next((order for module, order in PARTS.items() if module in name), "")
        arrays = [parts.get(part, np.zeros_like(next(iter(parts.values())))) for part in order or ("",)]
        found[name] = np.concatenate(arrays)
    return found


def text(name: str) -> bytes:
    return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"


def variable(name: str, array) -> bytes:
    shape = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
    return text(name) + shape + struct.pack("<BI", DTYPES[str(array.dtype)], array.nbytes) + array.tobytes()


HEAD = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<I", 3)


def file(variables: dict, aliases: dict[str, str]) -> bytes:
    held = b"".join(variable(name, array) for name, array in sorted(variables.items()))
    listed = b"".join(text(name) + text(target) for name, target in aliases.items())
    return HEAD + struct.pack("<I", len(variables)) + held + struct.pack("<I", len(aliases)) + listed


TIED = {"decoder/projection/weight": "decoder/embeddings/weight"}


def folder(path: Path, data: bytes, *names: str) -> Path:
    (path / "model.bin").write_bytes(data)
    (path / "config.json").write_text(json.dumps({"alignment_heads": CONFIG.alignment_heads, "lang_ids": [272]}))
    for name in names:
        (path / name).write_bytes(small_tokenizer_files()[name])
    return path


TOKENIZER = ("vocab.json", "merges.txt", "added_tokens.json")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=["float32", "float16", "bfloat16"])
def test_floats_are_read_bit_for_bit(tmp_path, dtype):
    rounded = {path: array.astype(dtype) for path, array in state().items()}
    held = {n: a if a.ndim == 0 else a.astype(dtype) for n, a in variables(rounded).items()}
    path = folder(tmp_path, file(held, TIED), *TOKENIZER)
    assert reader.detect(path)
    assert reader.detect(path / "model.bin")
    for source in (path, path / "model.bin"):
        model = load_model(source, weights=dtype)
        assert model.config == CONFIG
        for at, loaded in nnx.to_flat_state(nnx.state(model)):
            np.testing.assert_array_equal(np.asarray(loaded[...]), rounded[at], err_msg=str(at))
    assert model.tokenizer.special == small_tokenizer().special


def test_8_and_16_bits_are_accurate_to_their_step(tmp_path):
    whole = state()
    for bits, dtype in ((8, np.int8), (16, np.int16)):
        held = variables(whole)
        for name in [name for name in held if name.endswith("weight")]:
            rows = held[name].reshape(len(held[name]), -1)
            scale = 127 / np.abs(rows).max(axis=1) if bits == 8 else np.float32(1024 / np.abs(rows).max())
            scaled = rows * (scale[:, None] if bits == 8 else scale)
            held[name], held[f"{name}_scale"] = np.rint(scaled).astype(dtype).reshape(held[name].shape), scale
        model = load_model(folder(tmp_path, file(held, TIED), *TOKENIZER))
        for path, loaded in nnx.to_flat_state(nnx.state(model)):
            largest = np.abs(whole[path]).max() if bits == 8 else 5  # with 16 bits, the maximum of all fused matrices
            step = largest / (127 if bits == 8 else 1024) if path[-1] in ("kernel", "embedding") else 0
            assert np.abs(np.asarray(loaded[...]) - whole[path]).max() <= 0.51 * step + 1e-6, path


def test_equal_variables_may_be_aliases(tmp_path):
    whole = state()
    same = [("encoder", "layers", n, "self_attn_layer_norm", "scale") for n in (0, 1)]
    whole[same[1]] = whole[same[0]]
    held = variables(whole)
    names = [f"encoder/layer_{n}/self_attention/layer_norm/gamma" for n in (0, 1)]
    del held[names[1]]
    model = load_model(folder(tmp_path, file(held, {**TIED, names[1]: names[0]}), *TOKENIZER))
    np.testing.assert_array_equal(model.encoder.layers[1].self_attn_layer_norm.scale[...], whole[same[0]])


def test_an_untied_output_layer_is_kept(tmp_path):
    held = variables(state())
    held["decoder/projection/weight"] = 2 * held["decoder/embeddings/weight"]
    model = load_model(folder(tmp_path, file(held, {}), *TOKENIZER))
    assert not model.config.tie_word_embeddings
    np.testing.assert_array_equal(model.decoder.proj_out.kernel[...].T, 2 * model.decoder.embed_tokens.embedding[...])


def test_the_list_of_tokens_makes_a_tokenizer(tmp_path):
    files = small_tokenizer_files()
    ids = {**json.loads(files["vocab.json"]), **json.loads(files["added_tokens.json"])}
    folder(tmp_path, file(variables(state()), TIED))
    (tmp_path / "vocabulary.json").write_text(json.dumps(list(ids)))
    tokenizer, ours = reader.read(tmp_path).tokenizer, small_tokenizer()
    assert tokenizer.special == ours.special
    for line in ("one and two", " the one - (another)", "ünd"):
        assert tokenizer.encode(line) == ours.encode(line)
        assert tokenizer.decode(tokenizer.encode(line)) == line


def start(n_variables: int, rest: bytes = b"") -> bytes:
    return HEAD + struct.pack("<I", n_variables) + rest


WHOLE = file(variables(state()), TIED)
SCALAR = text("a") + struct.pack("<BBI", 0, 2, 2) + b"xx"
HOSTILE = {
    "another layout": struct.pack("<I", 9) + WHOLE[4:],
    "a billion variables": start(10**9),
    "a name beyond the end": start(1, struct.pack("<H", 65535) + b"abc"),
    "a name that is not UTF-8": start(1, struct.pack("<H", 3) + b"\xff\xfe\0"),
    "a shape beyond the end": start(1, text("a") + b"\xff"),
    "a variable of terabytes": start(1, text("a") + struct.pack("<B4IBI", 4, *[2**31] * 4, 0, 2**32 - 1)),
    "bytes beyond the end": start(1, text("a") + struct.pack("<BIBI", 1, 2**30, 1, 2**30)),
    "fewer bytes than numbers": start(1, text("a") + struct.pack("<BIBI", 1, 8, 0, 4) + b"xxxx"),
    "an unknown type": start(1, text("a") + struct.pack("<BIBI", 1, 4, 9, 4) + b"xxxx"),
    "an alias of nothing": start(1, SCALAR + struct.pack("<I", 1) + text("b") + text("c")),
    "a billion aliases": start(1, SCALAR + struct.pack("<I", 10**9)),
    "no Whisper": start(1, SCALAR + struct.pack("<I", 0)),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file_is_rejected_in_one_line(tmp_path, what):
    path = folder(tmp_path, HOSTILE[what])
    tracemalloc.start()
    with pytest.raises(CheckpointError) as error:
        list(reader.read(path).tensors)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
    assert "\n" not in str(error.value)


CHANGES = {
    "with a bias of the keys": {"encoder/layer_0/self_attention/linear_0/bias": np.ones(48, np.float32)},
    "of 47 rows": {"encoder/layer_0/self_attention/linear_0/bias": np.ones(47, np.float32)},
    "without a matching scale": {"encoder/layer_0/ffn/linear_0/weight": np.ones((32, 16), np.int8)},
    "not positive": {
        "encoder/layer_0/ffn/linear_0/weight": np.ones((32, 16), np.int8),
        "encoder/layer_0/ffn/linear_0/weight_scale": np.zeros(32, np.float32),
    },
    "d_model=16 is not divisible by": {"encoder/num_heads": np.int16(3)},
}


@pytest.mark.parametrize("message", CHANGES)
@pytest.mark.filterwarnings("ignore:.*no tokenizer:")
def test_files_that_are_not_whisper_are_rejected(tmp_path, message):
    path = folder(tmp_path, file({**variables(state()), **CHANGES[message]}, TIED))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_model(path)


def test_truncated_files_are_rejected(tmp_path):
    for end in (20, 30, 60, len(WHOLE) // 2, len(WHOLE) - 3):
        with pytest.raises(CheckpointError, match="expected"):
            reader.read(folder(tmp_path, WHOLE[:end]))
