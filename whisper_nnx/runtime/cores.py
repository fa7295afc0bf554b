"""Processor cores."""

import os

_MOST_READERS = 16


def usable_cores() -> int:
    """Returns the number of cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def reader_processes(platform: str, workers: int = 1) -> int:
    """How many processes read files by default, for a model on that platform: a CPU is busy with the model.

    workers: that share the cores.
    """
    return 0 if platform == "cpu" else max(1, min(3 * usable_cores() // (4 * workers), _MOST_READERS))
