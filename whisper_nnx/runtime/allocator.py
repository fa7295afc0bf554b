"""Configures glibc to keep freed memory mapped for the next call of a jitted function.

Memory is also mapped with huge pages where Linux offers them on request (`transparent_hugepage`): weights and caches
are read completely for each token, and huge pages reduce TLB misses.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

_SETTINGS = {  # of mallopt(3)
    -8: 1,  # M_ARENA_MAX: one heap; heaps of other threads are limited to 64 MB and then mapped anew every time
    -4: 0,  # M_MMAP_MAX: large arrays are allocated on the heap too,
    -1: -1,  # M_TRIM_THRESHOLD: which never shrinks
    -2: 2**28,  # M_TOP_PAD: and grows in large steps
}

_MADV_HUGEPAGE = 14

_library: Any = None  # the C library, after keep_memory()
_compiled = False  # whether a program was compiled since the last close_gaps()


def keep_memory() -> bool:
    """Keeps freed memory in the process from now on; returns whether the C library supports it.

    XLA allocates all intermediate results at each call and frees them. By default glibc maps this memory anew each
    time, and the kernel clears it page by page: a third of the time of a training step on a CPU. In exchange, the
    process never shrinks. Call it before the first computation, and only in programs: a library should not decide this
    for its users.
    """
    if os.name != "posix":
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return False
    for name, value in _SETTINGS.items():
        library.mallopt(name, value)
    _request_huge_pages(library)
    _release_after_compilation(library)
    return True


def close_gaps() -> None:
    """Returns free memory to the system before large allocations, if a program was compiled since the last call.

    Compiled programs are scattered over the memory that the compiler used, so large arrays do not fit in between. Doing
    this every time is too expensive: mapping memory again can take a tenth of a batch's time. Does nothing unless
    keep_memory() was called.
    """
    global _compiled
    if _compiled:
        _compiled = False
        _release()


def _release() -> None:
    _library.malloc_trim(0)
    _request_huge_pages(_library)  # for the part by which the heap will grow again


def _release_after_compilation(library: Any) -> None:
    """Releases memory after each compilation, since the compiler uses more than any later call."""
    import jax

    global _library
    is_registered, _library = _library is not None, library
    if is_registered:
        return

    def compiled(event: str, *_: float, **__: Any) -> None:
        global _compiled
        if event == "/jax/core/compile/backend_compile_duration":
            _compiled = True
            _release()

    jax.monitoring.register_event_duration_secs_listener(compiled)


def _request_huge_pages(library: ctypes.CDLL) -> None:
    """Requests huge pages for the heap's growth, up to half of the machine's memory; nothing is allocated yet."""
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
