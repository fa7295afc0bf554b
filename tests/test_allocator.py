"""The memory switch."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
if "keep" in sys.argv:
    from whisper_nnx.allocator import keep_memory
    assert keep_memory()
f = jax.jit(lambda x: jax.nn.softmax(x @ x.T, axis=-1).sum(axis=0))
x = jnp.ones((3000, 8))
for _ in range(3):
    f(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    f(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*arguments: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_memory_that_is_kept_is_not_mapped_again():
    assert faults("keep") < faults() / 2
