"""`train`: a training run. `python -m whisper_nnx.train` is the command."""

import sys

if __name__ == "__main__":
    from whisper_nnx.cli.train import main

    sys.exit(main())

from whisper_nnx.training.run import train

__all__ = ["train"]
