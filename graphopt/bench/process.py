"""The parent's side of a measuring process: one JSON line asks, one JSON line answers.

asks                       answers
(start)                    {"how": ..., "base_mb": ...}
{"do": "outputs"}          {}
{"do": "round", ...}       {"times": [nanoseconds, ...]}
{"do": "end"}              {"peak_mb": ...}
{"do": "profile", ...}     {"profile": ...}
any of them                {"error": ...} if it cannot be done
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, cast

from graphopt.errors import BackendError
from graphopt.records import to_text

__all__ = ["Child", "Job"]


@dataclass(frozen=True)
class Job:
    """What a child loads and runs.

    Attributes:
        name: How errors call it.
        path: The model file, or the bundle's folder for a backend.
        backend: Name of the backend; empty: ONNX Runtime.
        target: What the bundle was made for.
        threads: Threads to run with.
        feeds: Folder with inputs.
        outputs: Folder for outputs.
        extensions: Libraries with custom operators for ONNX Runtime.
        disable: Plugins to leave out.
    """

    name: str
    path: str
    backend: str
    target: str
    threads: int
    feeds: str
    outputs: str
    extensions: tuple[str, ...] = ()
    disable: tuple[str, ...] = ()


class Child:
    """A running child; leaving the `with` block ends it, whatever happened."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        command = [sys.executable, "-m", "graphopt.bench.child", to_text(job)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, encoding="utf-8"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def ask(self, do: str, **arguments: float) -> None:
        """Send a request; `answer` waits for its result."""
        if self._process.stdin is None:
            raise BackendError(self.job.name, "its process takes no requests")
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as e:
            raise self._died() from e

    def answer(self) -> dict[str, Any]:
        """Wait for the next answer.

        Raises:
            BackendError: The child cannot do what was asked, or died.
        """
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise self._died()
        found = cast("dict[str, Any]", json.loads(line))
        if "error" in found:
            raise BackendError(self.job.name, str(found["error"]))
        return found

    def _died(self) -> BackendError:
        code = self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        why = f"died with signal {-code}" if code < 0 else f"ended with code {code}"
        return BackendError(self.job.name, f"its process {why}{': ' + lines[-1] if lines else ''}")
