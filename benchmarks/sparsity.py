"""Sparsity inside weights on real trained models: GRAPHOPT_ZOO=... python benchmarks/sparsity.py [CASE ...].

Every way gets the same model, the same calibration samples and the same sparsity, in one run, and is scored on labelled
data. onnxsim's functions stand beside where that package is installed (`pip install onnxsim`). At 60 % and 80 % it is
the ways to spread zeros over layers that are compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import tables
from zoo_quant import load_zoo

import graphopt

PATTERNS = {
    "50 %": "pattern=unstructured ratio=0.5",
    "2:4": "pattern=2:4",
    "60 %": "pattern=unstructured ratio=0.6",
    "80 %": "pattern=unstructured ratio=0.8",
}
HALF, MORE = ("50 %", "2:4"), ("60 %", "80 %")
CASES = {"stories260k": (*HALF, *MORE), "tiny_kws": MORE, "mobilenet_v1_025": MORE, "cifar10_resnet56": MORE}
LIMIT = 2000
BATCH = 8
Way = Callable[[Path, str, Path], Path]


def ours(options: str, *, data: bool = True) -> Way:
    """A pass of graphopt."""

    def apply(folder: Path, pattern: str, out: Path) -> Path:
        text = f"fold,prune{{{PATTERNS[pattern]}{options}}}"
        calibration = str(folder / "calib.npz") if data else None
        graphopt.optimize(folder / "model.onnx", text, calibration=calibration, out=str(out), check="none")
        return out / "model.onnx"

    return apply


def theirs(function: str, *, data: bool = True) -> Way:
    """A function of onnxsim."""

    def apply(folder: Path, pattern: str, out: Path) -> Path:
        import onnxsim

        runs = {"n": 2, "m": 4} if pattern == "2:4" else {}
        feeds = {"calibration_data": list(batches(folder / "calib.npz"))} if data else {}
        model = onnx.load(folder / "model.onnx")
        out.mkdir()
        onnx.save(getattr(onnxsim, function)(model, sparsity=0.5, **runs, **feeds), out / "model.onnx")
        return out / "model.onnx"

    return apply


WAYS: dict[str, Way] = {
    "magnitude": ours(" criterion=l2", data=False),
    "wanda": ours(" criterion=wanda refit=false"),
    "SparseGPT": ours(" criterion=obs refit=false"),
    "magnitude, refit": ours(" criterion=l2"),
    "obs, refit (auto)": ours(""),
    "onnxsim magnitude": theirs("apply_magnitude_pruning", data=False),
    "onnxsim wanda": theirs("apply_wanda_pruning"),
    "onnxsim SparseGPT": theirs("apply_sparsegpt_pruning"),
}
SCOPES: dict[str, Way] = {f"scope={scope}": ours(f" scope={scope}") for scope in ("uniform", "global", "sensitivity")}


def batches(file: Path) -> Iterator[dict[str, np.ndarray]]:
    """Calibration samples, some at a time."""
    with np.load(file) as stored:
        arrays = {name: stored[name] for name in stored.files}
    count = len(next(iter(arrays.values())))
    for start in range(0, count, BATCH):
        yield {name: array[start : start + BATCH] for name, array in arrays.items()}


def sparsity(file: str | Path) -> float:
    """Fraction of zeros in all weights with two axes or more that nodes read."""
    graph = onnx.load(file).graph
    read = {name for node in graph.node for name in node.input}
    tensors = [onnx.numpy_helper.to_array(t) for t in graph.initializer if len(t.dims) > 1 and t.name in read]
    weights = [array for array in tensors if array.dtype.kind == "f"]
    return sum(int((array == 0).sum()) for array in weights) / max(1, sum(array.size for array in weights))


def main() -> None:
    """Make models sparse and score them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--limit", type=int, default=LIMIT, help="score the first N samples only")
    parser.add_argument("--state", type=Path, help="keep figures in this file, and take those that are there from it")
    parser.add_argument("--name", default="sparsity", help="of the table")
    options = parser.parse_args()
    state: dict[str, list[str]] = {}
    if options.state and options.state.exists():
        state = json.loads(options.state.read_text("utf8"))
    zoo, rows = load_zoo(), []
    for name in options.cases or CASES:
        with tempfile.TemporaryDirectory() as folder:
            zoo.export(name, folder, limit=1)
            dense = Path(folder) / "model.onnx"
            base = zoo.score(name, str(dense), limit=options.limit)
            rows.append((name, "dense", base["metric"], f"{base['value']:.4g}", "", f"{sparsity(dense):.1%}"))
            for pattern in CASES.get(name, MORE):
                for way, apply in (WAYS if pattern in HALF else SCOPES).items():
                    key = f"{name} {pattern} {way}"
                    if key not in state:
                        state[key] = measure(zoo, name, dense, pattern, way, apply, options.limit)
                    rows.append((name, pattern, way, *state[key]))
                    print(*rows[-1], flush=True)
                    if options.state:
                        options.state.write_text(json.dumps(state, indent=1), "utf8")
    head = ("case", "pattern", "way", "score", "KL, nats", "zeros among weights")
    tables.write(options.name, "Sparsity inside weights", head, rows, _NOTE)


_NOTE = """At most 2,000 labelled samples, where the case has as many. `KL` is that of the classes or tokens that the \
dense model expects to those that the sparse one does. A perplexity is better the smaller it is. `refit` re-solves the \
weights that are left, layer after layer, against what the dense model computes; rows with a scope do as well. \
`scope=sensitivity`, the way with data, tries the plan of `scope=global` too, and takes it where that does better on \
calibration samples. Zeros run no faster without a sparse kernel."""


def measure(
    zoo: ModuleType, name: str, dense: Path, pattern: str, way: str, apply: Way, limit: int | None
) -> list[str]:
    """Score, divergence and sparsity of one way."""
    if way.startswith("onnxsim") and importlib.util.find_spec("onnxsim") is None:
        return ["onnxsim is not installed", "", ""]
    with tempfile.TemporaryDirectory() as scratch:
        model = apply(dense.parent, pattern, Path(scratch) / "sparse")
        score = zoo.score(name, str(model), limit=limit)
        lost = divergence(zoo, name, dense, model, limit)
        return [f"{score['value']:.4g}", f"{lost:.4f}", f"{sparsity(model):.1%}"]


def divergence(zoo: ModuleType, name: str, dense: Path, sparse: Path, limit: int | None) -> float:
    """Mean Kullback-Leibler divergence of the first output, in nats."""
    inputs, case = zoo.load(name, limit=limit).inputs, zoo.cases()[name]
    before, after = (
        log_shares(next(iter(zoo.predict(case, zoo.session(str(model)), inputs).values()))) for model in (dense, sparse)
    )
    return float((np.exp(before) * (before - after)).sum(axis=-1).mean())


def log_shares(output: np.ndarray) -> np.ndarray:
    """Logarithms of shares on the last axis, of scores or of shares."""
    scores = output.astype(np.float64)
    if scores.min() >= 0 and np.allclose(scores.sum(axis=-1), 1, atol=1e-3):
        scores = np.log(np.maximum(scores, np.finfo(np.float32).tiny))
    scores -= scores.max(axis=-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))


if __name__ == "__main__":
    main()
