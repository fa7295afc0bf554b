"""The memory switch: glibc keeps what is freed, so that the next call of a jitted function finds its memory mapped.

And mapped by large pages, where Linux has them for those who ask (`transparent_hugepage`): weights and caches are read
from end to end for each token, and the processor spends less time on looking up where they lie.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

_SETTINGS = {  # of mallopt(3)
    -8: 1,  # M_ARENA_MAX: one heap; those of further threads are cut at 64 MB and then mapped afresh every time
    -4: 0,  # M_MMAP_MAX: large arrays come from the heap as well
    -1: -1,  # M_TRIM_THRESHOLD: which never shrinks,
    -2: 2**28,  # M_TOP_PAD: and grows in large steps
}

_MADV_HUGEPAGE = 14

_library: Any = None  # the C library, once memory is kept
_compiled = False  # since gaps were closed


def keep_memory() -> bool:
    """From now on memory that is freed stays with the process; True where the C library can do that.

    XLA asks for the memory of all its intermediate results at each call and gives it back. By default glibc maps it
    afresh each time, and the kernel clears it page by page: a third of the time of a training step on a CPU. The price:
    the process stays as large as it once was. To be called before the first computation, and by programs alone: a
    library must not decide this for those who import it.
    """
    if os.name != "posix":
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return False
    for name, value in _SETTINGS.items():
        library.mallopt(name, value)
    _ask_for_large_pages(library)
    _give_back_behind_the_compiler(library)
    return True


def close_gaps() -> None:
    """Before large arrays: what is free goes back to the system, if a program was compiled since the last time.

    Compiled programs lie scattered in what the compiler took, and large arrays do not fit in between. Each time would
    be too often: mapping memory again can cost a tenth of a batch's time. Does nothing where memory is not kept.
    """
    global _compiled
    if _compiled:
        _compiled = False
        _give_back()


def _give_back() -> None:
    _library.malloc_trim(0)
    _ask_for_large_pages(_library)  # the heap has shrunk, and what it grows by is new


def _give_back_behind_the_compiler(library: Any) -> None:
    """What XLA's compiler took for its work is more than any later call asks for."""
    import jax

    global _library
    listens, _library = _library is not None, library
    if listens:
        return

    def compiled(event: str, *_: float, **__: Any) -> None:
        global _compiled
        if event == "/jax/core/compile/backend_compile_duration":
            _compiled = True
            _give_back()

    jax.monitoring.register_event_duration_secs_listener(compiled)


def _ask_for_large_pages(library: ctypes.CDLL) -> None:
    """For what the heap will grow by, up to half of the machine's memory; nothing of it is taken before it is used."""
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    library.free.argtypes = (ctypes.c_void_p,)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    page = os.sysconf("SC_PAGE_SIZE")
    size = os.sysconf("SC_PHYS_PAGES") // 2 * page
    start = library.malloc(size)
    if start is None:
        return
    skipped = -start % page
    library.madvise(start + skipped, size - skipped - page, _MADV_HUGEPAGE)
    library.free(start)
