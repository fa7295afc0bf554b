"""MLX's folders: round trips, quantized weights, and files with false headers.

What mlx itself makes of them is in tests/reference.
"""

import json
import tracemalloc
import zipfile
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from tests.small import quick_compilation, small_model  # noqa: F401
from weight_loader import CheckpointError, load_model, save_model
from weight_loader.readers import open_checkpoint
from weight_loader.readers.mlx import _dequantized, unpacked
from weight_loader.readers.npz import Stored

HEADS = ((1, 0), (0, 1))
SHAPE = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "alignment_heads": HEADS}
BIAS = "encoder.blocks.0.mlp1.bias"


@pytest.fixture(scope="module")
def model():
    return small_model(**SHAPE)


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory) -> dict[str, np.ndarray]:
    """The arrays that numpy reads from the written archive."""
    folder = tmp_path_factory.mktemp("mlx") / "saved"
    assert save_model(model, folder, "mlx") == []
    return dict(np.load(folder / "weights.npz"))


@pytest.fixture
def folder(model, tmp_path) -> Path:
    save_model(model, tmp_path / "model", "mlx")
    return tmp_path / "model"


def assert_same(ours, theirs):
    ours, theirs = (nnx.to_flat_state(nnx.state(model)) for model in (ours, theirs))
    for (path, array), (other_path, other) in zip(ours, theirs, strict=True):
        assert (path, array.dtype) == (other_path, other.dtype)
        np.testing.assert_array_equal(np.asarray(array[...]), np.asarray(other[...]), err_msg=str(path))


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def arrays(folder: Path) -> dict[str, np.ndarray]:
    return dict(open_checkpoint(folder).tensors)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        arrays(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_written_models_load_exactly_with_tokenizer_and_alignment_heads(model, folder):
    loaded = load_model(folder)
    assert_same(loaded, model)
    assert loaded.config == model.config
    assert loaded.tokenizer == model.tokenizer
    assert_same(load_model(folder / "weights.npz"), model)


def test_half_precision_is_rounded(model, tmp_path):
    save_model(model, tmp_path / "half", "mlx", "float16")
    rounded = load_model(tmp_path / "half")
    for (path, ours), (_, theirs) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (rounded, model)), strict=True):
        if path != ("encoder", "embed_positions"):  # they are computed, not stored
            theirs = theirs[...].astype(jnp.float16).astype(jnp.float32)
        np.testing.assert_array_equal(np.asarray(ours[...]), np.asarray(theirs[...]), err_msg=str(path))
    with pytest.raises(CheckpointError, match="mlx cannot store dtype bfloat16; choose one of float32, float16"):
        save_model(model, tmp_path / "other", "mlx", "bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
@pytest.mark.parametrize("file", ["weights.npz", "compressed", "weights.safetensors", "model.safetensors"])
def test_every_file_and_dtype_gives_the_same_weights(folder, weights, dtype, file):
    stored = {n: a if n == "alignment_heads" else np.asfortranarray(a.astype(dtype)) for n, a in weights.items()}
    (folder / "weights.npz").unlink()
    if file.endswith(".safetensors"):
        save_file({name: np.ascontiguousarray(array) for name, array in stored.items()}, folder / file)
    else:
        (np.savez_compressed if file == "compressed" else np.savez)(folder / "weights.npz", **stored)
    read = arrays(folder)
    assert read.keys() == weights.keys() - {"alignment_heads"}
    for name, array in read.items():
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, stored[name])
    assert open_checkpoint(folder).config.alignment_heads == HEADS


def test_the_newer_kind_of_file_takes_precedence(folder, weights):
    save_file({**weights, BIAS: weights[BIAS] + 1}, folder / "model.safetensors")
    np.testing.assert_array_equal(arrays(folder)[BIAS], weights[BIAS] + 1)


def test_files_of_other_programs_with_hugging_faces_configuration_load(model, folder, weights):
    (folder / "config.json").write_text(json.dumps(model.config.to_hf()))
    loaded = load_model(folder)
    assert loaded.config == model.config
    assert_same(loaded, model)


def test_alignment_heads_of_the_whole_upper_half_mean_unknown(folder, weights):
    for heads, expected in (
        ([[1, 0], [1, 1]], None),
        ([[1, 1], [1, 0]], ((1, 1), (1, 0))),
        ([[0, 0]], ((0, 0),)),
        (None, None),
    ):
        others = {name: array for name, array in weights.items() if name != "alignment_heads"}
        np.savez(folder / "weights.npz", **others, **({"alignment_heads": np.array(heads)} if heads else {}))
        assert open_checkpoint(folder).config.alignment_heads == expected
    np.savez(folder / "weights.npz", **{**weights, "alignment_heads": np.array([[7, 0]])})
    with pytest.warns(UserWarning, match=r"alignment_heads are ignored \(decoder head \(7, 0\) does not exist"):
        assert open_checkpoint(folder).config.alignment_heads is None
    np.savez(folder / "weights.npz", **{**weights, "alignment_heads": np.array([1, 0])})
    assert "alignment_heads of int64 and shape (2,), expected pairs of numbers" in refusal(folder)


@given(st.sampled_from([2, 3, 4, 5, 6, 8]), st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20))
def test_packed_numbers_are_contiguous_bits_from_the_lowest(bits, words):
    packed = np.array(words * bits, "<u4").reshape(1, -1)
    long = int.from_bytes(packed.tobytes(), "little")
    count = 32 * packed.size // bits
    assert unpacked(packed, bits).tolist() == [long >> (i * bits) & (2**bits - 1) for i in range(count)]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("bits", "group"), [(4, 64), (8, 32), (3, 128)])
def test_a_quantized_number_is_scale_times_integer_plus_bias(monkeypatch, dtype, bits, group):
    monkeypatch.setattr("weight_loader.readers.mlx._BLOCK", 1000)  # some rows at a time
    random = np.random.default_rng(bits)
    packed = random.integers(0, 2**32, (50, 4 * group * bits // 32), np.uint32)
    scales, biases = (random.normal(size=(50, 4)).astype(dtype) for _ in range(2))
    parts = [Stored(a.dtype, a.shape, lambda a=a: a) for a in (packed, scales, biases)]
    whole = unpacked(packed, bits).reshape(50, 4, group).astype(dtype)
    numbers = _dequantized(parts, bits, group, "")
    assert numbers.dtype == dtype
    for number in np.ndindex(50, 4, group):
        row, place = number[:2], (number[0], number[1] * group + number[2])
        assert numbers[place] == whole[number] * scales[row] + biases[row]


def quantized(weights: dict[str, np.ndarray], rows: int = 64) -> dict[str, np.ndarray]:
    """One matrix [64,16] in 8 bits and groups of 16; every number becomes 2 * 5 + 1."""
    shape = (rows, 1)
    matrix = {"weight": np.full((rows, 4), 0x05050505, np.uint32), "scales": np.full(shape, 2.0, np.float32)}
    matrix["biases"] = np.ones(shape, np.float32)
    return {**weights, **{f"encoder.blocks.0.mlp1.{part}": array for part, array in matrix.items()}}


def test_a_quantized_matrix_is_read_with_its_scales_and_biases(folder, weights):
    np.savez(folder / "weights.npz", **quantized(weights))
    edit_config(folder, quantization={"group_size": 16, "bits": 8})
    read = arrays(folder)
    assert read.keys() == weights.keys() - {"alignment_heads"}
    np.testing.assert_array_equal(read["encoder.blocks.0.mlp1.weight"], np.full((64, 16), 11, np.float32))
    np.testing.assert_array_equal(read[BIAS], weights[BIAS])
    assert open_checkpoint(folder).details["quantization"] == "8 bits in groups of 16"
    assert load_model(folder).encoder.layers[0].fc1.kernel.shape == (16, 64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 32, "bits": 8}, r"mlp1.weight is \(64, 4\) of uint32, .*, not 8 bits in groups of 32;"),
        ({"group_size": 16, "bits": 7}, "'bits': 7} is not supported"),
        ({"group_size": 10**30, "bits": 8}, "not 8 bits in groups of 1000"),
        ({"group_size": "16", "bits": 8}, "is not supported"),
        ({"group_size": 16, "bits": 8, "mode": "mxfp8"}, "mxfp8'} is not supported"),
        ("8 bits", "quantization='8 bits' is not supported .* use the unquantized checkpoint"),
        (None, "quantization=None is not supported"),
    ],
)
def test_inconsistent_quantization_is_rejected(folder, weights, settings, message):
    np.savez(folder / "weights.npz", **quantized(weights))
    edit_config(folder, quantization=settings)
    with pytest.raises(CheckpointError, match=message):
        arrays(folder)


def test_sizes_that_are_missing_or_differ_are_named(folder):
    edit_config(folder, n_text_state=32)
    assert "n_audio_state=16 and n_text_state=32 must be equal" in refusal(folder)
    (folder / "config.json").write_text('{"n_mels": 80, "n_vocab": 10}')
    assert "its sizes lack n_audio_ctx, n_audio_state" in refusal(folder)


def npy(descr: str = "'<f4'", shape: str = "(2,)", data: bytes = bytes(8), version: bytes = b"\1\0") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header + data


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (npy("'|O'", data=b"cos\nsystem\n."), r"bias.npy is stored as '\|O', expected float32"),
        (npy("'>f4'"), "is stored as '>f4'"),
        (npy("[('a', '<f4')]"), "not the header of a numeric array"),
        (npy(shape="(__import__('os').abort(),)"), "not the header of a numeric array"),
        (npy(shape="(" * 9999), "not the header of a numeric array"),
        (npy(shape="(1 2,)"), "is damaged"),
        (npy(version=b"\2\0"), "not the header of a numeric array"),
        (npy(shape="(1000000000000, 4)"), r"has 8 bytes for the shape \(1000000000000, 4\); download it again"),
        (npy(shape="(0, 99999999999999999999)", data=b""), "has 0 bytes for the shape"),
        (npy(data=bytes(7)), "has 7 bytes for the shape"),
        (npy()[:60], "not the header of a numeric array"),
        (b"", "not the header of a numeric array"),
    ],
)
def test_false_or_executable_headers_are_rejected(monkeypatch, folder, member, message):
    monkeypatch.setattr("builtins.eval", None)
    with zipfile.ZipFile(folder / "weights.npz", "w") as archive:
        archive.writestr(f"{BIAS}.npy", member)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_a_zip_bomb_takes_no_memory(folder):
    with zipfile.ZipFile(folder / "weights.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{BIAS}.npy", npy(shape=f"({2**24},)", data=bytes(2**26)))
    tracemalloc.start()
    assert "would unpack to 67108992 bytes" in refusal(folder)
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()


def test_truncated_or_damaged_members_are_rejected(folder):
    file = folder / "weights.npz"
    for size, checksum, message in ((128 + 4 * 2000, None, "7992 bytes are missing"), (136, b"wrng", "Bad CRC-32")):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"{BIAS}.npy", npy(shape=f"({(size - 128) // 4},)"))
        data = bytearray(file.read_bytes())
        entry = data.rindex(b"PK\1\2")
        data[entry + 16 : entry + 20] = checksum or data[entry + 16 : entry + 20]
        data[entry + 24 : entry + 28] = size.to_bytes(4, "little")  # the uncompressed size
        file.write_bytes(data)
        assert message in refusal(folder)


def test_names_with_line_breaks_are_rejected(folder, weights):
    np.savez(folder / "weights.npz", **weights, **{"two\nlines": weights[BIAS]})
    assert r"has the member 'two\nlines.npy'; it may be malicious" in refusal(folder)


def test_truncated_files_are_rejected_wherever_they_end(folder):
    whole = (folder / "weights.npz").read_bytes()
    for size in (0, 1, 30, 1000, len(whole) // 2, len(whole) - 1):
        (folder / "weights.npz").write_bytes(whole[:size])
        assert "weights.npz" in refusal(folder)
