"""`python -m whisper_nnx` is the command line."""

import sys

try:
    from whisper_nnx.cli.main import main
except KeyboardInterrupt:  # before what handles it is imported
    print("whisper-nnx: interrupted", file=sys.stderr)
    sys.exit(130)

sys.exit(main())
