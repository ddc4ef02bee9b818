"""The command, from its first line on: Ctrl-C while it is being imported is an interruption like any other."""

from __future__ import annotations

import sys
from typing import NoReturn

from graphopt.errors import ExitCode

__all__ = ["main"]


def main() -> NoReturn:
    """Run the command with the arguments of the process and exit with its code."""
    try:
        from graphopt.cli import main as run
    except KeyboardInterrupt:
        sys.stderr.write("graphopt: interrupted; nothing was written\n")
        sys.exit(ExitCode.INTERRUPTED)
    run()


if __name__ == "__main__":
    main()
