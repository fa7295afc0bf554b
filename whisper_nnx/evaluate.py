"""`evaluate`: how well a model transcribes the rows of manifests. `python -m whisper_nnx.evaluate` is the command."""

import sys

if __name__ == "__main__":
    from whisper_nnx.runtime.console import run_main

    sys.exit(run_main("whisper_nnx.cli.evaluate"))

from whisper_nnx.evaluation.run import evaluate

__all__ = ["evaluate"]
