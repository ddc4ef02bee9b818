"""A model file or its bytes open in ONNX Runtime, and a child process that runs one on many feeds.

Nothing but numpy and ONNX Runtime is imported here, so that a child starts quickly.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.errors import DataError, GraphoptError, ModelError, UsageError

__all__ = ["Feed", "FeedFolder", "Session", "session_options"]

Feed = dict[str, np.ndarray[Any, np.dtype[Any]]]
"""One run's inputs or outputs by name."""


def session_options(*, threads: int = 1, optimize: bool = True, extensions: Sequence[str] = ()) -> Any:
    """ONNX Runtime's options for a fixed number of threads, so that results repeat.

    Raises:
        UsageError: An extension cannot be loaded.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    for library in extensions:
        try:
            options.register_custom_ops_library(library)
        except Exception as e:  # ONNX Runtime raises its own untyped errors
            raise UsageError(f"--ort-extension {library}", f"cannot be loaded: {_reason(e)}") from e
    return options


class Session:
    """A model open in ONNX Runtime, on the CPU, with a fixed number of threads, so that results repeat.

    Args:
        source: Path of a model, or its bytes.
        name: What errors call it.
        threads: Threads inside one operator.
        optimize: False: every node runs as written, without ONNX Runtime's fusions.
        extensions: Libraries with custom operators.

    Raises:
        ModelError: ONNX Runtime cannot load the model.
        UsageError: An extension cannot be loaded.
    """

    def __init__(
        self, source: str | bytes, name: str, *, threads: int = 1, optimize: bool = True, extensions: Sequence[str] = ()
    ) -> None:
        import onnxruntime as ort

        options = session_options(threads=threads, optimize=optimize, extensions=extensions)
        try:
            self.session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as e:
            raise ModelError(name, f"ONNX Runtime cannot load it: {_reason(e)}") from e
        self.inputs: tuple[str, ...] = tuple(i.name for i in self.session.get_inputs())
        self.outputs: tuple[str, ...] = tuple(o.name for o in self.session.get_outputs())

    def run(self, feed: Mapping[str, np.ndarray[Any, Any]], outputs: Sequence[str] | None = None) -> Feed:
        """Run once; returns the outputs by name.

        Raises:
            DataError: The feed lacks an input.
            ModelError: ONNX Runtime fails on this feed.
        """
        missing = [name for name in self.inputs if name not in feed]
        if missing:
            raise DataError(f"input {missing[0]!r}", "is missing from the feed")
        names = list(outputs or self.outputs)
        try:
            values = self.session.run(names, {name: feed[name] for name in self.inputs})
        except Exception as e:
            raise ModelError("model", f"ONNX Runtime cannot run it: {_reason(e)}") from e
        return dict(zip(names, values, strict=True))


class FeedFolder:
    """Arrays of many runs, inputs or outputs, in one file a run, so that child processes can share them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return len(list(self.folder.iterdir()))

    def __iter__(self) -> Iterator[Feed]:
        return (_load(path) for path in sorted(self.folder.iterdir()))

    def write(self, index: int, feed: Feed) -> None:
        """Write one run."""
        arrays: dict[str, Any] = {f"a{i}": value for i, value in enumerate(feed.values())}
        np.savez(self.folder / f"{index:07}.npz", names=np.array(list(feed), dtype=np.str_), **arrays)

    @classmethod
    @contextmanager
    def temporary(cls, feeds: Iterable[Feed] = ()) -> Generator[FeedFolder]:
        """Make a folder that is removed at the end, and write `feeds` to it."""
        with tempfile.TemporaryDirectory(prefix="graphopt-") as name:
            folder = cls(Path(name))
            for i, feed in enumerate(feeds):
                folder.write(i, feed)
            yield folder


def _load(path: Path) -> Feed:
    with np.load(path, allow_pickle=False) as npz:
        return {str(name): npz[f"a{i}"] for i, name in enumerate(npz["names"])}


def _reason(e: Exception) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return lines[0].rpartition(" : ")[2][:240] if lines else type(e).__name__


def _child(job: dict[str, Any]) -> None:
    """Run a model on all feeds of one folder and write its outputs to another."""
    settings = {name: job[name] for name in ("threads", "optimize", "extensions")}
    session = Session(job["model"], Path(job["model"]).name, **settings)
    outputs = FeedFolder(Path(job["outputs"]))
    for i, feed in enumerate(FeedFolder(Path(job["feeds"]))):
        outputs.write(i, session.run(feed))


if __name__ == "__main__":
    try:
        _child(json.loads(sys.argv[1]))
    except GraphoptError as e:
        sys.exit(e.fact)
