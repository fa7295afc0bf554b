"""The C++ kernels: the numbers of their twins in JAX, in every shape; where they cannot be had, all goes on without."""

import _ctypes
import ctypes
import os
import platform
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import missing
from tests.small import quick_compilation  # noqa: F401
from whisper_nnx.ops.cpu import build, kernels, operations

RANDOM = np.random.default_rng(0)
DTYPES = (jnp.float32, jnp.bfloat16, jnp.int8)


@pytest.fixture(autouse=True, scope="module")
def built() -> None:
    if not kernels.usable():
        missing("no C++ compiler")


def normal(*shape, dtype=jnp.float32):
    scale = np.float32(20 if dtype == jnp.int8 else 1)
    return jnp.asarray((scale * RANDOM.standard_normal(shape, dtype=np.float32)).astype(jnp.dtype(dtype)))


def assert_as_twin(kernel, *operands, rounds=2e-5):
    found, expected = jax.jit(kernel)(*operands), jax.jit(kernel.twin)(*operands)
    assert found.dtype == expected.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=rounds * np.abs(expected).max())


def assert_attends(q, k, v, lengths):
    rounds = k.dtype == jnp.bfloat16 and q.shape[1] > 8 and kernels.multiplies_bfloat16()
    if rounds:
        q = q.astype(k.dtype).astype(q.dtype)
    assert_as_twin(kernels.attention, q, k, v, lengths, rounds=2**-8 if rounds else 2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 13, 32])
def test_products_with_a_table(rows, dtype):
    for n, width in ((1, 16), (67, 64), (5003, 192)):  # the last is shared out to threads
        table = normal(n, width, dtype=dtype)
        assert kernels.can_multiply_table(table)
        assert_as_twin(kernels.table_product, normal(rows, width), table)
    assert not kernels.can_multiply_table(normal(5, 24, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 13, 32])
def test_products_with_a_layer(rows, dtype):
    for width, n in ((3, 64), (192, 768)):
        matrix = normal(width, n, dtype=dtype)
        assert kernels.can_multiply_layer(matrix)
        assert_as_twin(kernels.layer_product, normal(rows, width), matrix)
    assert not kernels.can_multiply_layer(normal(64, 32, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 5, 9, 50])
@pytest.mark.parametrize("positions", [1, 17, 64, 1500])
def test_attention(positions, queries, dtype):
    k, v = normal(6, positions, 64, dtype=dtype), normal(6, positions, 64, dtype=dtype)
    assert kernels.can_attend(k)
    q = jnp.asarray(np.asarray(normal(6, queries, 64)) / np.float32(100 if dtype == jnp.int8 else 1))
    for lengths in (np.full(6, positions), RANDOM.integers(1, positions + 1, 6)):
        assert_attends(q, k, v, jnp.asarray(lengths.astype(np.int32)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "end"), [(1, 1), (1, 70), (3, 1), (3, 100)])
def test_attention_to_a_cache(group, end, dtype):
    k, v = normal(2, 3, 100 * group, 64, dtype=dtype), normal(2, 3, 100 * group, 64, dtype=dtype)
    q = normal(2, 3, group, 64) / (100 if dtype == jnp.int8 else 1)
    for source in (RANDOM.integers(-1, group, (2 * group, 100)), np.zeros((2 * group, 100))):
        source[:, end - 1], source[:, end:] = np.arange(2 * group) % group, -1  # its own, and what is not written
        assert_as_twin(kernels.cached_attention, q, k, v, jnp.asarray(source, jnp.int32), jnp.int32(end))


def test_attention_of_a_whole_window_to_itself():
    for dtype in (jnp.float32, jnp.bfloat16):
        q, k, v = normal(2, 1500, 128), normal(2, 1500, 128, dtype=dtype), normal(2, 1500, 128, dtype=dtype)
        assert_attends(q / 8, k, v, jnp.full(2, 1500, jnp.int32))


def test_attention_to_scores_far_apart_neither_overflows_nor_vanishes():
    q, k, v = 100 * normal(2, 3, 64), normal(2, 50, 64), normal(2, 50, 64)
    assert_attends(q, k, v, jnp.full(2, 50, jnp.int32))


def test_attention_does_not_read_behind_its_length_nor_hide_what_is_no_number():
    for queries in (1, 20):
        q, k, v = normal(2, queries, 64), normal(2, 40, 64), normal(2, 40, 64)
        bad = k.at[:, 10:].set(jnp.nan)
        found = kernels.attention(q, bad, v, jnp.array([10, 11], jnp.int32))
        assert np.isfinite(found[0]).all()
        assert np.isnan(found[1]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_table(dtype):
    table, ids = normal(7, 32, dtype=dtype), jnp.array([3, 0, 6, 3], jnp.int32)
    np.testing.assert_array_equal(kernels.table_rows(table, ids), table.astype(jnp.float32)[ids])
    for id in (-1, 7):
        assert np.isnan(kernels.table_rows(table, jnp.array([id], jnp.int32))).all()
        assert np.isnan(kernels.table_rows.twin(table, jnp.array([id], jnp.int32))).all()


def test_kernels_can_be_differentiated_and_mapped():
    x, table, weight = normal(2, 3, 16), normal(9, 16), normal(3, 9)

    def total(product, x, table):
        return (jnp.sin(product(x, table)) * weight).sum()

    for found, expected in zip(
        jax.grad(total, (1, 2))(kernels.table_product, x[0], table),
        jax.grad(total, (1, 2))(kernels.table_product.twin, x[0], table),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    whole = normal(9, 16, dtype=jnp.int8)
    found = jax.grad(total, 1)(kernels.table_product, x[0], whole)
    np.testing.assert_allclose(found, jax.grad(total, 1)(kernels.table_product.twin, x[0], whole), rtol=1e-4)
    mapped = jax.vmap(kernels.table_product, (0, None))(x, table)
    np.testing.assert_allclose(mapped, jnp.stack([kernels.table_product.twin(row, table) for row in x]), atol=1e-5)


def test_several_devices_do_without(monkeypatch):
    assert operations.kernels_usable()
    assert operations.create().window_by_window
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert not operations.kernels_usable()
    assert not operations.create().window_by_window
    assert operations.cache_dtypes(jnp.bfloat16) == (jnp.float32, jnp.float32)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="its instructions")
@pytest.mark.slow
@pytest.mark.parametrize("without", ["-mno-avx512f", "-mno-avx"])
def test_on_processors_of_narrower_registers(without, tmp_path):
    instructions = Path("/proc/cpuinfo")
    if "512" in without and instructions.exists() and "avx512f" not in instructions.read_text():
        pytest.skip("the other tests compile for registers as narrow")
    narrow = compiler(tmp_path, f'exec c++ "$@" {without}')
    environment = os.environ | {"CXX": narrow, "XDG_CACHE_HOME": str(tmp_path)}
    numbers = "(products_with and (1- or 5- or 32-)) or (test_attention and (1500 or 17)) or rows_of"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", numbers]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert list(tmp_path.glob("whisper_nnx/kernels/*.so"))


SCRIPT = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import jax, jax.numpy as jnp
from whisper_nnx.ops.cpu import kernels
assert kernels.usable()
x, table = jnp.ones((5, 64)), jnp.ones((9000, 64), jnp.int8)
assert (jax.jit(kernels.table_product)(x, table) == 64).all()
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux's")
def test_on_a_single_core():
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=120)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the user's own, and how often something was compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(build.SWITCH, raising=False)
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "cache" / "whisper_nnx" / "kernels"


def compiler(folder, script: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


# Compiles in no time: a library that has its key and nothing else.
_STAMPED = """
for argument; do case "$argument" in -DKEY=*) key="$argument";; esac; done
echo 'extern "C" const char* Key() { return KEY; }' | exec c++ "$key" -shared -fPIC -x c++ -o "$argument" -
"""


def counting(folder, rest: str = _STAMPED) -> str:
    """A compiler that appends a line to `folder`/calls each time."""
    return compiler(folder, f"echo once >> {folder}/calls; {rest}")


def calls(folder) -> int:
    return len((folder / "calls").read_text().split())


def test_they_are_compiled_once_for_a_compiler_and_whole_or_not_at_all(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", counting(tmp_path))
    assert build.load() is not None
    assert [path.suffix for path in cache.iterdir()] == [".so"]
    assert build.load() is not None
    assert calls(tmp_path) == 1


def test_a_damaged_library_is_compiled_again_and_never_opened(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", counting(tmp_path))
    build.load()
    (library,) = cache.iterdir()
    whole, opened, open_library = library.read_bytes(), [], ctypes.CDLL
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    monkeypatch.setattr(ctypes, "CDLL", lambda path: opened.append(Path(path).read_bytes()) or open_library(path))
    monkeypatch.setattr(build, "_compiled", lambda *_: [library.write_bytes(whole), library][1])
    for damaged in (whole[:20_000], whole[:-1], b"", bytes(flipped)):
        library.unlink()  # this process keeps what it has opened
        library.write_bytes(damaged)
        opened.clear()
        assert build.load() is not None
        assert opened == [whole]


def test_a_library_of_something_else_is_compiled_again(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", counting(tmp_path))
    build.load()
    (library,) = cache.iterdir()
    library.unlink()
    foreign = Path(_ctypes.__file__).read_bytes()
    key = library.name.partition("-")[0]
    (cache / build._name(key, foreign)).write_bytes(foreign)
    assert build.load().Key() == key.encode()
    assert list(cache.iterdir()) == [library]
    assert calls(tmp_path) == 2


def test_a_library_that_others_can_have_written_is_compiled_again(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", counting(tmp_path))
    build.load()
    (library,) = cache.iterdir()
    library.chmod(0o722)
    assert build.load() is not None
    assert stat.S_IMODE(library.stat().st_mode) == 0o700
    library.rename(tmp_path / "elsewhere.so")
    library.symlink_to(tmp_path / "elsewhere.so")
    assert build.load() is not None
    assert not library.is_symlink()
    assert calls(tmp_path) == 3


@pytest.mark.slow
def test_processes_that_start_at_once_compile_once(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", counting(tmp_path, f"sleep 1; {_STAMPED}"))
    code = "from whisper_nnx.ops.cpu import build; assert build.load() is not None"
    running = [subprocess.Popen([sys.executable, "-W", "error", "-c", code]) for _ in range(3)]
    assert [process.wait(timeout=300) for process in running] == [0] * 3
    assert calls(tmp_path) == 1
    assert [path.suffix for path in cache.iterdir()] == [".so"]


def test_eight_threads_load_once(monkeypatch):
    loads: list[None] = []
    monkeypatch.setattr(kernels, "load", lambda: loads.append(time.sleep(0.1)))
    kernels._registered.cache_clear()
    try:
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda _: kernels.usable(), range(8))) == [False] * 8
        assert len(loads) == 1
    finally:
        kernels._registered.cache_clear()


def test_a_failure_is_remembered_for_a_day_and_for_this_compiler(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", counting(tmp_path, "echo 'error: no such flag' >&2; exit 1"))
    for reason in ("no such flag; ", r"no such flag \(remembered; delete .*\.failed to compile again\); "):
        with pytest.warns(UserWarning, match=f"slower: error: {reason}"):
            assert build.load() is None
    assert calls(tmp_path) == 1
    (failed,) = cache.iterdir()
    day_before = failed.stat().st_mtime - 24 * 3600
    os.utime(failed, (day_before, day_before))
    with pytest.warns(UserWarning, match="no such flag; "):
        assert build.load() is None
    assert calls(tmp_path) == 2
    monkeypatch.setenv("CXX", counting(tmp_path))  # repaired: another file than before
    assert build.load() is not None
    assert calls(tmp_path) == 3


@pytest.mark.parametrize("way", ["switched off", "no compiler"])
def test_without_them_nothing_is_said(cache, monkeypatch, way):
    if way == "switched off":
        monkeypatch.setenv(build.SWITCH, "0")
    else:
        monkeypatch.setenv("PATH", str(cache))
    assert build.load() is None
    assert not cache.exists()


def test_a_compiler_that_fails_is_told_in_one_line(cache, tmp_path, monkeypatch):
    said = "echo 'a warning' >&2; echo 'kernels.cc: error: no such flag' >&2; echo more >&2; exit 1"
    monkeypatch.setenv("CXX", compiler(tmp_path, said))
    with pytest.warns(UserWarning, match=r"slower: kernels.cc: error: no such flag; WHISPER_NNX_KERNELS=0") as told:
        assert build.load() is None
    assert "\n" not in str(told[0].message)
    assert [path.suffix for path in cache.iterdir()] == [".failed"]
    monkeypatch.setenv("CXX", compiler(tmp_path, "exit 3"))
    with pytest.warns(UserWarning, match=r"slower: .*compiler failed with exit code 3; WHISPER_NNX_KERNELS=0"):
        assert build.load() is None


def test_a_compiler_that_writes_no_library_is_told(cache, tmp_path, monkeypatch):
    script = 'while [ "$1" != -o ]; do shift; done; echo nonsense > "$2"'
    monkeypatch.setenv("CXX", compiler(tmp_path, script))
    with pytest.warns(UserWarning, match="no kernels for this CPU"):
        assert build.load() is None


def test_a_folder_that_others_may_write_to_is_not_used(cache):
    cache.mkdir(parents=True)
    cache.parent.chmod(0o777)
    with pytest.warns(UserWarning, match="other users can write to"):
        assert build.load() is None
