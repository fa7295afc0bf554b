"""The memory switch: glibc keeps what is freed, so that the next call of a jitted function finds its memory mapped."""

from __future__ import annotations

import ctypes
import os

_SETTINGS = {  # of mallopt(3)
    -8: 1,  # M_ARENA_MAX: one heap; those of further threads are cut at 64 MB and then mapped afresh every time
    -4: 0,  # M_MMAP_MAX: large arrays come from the heap as well
    -1: -1,  # M_TRIM_THRESHOLD: which never shrinks,
    -2: 2**28,  # M_TOP_PAD: and grows in large steps
}


def keep_memory() -> bool:
    """From now on memory that is freed stays with the process; True where the C library can do that.

    XLA asks for the memory of all its intermediate results at each call and gives it back. By default glibc maps it
    afresh each time, and the kernel clears it page by page: a third of the time of a training step on a CPU. The price:
    the process stays as large as it once was. To be called before the first computation, and by programs alone: a
    library must not decide this for those who import it.
    """
    if os.name != "posix":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    for name, value in _SETTINGS.items():
        mallopt(name, value)
    return True
