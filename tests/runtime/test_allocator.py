"""The memory switch."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
if "keep" in sys.argv:
    from whisper_nnx.runtime.allocator import keep_memory
    assert keep_memory()
f = jax.jit(lambda x: jax.nn.softmax(x @ x.T, axis=-1).sum(axis=0))
x = jnp.ones((3000, 8))
for _ in range(3):
    f(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    f(x).block_until_ready()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
large = sum(int(line.split()[1]) for line in open("/proc/self/smaps") if line.startswith("AnonHugePages"))
print(faults, large)
"""


def faults(*arguments: str) -> tuple[int, int]:
    """Of the steady state, and kB in large pages."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True)
    few, large = map(int, done.stdout.split())
    return few, large


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
@pytest.mark.slow
def test_memory_that_is_kept_is_not_mapped_again_and_lies_in_large_pages():
    (kept, large), (mapped, _) = faults("keep"), faults()
    assert kept < mapped / 2
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")  # not every kernel has any
    assert (large > 10_000) == (setting.exists() and "[never]" not in setting.read_text())


COMPILES = """
import jax
from whisper_nnx.runtime import allocator
class Library:
    calls = []
    malloc_trim = calls.append
allocator._request_huge_pages = lambda library: None
allocator.close_gaps()
allocator._release_after_compilation(Library)
allocator.close_gaps()
double = jax.jit(lambda x: 2 * x)
double(1.0)
print(len(Library.calls))
double(2.0)
print(len(Library.calls))
allocator.close_gaps()
print(len(Library.calls))
allocator.close_gaps()
print(len(Library.calls))
"""


def test_memory_goes_back_behind_the_compiler_and_once_more_before_the_next_large_arrays():
    done = subprocess.run([sys.executable, "-c", COMPILES], capture_output=True, text=True, check=True)
    compiled, called, asked, asked_again = map(int, done.stdout.split())
    assert compiled > 0
    assert (called, asked, asked_again) == (compiled, compiled + 1, compiled + 1)
