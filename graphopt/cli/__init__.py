"""The command line. Help, version and completion import nothing heavy: every verb imports what it needs itself."""

from graphopt.cli.main import main

__all__ = ["main"]
