"""The command `whisper-nnx`: transcribes files, many of them as a job (`batch`), or serves (`serve`)."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command -> its exit status. Wrong usage raises SystemExit(2)."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["serve"]:
        from whisper_nnx.cli import serve

        return serve.main(arguments[1:])
    if arguments[:1] == ["batch"]:
        from whisper_nnx.cli import batch

        return batch.main(arguments[1:])
    from whisper_nnx.cli import transcribe

    return transcribe.main(arguments)
