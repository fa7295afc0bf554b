"""`transcribe`: recordings of any length to text. `python -m whisper_nnx.transcribe` is the command line."""

import sys

if __name__ == "__main__":  # before all else: the command sets XLA up before JAX is imported
    from whisper_nnx.runtime.console import run_main

    sys.exit(run_main("whisper_nnx.cli.transcribe"))

from whisper_nnx.transcription.stream import iter_segments, iter_transcripts, transcribe

__all__ = ["iter_segments", "iter_transcripts", "transcribe"]
