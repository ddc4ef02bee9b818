"""Sparsity inside weights on real trained models: GRAPHOPT_ZOO=... python benchmarks/sparsity.py [CASE ...].

Every way gets the same model, the same calibration samples and the same sparsity, in one run, and is scored on labelled
data. onnxsim's functions stand beside where that package is installed (`pip install onnxsim`).
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

CASES = ("cifar10_resnet20", "mobilenet_v2", "minilm", "stories260k")
PATTERNS = ("unstructured", "2:4")
BATCH = 8
Way = Callable[[Path, str, Path], Path]


def ours(options: str, *, data: bool = True) -> Way:
    """A pass of graphopt."""

    def apply(folder: Path, pattern: str, out: Path) -> Path:
        ratio = " ratio=0.5" if pattern == "unstructured" else ""
        text = f"prune{{pattern={pattern}{ratio}{options}}}"
        calibration = str(folder / "calib.npz") if data else None
        graphopt.optimize(folder / "model.onnx", text, calibration=calibration, out=str(out), check="none")
        return out / "model.onnx"

    return apply


def theirs(function: str, *, data: bool = True) -> Way:
    """A function of onnxsim."""

    def apply(folder: Path, pattern: str, out: Path) -> Path:
        import onnxsim

        runs = {} if pattern == "unstructured" else {"n": 2, "m": 4}
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
    parser.add_argument("--limit", type=int, help="score the first N samples only")
    parser.add_argument("--state", type=Path, help="keep figures in this file, and take those that are there from it")
    options = parser.parse_args()
    state: dict[str, list[str]] = {}
    if options.state and options.state.exists():
        state = json.loads(options.state.read_text("utf8"))
    zoo, rows = load_zoo(), []
    installed = importlib.util.find_spec("onnxsim") is not None
    for name in options.cases or CASES:
        with tempfile.TemporaryDirectory() as folder:
            zoo.export(name, folder)
            for pattern in PATTERNS:
                for way, apply in WAYS.items():
                    key = f"{name} {pattern} {way}"
                    if way.startswith("onnxsim") and not installed:
                        state[key] = ["onnxsim is not installed", ""]
                    if key not in state:
                        state[key] = measure(zoo, name, Path(folder), pattern, apply, options.limit)
                    rows.append((name, pattern, way, *state[key]))
                    print(*rows[-1], flush=True)
                    if options.state:
                        options.state.write_text(json.dumps(state, indent=1), "utf8")
            base = zoo.score(name, f"{folder}/model.onnx", limit=options.limit)
            rows.append(
                (name, "dense", base["metric"], f"{base['value']:.4g}", f"{sparsity(f'{folder}/model.onnx'):.1%}")
            )
    head = ("case", "pattern", "way", "score", "zeros among weights")
    notes = (
        "Half of the weights of every layer concerned are zero. A perplexity is better the smaller it is. `refit` "
        "re-solves the weights that are left, layer after layer, against what the dense model computes. Zeros run no "
        "faster without a sparse kernel."
    )
    tables.write("sparsity", "Sparsity inside weights", head, rows, notes)


def measure(zoo: ModuleType, name: str, folder: Path, pattern: str, apply: Way, limit: int | None) -> list[str]:
    """Score and sparsity of one way."""
    with tempfile.TemporaryDirectory() as scratch:
        model = apply(folder, pattern, Path(scratch) / "sparse")
        score = zoo.score(name, str(model), limit=limit)
        return [f"{score['value']:.4g}", f"{sparsity(model):.1%}"]


if __name__ == "__main__":
    main()
