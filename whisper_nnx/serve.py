"""`python -m whisper_nnx.serve` is the command `whisper-nnx serve`: OpenAI's audio API on this machine."""

import sys

if __name__ == "__main__":
    from whisper_nnx.cli.serve import main

    sys.exit(main())
