"""`train`: a training run. `python -m whisper_nnx.train` is the command."""

import sys

if __name__ == "__main__":
    from whisper_nnx.runtime.console import run_main

    sys.exit(run_main("whisper_nnx.cli.train"))

from whisper_nnx.training.run import train

__all__ = ["train"]
