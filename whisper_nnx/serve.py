"""`python -m whisper_nnx.serve` is the command `whisper-nnx serve`: OpenAI's audio API on this machine."""

import sys

if __name__ == "__main__":
    from whisper_nnx.runtime.console import run_main

    sys.exit(run_main("whisper_nnx.cli.serve"))
