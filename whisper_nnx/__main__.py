"""`python -m whisper_nnx` is the command line."""

import sys

from whisper_nnx.cli.transcribe import main

sys.exit(main())
