"""Detects forks after JAX was used: its threads do not exist in the child, which hangs when it waits for them.

`multiprocessing` forks by default on Linux before Python 3.14, and so do torch's data loaders. New processes
(`subprocess`, "spawn", "forkserver") and forks made before JAX was used are not affected.
"""

import os
import sys

_used = False  # by this package, in this process or in the one that it was forked from
_forked = False


def _after_fork_in_child() -> None:
    global _forked
    # Also detects use by the caller only. Takes no lock, which another thread may have held during the fork.
    bridge = sys.modules.get("jax._src.xla_bridge")
    _forked = _used or _forked or bool(getattr(bridge, "_backends", None))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def refuse_after_fork() -> None:
    """Raises RuntimeError in a process that was forked after JAX was used, in which JAX would hang."""
    global _used
    if _forked:
        raise RuntimeError(
            "this process was forked after JAX was used, and JAX would hang in it; start it with "
            "multiprocessing.get_context('spawn') or 'forkserver' and load the model there"
        )
    _used = True
