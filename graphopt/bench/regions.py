# onnx_ir annotates paths as os.PathLike without its parameter, which makes its calls partially unknown
# pyright: reportUnknownMemberType=false
"""Times parts of two versions of a model against each other, from ONNX Runtime's own profile of every node.

Runtimes fuse and reorder what they run, so that nodes cannot be compared one by one. But values keep their names. Both
models are cut at every value that both compute under the same name after the runtime's optimizations; what lies between
two cuts is a region, and it computes the same thing in both, whatever it is made of. Regions of the same operators in
both are left out: what differs there is the machine.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir

from graphopt.errors import UsageError
from graphopt.measured import Region
from graphopt.model_io import load_model
from graphopt.reference import Feed
from graphopt.session import session_options

__all__ = ["SLOWER", "slower_regions"]

SLOWER = 1.05
"""Within five percent a machine's noise decides."""

_NOTICED = 0.01  # of the time of the whole model
_WARMUP = 3
_REPEATS = 40
_SECONDS = 10.0
_KERNEL = "_kernel_time"


@dataclass(frozen=True)
class _Profile:
    """One model: its graph as written, its graph as run, and milliseconds of a run by name of the node that ran."""

    written: ir.Graph
    run: ir.Graph
    times: Mapping[str, float]


def slower_regions(
    before: Path, after: Path, feeds: Sequence[Feed], *, threads: int = 1, extensions: Sequence[str] = ()
) -> tuple[Region, ...]:
    """Time two versions of a model, run in turn; returns the regions that became slower, the greatest loss first.

    Args:
        before: The original.
        after: What was made of it.
        feeds: Inputs; the runs cycle through them.
        threads: Threads of ONNX Runtime.
        extensions: Libraries with custom operators for ONNX Runtime.

    Raises:
        UsageError: There are no feeds.
        ModelError: A model cannot be read.
    """
    if not feeds:
        raise UsageError("bench", "there are no inputs to run", "give --calibration, or a model with inputs")
    with tempfile.TemporaryDirectory(prefix="graphopt-") as name:
        folders = [Path(name) / side for side in ("before", "after")]
        files = _run_both((before, after), folders, feeds, threads, extensions)
        written = [load_model(path).graph for path in (before, after)]
        first, second = (
            _Profile(graph, ir.load(folder / "run.onnx").graph, _times(file, runs, len(feeds)))
            for graph, folder, (file, runs) in zip(written, folders, files, strict=True)
        )
        noticed = _NOTICED * sum(first.times.get(node.name or "", 0.0) for node in first.run)
        found = [r for r in _regions(first, second) if r.after > SLOWER * r.before and r.after - r.before > noticed]
        return tuple(sorted(found, key=lambda region: region.before - region.after))


def _run_both(
    models: Sequence[Path], folders: Sequence[Path], feeds: Sequence[Feed], threads: int, extensions: Sequence[str]
) -> list[tuple[Path, int]]:
    """Run both models in turn; returns the profile of each and how many runs it holds."""
    import onnxruntime as ort

    sessions: list[Any] = []
    for model, folder in zip(models, folders, strict=True):
        folder.mkdir()
        options = session_options(threads=threads, extensions=extensions)
        options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
        options.optimized_model_filepath = str(folder / "run.onnx")
        external = "session.optimized_model_external_initializers"
        options.add_session_config_entry(f"{external}_file_name", "run.data")
        options.add_session_config_entry(f"{external}_min_size_in_bytes", "1024")
        sessions.append(ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"]))
    started, runs = time.monotonic(), 0
    while runs < _WARMUP or (runs < _WARMUP + _REPEATS and time.monotonic() - started < _SECONDS):
        feed = feeds[runs % len(feeds)]
        for session in sessions:
            session.run(None, {value.name: feed[value.name] for value in session.get_inputs()})
        runs += 1
    return [(Path(session.end_profiling()), runs) for session in sessions]


def _times(profile: Path, runs: int, feeds: int) -> dict[str, float]:
    """Milliseconds of a run by node: the quickest with each feed, the mean of that over feeds."""
    found: dict[str, list[int]] = {}
    for event in cast("list[dict[str, Any]]", json.loads(profile.read_text("utf8"))):
        if event.get("cat") == "Node" and str(event["name"]).endswith(_KERNEL):
            found.setdefault(str(event["name"]).removesuffix(_KERNEL), []).append(int(event["dur"]))
    return {name: _typical(np.array(times, np.float64), runs, feeds) / 1000 for name, times in found.items()}


def _typical(times: np.ndarray[Any, np.dtype[np.float64]], runs: int, feeds: int) -> float:
    if len(times) % runs:  # not the same number of times in every run
        return float(np.median(times)) * len(times) / runs
    by_run = times.reshape(runs, -1).sum(axis=1)
    return float(np.mean([by_run[i::feeds].min() for i in range(min(feeds, runs))]))


class _Parts:
    """Sets that grow together (Tarjan, 1975); members are made when they are first named."""

    def __init__(self) -> None:
        self._above: dict[tuple[int, str], tuple[int, str]] = {}

    def of(self, member: tuple[int, str]) -> tuple[int, str]:
        root = member
        while (above := self._above.get(root, root)) != root:
            root = above
        while member != root:
            self._above[member], member = root, self._above.get(member, root)
        return root

    def unite(self, first: tuple[int, str], second: tuple[int, str]) -> None:
        a, b = sorted((self.of(first), self.of(second)))
        self._above[b] = a


def _regions(before: _Profile, after: _Profile) -> Iterator[Region]:
    shared = _made(before.written) & _made(after.written) & _made(before.run) & _made(after.run)
    parts, makers = _Parts(), list[dict[str, str]]()
    for side, profile in enumerate((before, after)):
        made_by = {name: node.name or "" for node in profile.run for output in node.outputs if (name := output.name)}
        makers.append(made_by)
        for node in profile.run:
            for value in _reads(node):
                if value in made_by and value not in shared:
                    parts.unite((side, made_by[value]), (side, node.name or ""))
    for value in sorted(shared):
        parts.unite((0, makers[0][value]), (1, makers[1][value]))
    times: dict[tuple[int, str], list[float]] = {}
    kinds: dict[tuple[int, str], tuple[list[str], list[str]]] = {}
    for side, profile in enumerate((before, after)):
        for node in {node.name: node for node in profile.run}.values():
            part = parts.of((side, node.name or ""))
            times.setdefault(part, [0.0, 0.0])[side] += profile.times.get(node.name or "", 0.0)
            kinds.setdefault(part, ([], []))[side].append(f"{node.domain}:{node.op_type}")
    layers: dict[tuple[int, str], list[ir.Node]] = {}
    for node in before.written:
        maker = _ran_in(node, makers[0])
        if maker is not None:
            layers.setdefault(parts.of((0, maker)), []).append(node)
    for part, nodes in layers.items():
        if sorted(kinds[part][0]) == sorted(kinds[part][1]):
            continue
        weighty = [node for node in nodes if any(_is_weight(value) for value in node.inputs)]
        yield Region(tuple(node.name or "" for node in weighty or nodes), *times[part])


def _made(graph: ir.Graph) -> set[str]:
    return {output.name for node in graph for output in node.outputs if output.name}


def _reads(node: ir.Node) -> Iterator[str]:
    """Names of what a node reads, itself and in its subgraphs."""
    yield from (value.name for value in node.inputs if value is not None and value.name)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
            for inner in attribute.as_graph():
                yield from _reads(inner)


def _ran_in(node: ir.Node, makers: Mapping[str, str]) -> str | None:
    """The node that ran in place of one as written: that which makes its result, or the next result after it."""
    seen: set[ir.Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop(0)
        for output in current.outputs:
            maker = makers.get(output.name or "")
            if maker is not None:
                return maker
            users = [user for user in output.consumers() if user not in seen and user.graph is node.graph]
            seen.update(users)
            waiting += users
    return None


def _is_weight(value: ir.Value | None) -> bool:
    tensor = value.const_value if value is not None else None
    return tensor is not None and tensor.dtype.is_floating_point() and len(tensor.shape) > 1
