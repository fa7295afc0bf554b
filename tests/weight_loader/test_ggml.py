"""whisper.cpp's files: round trips, block formats, damage."""

import dataclasses
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from weight_loader import CheckpointError, load_model
from weight_loader.checkpoint import Content
from weight_loader.ggml_blocks import BLOCK, STORAGES
from weight_loader.load import abstract_model
from weight_loader.readers import ggml as reader
from weight_loader.vocabulary import implied_tokens, tokenizer_of
from weight_loader.writers import ggml as writer
from whisper_nnx.audio.features import mel_filters
from whisper_nnx.model.config import RELEASED, RELEASED_ALIGNMENT_HEADS, WhisperConfig

SMALL = WhisperConfig(32, 1, 2, 2, 2, 51865, num_mel_bins=3, max_source_positions=4, max_target_positions=4)
QUANTIZED = [storage for storage in STORAGES if storage.is_quantized]


@pytest.fixture(scope="module")
def tokenizer():
    """As large as the multilingual tokenizer: the bytes, 50,000 pairs of them, an empty token."""
    pairs = (bytes((first, second)) for first in range(196) for second in range(256))
    text = [
        *(bytes((byte,)) for byte in range(256)),
        *(pair for pair, _ in zip(pairs, range(50_000), strict=False)),
        b"",
    ]
    return tokenizer_of(dict(enumerate(text)), implied_tokens(51865), 51865)


def content(tokenizer, config: WhisperConfig = SMALL, dtype=np.float32) -> Content:
    random = np.random.default_rng(0)
    state = dict(nnx.to_flat_state(nnx.state(abstract_model(config))))
    arrays = {path: random.standard_normal(v.shape, np.float32).astype(dtype) for path, v in state.items()}
    return Content(config, tokenizer, arrays)


def assert_same(model, arrays):
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        np.testing.assert_array_equal(np.asarray(variable[...]), arrays[path], err_msg=str(path))


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
def test_the_shape_of_tiny_is_restored_exactly(tokenizer, tmp_path, dtype):
    tiny = content(tokenizer, RELEASED["tiny"], dtype)
    assert not writer.write(tiny, tmp_path / "tiny.bin", dtype)
    model = load_model(tmp_path / "tiny.bin", weights=dtype)
    assert_same(model, tiny.arrays)
    # A ggml file has no alignment heads; those of the released size are used.
    assert model.config == dataclasses.replace(RELEASED["tiny"], alignment_heads=RELEASED_ALIGNMENT_HEADS["tiny"])
    assert model.tokenizer.special == tokenizer.special
    assert model.tokenizer.encode("abä") == tokenizer.encode("abä")


def test_float16_rounds_only_matrices(tokenizer, tmp_path):
    made = content(tokenizer)
    writer.write(made, tmp_path / "half.bin", "float16")
    whole = {p: a for p, a in made.arrays.items() if a.ndim < 2 or p[-2:] == ("embed_positions", "embedding")}
    whole[("encoder", "embed_positions")] = made.arrays[("encoder", "embed_positions")]
    rounded = {path: array.astype(np.float16).astype(np.float32) for path, array in made.arrays.items()}
    assert_same(load_model(tmp_path / "half.bin"), {**rounded, **whole})


@pytest.mark.parametrize(
    "storage",
    [pytest.param(s, marks=[pytest.mark.slow] if s.name in ("q4_1", "q5_0") else []) for s in QUANTIZED],
    ids=lambda storage: storage.name,
)
def test_quantized_numbers_are_accurate_to_their_step(tokenizer, tmp_path, storage):
    made = content(tokenizer)
    writer.write(made, tmp_path / "quantized.bin", storage.name)
    assert reader.read(tmp_path / "quantized.bin").details["stored as"] == storage.name
    model = load_model(tmp_path / "quantized.bin")
    ours = np.asarray(model.decoder.embed_tokens.embedding[...]).reshape(-1, BLOCK)
    theirs = made.arrays[("decoder", "embed_tokens", "embedding")].reshape(-1, BLOCK)
    largest = np.abs(theirs).max(axis=1)
    span = np.ptp(theirs, axis=1) if storage.has_minimum else 2 * largest
    step = span / (2**storage.bits - 1 if storage.has_minimum or storage.bits == 8 else 2**storage.bits)
    error = np.abs(ours - theirs).max(axis=1)
    # Half a step and what float16 rounds of scale and minimum; without a minimum, one end of the range is a step short.
    reach = 0.5 if storage.has_minimum or storage.bits == 8 else 1.0
    assert (error <= reach * step + largest * 2.0**-9).all()
    assert error.max() > 0.4 * step.min()


def decoded(raw: bytes, storage) -> list[float]:
    """Decodes a block by ggml's published layout."""
    (scale,) = struct.unpack_from("<e", raw)
    minimum = struct.unpack_from("<e", raw, 2)[0] if storage.has_minimum else None
    if storage.bits == 8:
        return [q * scale for q in struct.unpack("<32b", raw[2:])]
    nibbles = raw[-16:]
    high = struct.unpack("<I", raw[-20:-16])[0] if storage.bits == 5 else 0
    numbers = []
    for i in range(32):
        q = nibbles[i % 16] >> (4 * (i // 16)) & 15 | (high >> i & 1) << 4
        numbers.append(q * scale + minimum if storage.has_minimum else (q - 2 ** (storage.bits - 1)) * scale)
    return numbers


@pytest.mark.parametrize("storage", QUANTIZED, ids=lambda storage: storage.name)
def test_blocks_are_read_as_published(storage):
    blocks = np.random.default_rng(1).integers(0, 256, (20, storage.dtype.itemsize), np.uint8)
    blocks[:, 1] &= 0x3B  # a finite scale
    blocks[:, 3] &= 0x3B
    expected = [number for block in blocks for number in decoded(block.tobytes(), storage)]
    np.testing.assert_allclose(
        storage.decode(blocks.reshape(-1).view(storage.dtype), (640,)), np.float32(expected), rtol=1e-6
    )


def test_models_that_whisper_cpp_would_misread_are_not_written(tokenizer, tmp_path):
    def refused(made: Content, dtype: str = "float32") -> str:
        with pytest.raises(CheckpointError) as error:
            writer.write(made, tmp_path / f"{len(list(tmp_path.iterdir()))}.bin", dtype)
        return str(error.value)

    made = content(tokenizer)
    assert "no tokenizer" in refused(dataclasses.replace(made, tokenizer=None))
    assert "encoder_ffn_dim=64" in refused(content(tokenizer, dataclasses.replace(SMALL, encoder_ffn_dim=64)))
    assert "vocab_size=51900" in refused(content(tokenizer, dataclasses.replace(SMALL, vocab_size=51900)))
    added = {**implied_tokens(51865), "<|transcribe|>": 50358, "<|translate|>": 50359}
    text = {i: tokenizer._bytes[i] for i in range(50257)}
    assert "<|translate|>=50359" in refused(dataclasses.replace(made, tokenizer=tokenizer_of(text, added, 51865)))
    ffn = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    assert "blocks of 32" in refused(content(tokenizer, dataclasses.replace(SMALL, d_model=16, **ffn)), "q8_0")
    untied = content(tokenizer, dataclasses.replace(SMALL, tie_word_embeddings=False))
    assert "proj_out" in refused(untied)
    made.arrays[("encoder", "conv1", "kernel")][0, 0, 0] = 1e5
    assert "encoder.conv1.weight: numbers as large as 1" in refused(made, "float16")


def test_the_old_code_of_hebrew_is_the_same_token(tmp_path):
    added = {name.replace("<|he|>", "<|iw|>"): i for name, i in implied_tokens(51865).items()}
    text = {i: i.to_bytes(2, "big") if i > 255 else bytes((i,)) for i in range(50257)}
    assert "<|iw|>" in added
    assert not writer.write(content(tokenizer_of(text, added, 51865)), tmp_path / "ggml.bin", "float32")


def test_an_unusable_vocabulary_is_reported(tmp_path):
    path = tmp_path / "small.bin"
    path.write_bytes(small_file())
    checkpoint = reader.read(path)
    assert checkpoint.tokenizer is None
    assert "vocab_size=40" in checkpoint.details["vocabulary"]
    with pytest.warns(UserWarning, match="no tokenizer"):
        load_model(path)


def header(**changes: int) -> bytes:
    sizes = {"vocab": 40, "frames": 4, "d": 4, "heads": 2, "layers": 1, "text": 4, "text_d": 4, "text_heads": 2}
    sizes |= {"text_layers": 1, "mels": 2, "kind": 0}
    return b"lmgg" + struct.pack("<11i", *({**sizes, **changes}.values()))


FILTERS = struct.pack("<2i", 2, 201) + mel_filters(2).tobytes()
WORDS = struct.pack("<i", 2) + struct.pack("<i1si1s", 1, b"a", 1, b"b")


def tensor(name: bytes, shape: tuple[int, ...], data: bytes, kind: int = 0, n_name: int | None = None) -> bytes:
    start = struct.pack("<3i", len(shape), len(name) if n_name is None else n_name, kind)
    return start + struct.pack(f"<{len(shape)}i", *shape[::-1]) + name + data


def small_file() -> bytes:
    config = WhisperConfig(4, 1, 2, 1, 2, 40, num_mel_bins=2, max_source_positions=4, max_target_positions=4)
    tensors = content(None, config).tensors("ggml")
    return header() + FILTERS + WORDS + b"".join(tensor(n.encode(), a.shape, a.tobytes()) for n, a in tensors)


def assert_rejected(path: Path, data: bytes) -> str:
    """Checks that reading fails in one line and with little memory."""
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(CheckpointError) as error:
        list(reader.read(path).tensors)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5_000_000
    assert "\n" not in str(error.value)
    return str(error.value)


STARTS = {
    "an unknown storage": header(kind=14),
    "the terabytes of a vocabulary": header(vocab=2**31 - 1),
    "a negative width": header(d=-4, text_d=-4),
    "two widths": header(text_d=8),
    "a billion layers": header(layers=10**9),
    "other mel filters": header() + struct.pack("<2i", 2**30, 2**30),
    "negative mel filters": header() + struct.pack("<2i", -2, 201),
    "a billion tokens": header() + FILTERS + struct.pack("<i", 10**9),
    "fewer than no tokens": header() + FILTERS + struct.pack("<i", -1),
    "an endless token": header() + FILTERS + struct.pack("<2i", 1, 2**31 - 1),
    "a token of negative length": header() + FILTERS + struct.pack("<2i", 1, -5),
    "a tensor of terabytes": tensor(b"a", (2**30, 2**30), b""),
    "a tensor beyond 64 bits": tensor(b"a", (2**31 - 1,) * 4, b""),
    "a negative axis": tensor(b"a", (-4, -4), b"x" * 64),
    "an empty axis": tensor(b"a", (0, 4), b""),
    "no axes": tensor(b"a", (), b"xxxx"),
    "a thousand axes": struct.pack("<3i", 1000, 1, 0),
    "an unknown storage of a tensor": tensor(b"a", (4,), b"x" * 16, kind=5),
    "broken blocks": tensor(b"a", (4, 4), b"x" * 64, kind=8),
    "a name that is not UTF-8": tensor(b"\xff\xfe", (1,), b"xxxx"),
    "an endless name": tensor(b"a", (1,), b"xxxx", n_name=2**31 - 1),
    "a name of negative length": tensor(b"a", (1,), b"xxxx", n_name=-1),
}


@pytest.mark.parametrize("what", STARTS)
def test_a_hostile_file_is_rejected_in_one_line(tmp_path, what):
    data = STARTS[what]
    assert_rejected(tmp_path / "x.bin", data if data.startswith(b"lmgg") else header() + FILTERS + WORDS + data)


def test_truncated_files_are_rejected(tmp_path):
    whole = small_file()
    boundaries = len(header() + FILTERS + WORDS)
    for end in [*range(4, 60, 7), *range(boundaries + 1, boundaries + 120, 11), len(whole) - 1]:
        assert "expected" in assert_rejected(tmp_path / "x.bin", whole[:end])


def test_other_mel_filters_warn(tmp_path):
    (tmp_path / "x.bin").write_bytes(header() + struct.pack("<2i", 2, 201) + bytes(4 * 402) + WORDS)
    with pytest.warns(UserWarning, match="mel filters differ from Whisper's"):
        reader.read(tmp_path / "x.bin")
