"""Damages small valid checkpoints of every format and opens them: nothing but CheckpointError and OSError may come out.

    python -m tests.weight_loader.fuzz_readers 100000 [--seed 0] [--keep FOLDER]

What came out otherwise, took long or asked for much memory is kept in the folder, and the exit code is 1. Such files
belong into tests/weight_loader/findings, where test_fuzz.py opens them ever after.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx, serialization
from flax.traverse_util import unflatten_dict

from tests.small import small_tokenizer_files
from weight_loader.checkpoint import Content
from weight_loader.folder import CheckpointError
from weight_loader.ggml_blocks import STORAGES
from weight_loader.load import abstract_model
from weight_loader.readers import read_checkpoint
from weight_loader.writers import write_checkpoint
from whisper_nnx.audio.features import mel_filters
from whisper_nnx.model.config import WhisperConfig

SECONDS, MEMORY = 20, 2 * 2**30  # limits per input
Files = dict[str, bytes]  # of a checkpoint's folder, by name


def content(d_model: int = 4, vocab_size: int = 40) -> Content:
    """A model of a few thousand parameters, without a tokenizer."""
    sizes = {"num_mel_bins": 2, "max_source_positions": 4, "max_target_positions": 4}
    config = WhisperConfig(d_model, 1, 2, 1, 2, vocab_size, **sizes)
    random = np.random.default_rng(0)
    state = dict(nnx.to_flat_state(nnx.state(abstract_model(config))))
    arrays = {path: random.normal(size=variable.shape).astype(np.float16) for path, variable in state.items()}
    return Content(config, None, arrays)


def written(format: str) -> Files:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        write_checkpoint(content(), path, format)
        return {file.name: file.read_bytes() for file in (path.iterdir() if path.is_dir() else [path])}


def mlx_quantized() -> Files:
    """MLX files with one matrix quantized to 4 bits in groups of 64."""
    files, arrays = written("mlx"), io.BytesIO()
    with np.load(io.BytesIO(files["weights.npz"])) as held, zipfile.ZipFile(arrays, "w") as archive:
        quantized = {"weight": np.ones((40, 8), np.uint32), "scales": np.ones((40, 1), np.float16)}
        quantized["biases"] = quantized["scales"]
        all_of_them = {**held, **{f"decoder.token_embedding.{end}": array for end, array in quantized.items()}}
        for name, array in all_of_them.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, np.asarray(array))
    config = {**json.loads(files["config.json"]), "quantization": {"bits": 4, "group_size": 64}}
    return {"config.json": json.dumps(config).encode(), "weights.npz": arrays.getvalue()}


def torch_bin() -> Files:
    """pytorch_model.bin: the archive of the .pt file, with Hugging Face's names and without sizes."""
    files, renamed = written("hf"), {}
    made = content()
    ours = zip(made.table("openai"), made.table("hf"), strict=True)
    archive = zipfile.ZipFile(io.BytesIO(written("openai")["model.pt"]))
    data = archive.read("archive/data.pkl")
    data = b"\x80\x02}(" + data[data.index(b"model_state_dict") + len(b"model_state_dict") + 2 : -2] + b"."
    for (_, openai), (_, hf) in ours:
        renamed[_text(openai.name)] = _text(hf.name)
    for old, new in sorted(renamed.items(), key=lambda pair: -len(pair[0])):
        data = data.replace(old, new)
    made_of = io.BytesIO()
    with zipfile.ZipFile(made_of, "w") as target:
        for name in archive.namelist():
            target.writestr(name, data if name.endswith(".pkl") else archive.read(name))
    return {"pytorch_model.bin": made_of.getvalue(), "config.json": files["config.json"]}


def _text(name: str) -> bytes:
    return b"X" + struct.pack("<I", len(name)) + name.encode()


def flax_msgpack() -> Files:
    tree = unflatten_dict({tuple(name.split("/")): array for name, array in content().tensors("flax")})
    return {"flax_model.msgpack": serialization.msgpack_serialize(tree), "config.json": written("hf")["config.json"]}


def ggml(kind: str) -> Files:
    storages = {storage.name: storage for storage in STORAGES}
    made, storage = content(32), storages[kind]
    config, filters = made.config, mel_filters(made.config.num_mel_bins)
    sizes = (config.vocab_size, 4, 32, 2, 1, 4, 32, 2, 1, config.num_mel_bins, storage.file_id)
    data = b"lmgg" + struct.pack("<11i", *sizes) + struct.pack("<2i", *filters.shape) + filters.tobytes()
    data += struct.pack("<i", 3) + struct.pack("<i1si2si0s", 1, b"a", 2, b"bc", 0, b"")
    for name, array in made.tensors("ggml"):
        kept = storage if array.ndim == 2 else storages["f32"]
        data += struct.pack(f"<{3 + array.ndim}i", array.ndim, len(name), kept.tensor_id, *array.shape[::-1])
        data += name.encode() + kept.encode(array).tobytes()
    return {"ggml-model.bin": data}


def ctranslate2(kind: str) -> Files:
    """model.bin with fused projections; matrices of 8 bits have a scale per row."""
    joined: dict[str, list[np.ndarray]] = {}
    files = small_tokenizer_files()
    ids = {**json.loads(files["vocab.json"]), **json.loads(files["added_tokens.json"])}
    for name, array in content(vocab_size=len(ids)).tensors("ct2", "float32"):
        joined.setdefault(name.partition(":")[0], []).append(array)
    arrays: dict[str, np.ndarray] = {}
    for name, parts in joined.items():
        if name.endswith(("/self_attention/linear_0/bias", "/attention/linear_1/bias")):
            parts.insert(-1, np.zeros_like(parts[0]))  # the keys'
        arrays[name] = np.concatenate(parts)
        if kind == "int8" and arrays[name].ndim == 2 and name.endswith("weight"):
            scale = 127 / np.abs(arrays[name]).max(axis=1)
            arrays[f"{name}_scale"] = scale.astype(np.float32)
            arrays[name] = np.rint(arrays[name] * scale[:, None]).astype(np.int8)
    for side in ("encoder", "decoder"):
        arrays[f"{side}/num_heads"] = np.array(2, np.int16)
    kinds = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}
    data = struct.pack("<I", 6) + _named("WhisperSpec") + struct.pack("<2I", 3, len(arrays))
    for name, array in arrays.items():
        data += _named(name) + struct.pack("<B", array.ndim) + struct.pack(f"<{array.ndim}I", *array.shape)
        data += struct.pack("<BI", kinds[str(array.dtype)], array.nbytes) + array.tobytes()
    data += struct.pack("<I", 1) + _named("decoder/projection/weight") + _named("decoder/embeddings/weight")
    config = {"alignment_heads": [[0, 1]], "lang_ids": [], "suppress_ids": [], "suppress_ids_begin": []}
    words = json.dumps(sorted(ids, key=ids.__getitem__))
    return {"model.bin": data, "config.json": json.dumps(config).encode(), "vocabulary.json": words.encode()}


def _named(name: str) -> bytes:
    return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"


SEEDS: dict[str, Callable[[], Files]] = {
    "hf": lambda: written("hf"),
    "bin": torch_bin,
    "openai": lambda: written("openai"),
    "mlx": lambda: written("mlx"),
    "mlx_quantized": mlx_quantized,
    "flax": flax_msgpack,
    **{f"ggml_{kind}": lambda kind=kind: ggml(kind) for kind in ("f16", "q5_1", "q8_0")},
    **{f"ct2_{kind}": lambda kind=kind: ctranslate2(kind) for kind in ("float32", "int8")},
}
_INTERESTING = [0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, 2**40]


def mutated(files: Files, random: np.random.Generator) -> Files:
    """Damages one of the files one to four times, or a member of an archive that is repacked as a valid archive."""
    name = str(random.choice(sorted(files)))
    if files[name][:2] == b"PK" and random.random() < 0.6:
        return {**files, name: _repacked(files[name], random)}
    return {**files, name: _damaged(files[name], random)}


def _repacked(data: bytes, random: np.random.Generator) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as held, zipfile.ZipFile(made, "w") as archive:
        names = held.namelist()
        special = [name for name in names if name.endswith("data.pkl")]
        chosen = special[0] if special and random.random() < 0.8 else names[random.integers(len(names))]
        for member in names:
            content = held.read(member)
            compress = zipfile.ZIP_DEFLATED if random.random() < 0.01 else zipfile.ZIP_STORED
            archive.writestr(member, _damaged(content, random) if member == chosen else content, compress)
    return made.getvalue()


def _damaged(data: bytes, random: np.random.Generator) -> bytes:
    made = bytearray(data)
    for _ in range(random.integers(1, 5)):
        if not made:
            break
        at = _place(len(made), random)
        size = int(random.integers(1, 9)) if random.random() < 0.7 else int(random.integers(1, 400))
        match int(random.integers(8)):
            case 0:
                made[at] ^= 1 << int(random.integers(8))
            case 1:
                made[at : at + size] = random.bytes(min(size, len(made) - at))
            case 2:
                del made[at:]
            case 3:
                del made[at : at + size]
            case 4:
                made[at:at] = made[at : at + size]
            case 5:
                made[at:at] = random.bytes(size)
            case 6:
                width = int(random.choice([1, 2, 4, 8]))
                number = _INTERESTING[random.integers(len(_INTERESTING))] % 256**width
                made[at : at + width] = number.to_bytes(width, str(random.choice(["little", "big"])))
            case 7:
                other = _place(len(made), random)
                made[at : at + size] = made[other : other + size]
    return bytes(made)


def _place(length: int, random: np.random.Generator) -> int:
    """Random offset, mostly near the start or end, where headers are."""
    where, near = random.random(), min(length, 400)
    if where < 0.5:
        return int(random.integers(near))
    return int(random.integers(length - near, length)) if where < 0.65 else int(random.integers(length))


def opened(path: Path) -> str:
    """Returns "read" or the error message. Raises all other exceptions."""
    try:
        checkpoint = read_checkpoint(path)  # without the last resort, which would hide unexpected exceptions
        for name, array in checkpoint.tensors:
            assert isinstance(name, str) and array.ndim < 9  # noqa: PT018
    except (CheckpointError, OSError) as error:
        message = str(error)
        assert "\n" not in message, f"more than one line: {message!r}"
        assert len(message) < 5000, f"{len(message)} characters: {message[:200]!r}"
        return message
    return "read"


class _Late(Exception):
    pass


@contextmanager
def limited() -> Iterator[None]:
    """Limits time and memory; raises when exceeded."""

    def late(*_: Any) -> None:
        raise _Late(f"more than {SECONDS} s")

    statm = Path("/proc/self/statm")  # Linux's; elsewhere memory is not limited
    used = int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else None
    before = resource.getrlimit(resource.RLIMIT_AS)
    if used is not None:
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def fuzz(inputs: int, seed: int, keep: Path, scratch: Path) -> tuple[dict[str, int], list[str]]:
    """Returns the number of inputs per seed that were read, and descriptions of unexpected exceptions."""
    random = np.random.default_rng(seed)
    seeds = {name: make() for name, make in SEEDS.items()}
    read, findings = dict.fromkeys(seeds, 0), []
    names = sorted(seeds)
    for number in range(inputs):
        name = names[number % len(names)]
        files = mutated(seeds[name], random)
        for old in scratch.iterdir():
            old.unlink()
        for file, data in files.items():
            (scratch / file).write_bytes(data)
        main = max(files, key=lambda file: file.rpartition(".")[2] not in ("json", "txt"))
        path = scratch / main if len(files) == 1 or random.random() < 0.3 else scratch
        try:
            with limited():
                read[name] += opened(path) == "read"
        except Exception as error:
            findings.append(f"{name} {number}: {type(error).__name__}: {error}".splitlines()[0])
            kept = keep / f"{name}_{seed}_{number}"
            kept.mkdir(parents=True, exist_ok=True)
            for file, data in files.items():
                (kept / file).write_bytes(data)
            (kept / "traceback.txt").write_text(f"{path.name}\n{traceback.format_exc()}")
    return read, findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz_findings"))
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    jax.config.update("jax_platforms", "cpu")
    memory = Path("/dev/shm")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
        read, findings = fuzz(given.inputs, given.seed, given.keep, Path(scratch))
    print("\n".join(findings))
    took = time.perf_counter() - start
    print(f"{given.inputs} inputs in {took:.0f} s, {sum(read.values())} of them read all the same: {read}")
    print(f"{len(findings)} findings" + (f", kept in {given.keep}" if findings else ""))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
