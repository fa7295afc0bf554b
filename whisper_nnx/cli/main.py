"""The command `whisper-nnx`: transcribes files, many of them as a job (`batch`), or serves (`serve`)."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from whisper_nnx.runtime.console import run_main


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command -> its exit status. Wrong usage raises SystemExit(2)."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] in (["serve"], ["batch"]):
        return run_main(f"whisper_nnx.cli.{arguments[0]}", arguments[1:])
    return run_main("whisper_nnx.cli.transcribe", arguments)
