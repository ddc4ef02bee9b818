"""Figures that take long are measured in child processes, kept on disk, and never measured twice.

A script calls itself: `kept` starts it again with `--child` and a JSON text, and keeps the JSON line that it prints. A
run that was stopped goes on where it was. What failed is kept as well, as `{"fault": ...}`; only a child that was ended
from outside is tried again.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quant_rivals import last_line

__all__ = ["Figure", "arguments", "kept", "loss", "opens", "shown_loss", "speed", "stored", "tables_left_out"]

Figure = dict[str, Any]


def arguments(text: str | None, name: str) -> argparse.ArgumentParser:
    """The options that all these scripts have.

    Args:
        text: What the script does.
        name: Of the table, and of the cache folder.
    """
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--samples", type=int, help="calibration samples")
    parser.add_argument("--limit", type=int, help="score the first N samples only")
    cache = Path(tempfile.gettempdir()) / f"graphopt-{name.replace('_', '-')}"
    parser.add_argument("--cache", type=Path, default=cache)
    parser.add_argument("--name", default=name)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def kept(words: str, job: Mapping[str, Any], cache: Path, *, fresh: bool = False, measure: bool = True) -> Figure:
    """A figure from the cache folder, or measured now by a child of the running script.

    Args:
        words: What the figure is; its file is called after it.
        job: What the child gets.
        cache: The folder.
        fresh: Measure again.
        measure: False: what is not in the cache folder is empty.
    """
    path = cache / f"{re.sub(r'[^A-Za-z0-9.]+', '_', words).strip('_')}.json"
    if path.exists() and not fresh:
        return json.loads(path.read_text("utf8"))
    if not measure:
        return {}
    command = [sys.executable, sys.argv[0], "--child", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        result: Figure = {"fault": last_line(done.stderr)}
        if done.returncode < 0:
            return {"fault": f"ended by signal {-done.returncode}"}
    else:
        result = json.loads(done.stdout.splitlines()[-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result), "utf8")
    return result


def opens(model: Path) -> str:
    """Why ONNX Runtime does not load a model; empty if it does."""
    from graphopt.errors import GraphoptError
    from graphopt.reference import Reference

    try:
        Reference(model, threads=1)
    except GraphoptError as e:
        return last_line(e.fact)
    return ""


def loss(figure: Figure, base: Figure) -> float:
    """How much worse a figure is than that of the float model: per cent of perplexity, points of other metrics."""
    if figure["metric"] == "perplexity":
        return 100 * (figure["value"] / base["value"] - 1)
    return base["value"] - figure["value"]


def shown_loss(figure: Figure, base: Figure) -> str:
    """The same as text."""
    return f"{loss(figure, base):.1f} %" if figure["metric"] == "perplexity" else f"{loss(figure, base):.4f}"


def tables_left_out(source: Path) -> str:
    """The option of a pass that leaves embeddings alone; empty for a model without any."""
    import onnx

    graph = onnx.load(source, load_external_data=False).graph
    tables = {t.name for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) == 2}
    names = [node.name for node in graph.node if node.op_type == "Gather" and node.input[0] in tables]
    return f" skip={','.join(json.dumps(name) for name in names)}" if names else ""


def stored(model: Path) -> int:
    """Bytes of a model's file and of the files beside it that hold its weights."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    tensors = onnx.load(model, load_external_data=False).graph.initializer
    beside = {ExternalDataInfo(tensor).location for tensor in tensors if uses_external_data(tensor)}
    return sum((model.parent / name).stat().st_size for name in (model.name, *beside))


def speed(
    models: Mapping[str, Path], data: Path, threads: Sequence[int], rounds: int, seconds: float = 2.0
) -> dict[str, dict[int, float | str]]:
    """Median milliseconds of models by name and number of threads, their rounds interleaved; or why there are none.

    Args:
        models: What to time; all take the same inputs.
        data: Samples, an npz file; two of them are run.
        threads: Numbers of threads.
        rounds: Rounds of each.
        seconds: A round takes about as long as this at most.
    """
    from graphopt.bench import Plan, Subject, bench
    from graphopt.calibration import open_calibration
    from graphopt.model_io import ShapeBinding, input_specs, load_model

    specs = input_specs(load_model(next(iter(models.values()))))
    feeds = tuple(open_calibration(data, specs, ShapeBinding()).feeds(2))
    plan = Plan(threads=tuple(threads), repeats=10, rounds=rounds, round_seconds=seconds)
    measured = bench([Subject(name, path) for name, path in models.items()], feeds, plan)
    found: dict[str, dict[int, float | str]] = {name: {} for name in models}
    for row in measured.rows:
        found[row.subject][row.threads] = row.times.median if row.times is not None else last_line(str(row.not_run))
    return found
