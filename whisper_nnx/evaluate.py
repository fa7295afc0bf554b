"""`evaluate`: how well a model transcribes the rows of manifests. `python -m whisper_nnx.evaluate` is the command."""

import sys

if __name__ == "__main__":
    from whisper_nnx.cli.evaluate import main

    sys.exit(main())

from whisper_nnx.evaluation.run import evaluate

__all__ = ["evaluate"]
