"""`python -m whisper_nnx` is the command line."""

import sys

from whisper_nnx.cli.main import main

sys.exit(main())
