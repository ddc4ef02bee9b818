"""Native libraries write to the process's standard error; what they say there goes to the log instead."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator

__all__ = ["quiet", "silent"]

_STDOUT, _STDERR = 1, 2
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Send what native code writes to standard error to the debug log; Python's own `sys.stderr` stays visible."""
    sys.stderr.flush()
    saved = os.dup(_STDERR)
    python_stderr = sys.stderr
    visible = _reopened(saved)
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), _STDERR)
        if visible is not None:
            sys.stderr = visible
        try:
            yield
        finally:
            if visible is not None:
                visible.flush()
                visible.close()
                sys.stderr = python_stderr
            os.dup2(saved, _STDERR)
            os.close(saved)
            captured.seek(0)
            text = captured.read().decode("utf8", "replace").strip()
            if text:
                _log.debug("native log: %s", text)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """`quiet`, for native code that writes to standard output as well, which is for answers; Python writes nothing."""
    sys.stdout.flush()
    saved = os.dup(_STDOUT)
    with quiet():
        os.dup2(_STDERR, _STDOUT)
        try:
            yield
        finally:
            os.dup2(saved, _STDOUT)
            os.close(saved)


def _reopened(saved: int):
    """A text stream on the saved standard error, where Python's writes there too."""
    try:
        same = sys.stderr.fileno() == _STDERR
    except (OSError, ValueError, AttributeError):  # replaced by an object without a file, as test runners do
        return None
    return os.fdopen(os.dup(saved), "w", encoding="utf8", errors="replace", buffering=1) if same else None
