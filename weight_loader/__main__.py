"""`python -m weight_loader convert SRC DST --to FORMAT` and `python -m weight_loader inspect PATH`."""

import sys
from collections.abc import Sequence

try:
    from whisper_nnx.runtime.console import run_main
except KeyboardInterrupt:  # before what handles it is imported
    print("interrupted", file=sys.stderr)
    sys.exit(130)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command -> its exit status. Wrong usage raises SystemExit(2)."""
    return run_main("weight_loader.command", arguments, name="")


if __name__ == "__main__":
    sys.exit(main())
