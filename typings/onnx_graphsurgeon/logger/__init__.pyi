"""graphsurgeon's logger, which prints to stdout unless it is told not to."""

from contextlib import AbstractContextManager

class Logger:
    CRITICAL: int
    def suppress(self, severity: int = ...) -> AbstractContextManager[None]: ...

G_LOGGER: Logger
