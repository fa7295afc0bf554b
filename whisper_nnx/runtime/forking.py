"""JAX does not survive `os.fork()`: its threads stay in the parent, and a child that waits for them hangs for ever.

`multiprocessing` forks by default on Linux before Python 3.14, and so do torch's data loaders. Started processes
(`subprocess`, "spawn", "forkserver") and forks made before JAX was used are not affected.
"""

import os
import sys

_used = False  # by a function of ours, in this process or in the one that it was forked from
_forked = False


def _after_fork_in_child() -> None:
    global _forked
    # Also where the caller alone has used JAX. No lock is taken here: another thread may have held it when it forked.
    bridge = sys.modules.get("jax._src.xla_bridge")
    _forked = _used or _forked or bool(getattr(bridge, "_backends", None))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def refuse_after_fork() -> None:
    """Raises RuntimeError in a process that was forked after JAX had been used, where its work would never end."""
    global _used
    if _forked:
        raise RuntimeError(
            "this process was forked after JAX was used, and JAX would hang in it; start it by "
            "multiprocessing.get_context('spawn') or 'forkserver' and load the model in it"
        )
    _used = True
