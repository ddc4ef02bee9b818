"""Deep Compression without retraining: python benchmarks/deep_compression.py [--mnist FOLDER] [--networks NAME ...].

LeNet-300-100 and LeNet-5 (see lenets.py) are trained on scikit-learn's digits, brought to MNIST's form, or on MNIST in
a folder of its own files; `pip install torch scikit-learn 'graphopt[pack]'`. Then the passes of the recipe
`deep-compression` run at several sparsities and sizes of codebooks, calibrated on training images, and the container's
size and the error on held-out images stand beside those of Han, Mao, Dally, "Deep Compression" (2016), which retrains
after pruning and after sharing.

Trained networks and figures are kept in the cache folder; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lenets
import numpy as np
import onnx
import tables

import graphopt
from graphopt.pack import Packed, pack
from graphopt.reference import Reference

_SPARSITIES = (0.9, 0.95, 0.98, 0.99)
_BITS = (2, 3, 4)
_SAMPLES = 1024
_RECIPE, _SHAPED = "--recipe deep-compression", "channels removed first"
_PAPER: Mapping[str, Mapping[str, tuple[str, ...]]] = {  # tables 1 to 3: weights, density %, bits, compressed %
    "LeNet-300-100": {
        "fc1": ("235K", "8", "6", "2.32"),
        "fc2": ("30K", "9", "6", "3.04"),
        "fc3": ("1K", "26", "6", "12.70"),
        "all": ("266K", "8", "6", "2.49"),
    },
    "LeNet-5": {
        "conv1": ("0.5K", "66", "8", "67.45"),
        "conv2": ("25K", "12", "8", "5.28"),
        "fc1": ("400K", "8", "5", "2.45"),
        "fc2": ("5K", "19", "5", "6.13"),
        "all": ("431K", "8", "5.3", "2.55"),
    },
}
_RATIOS = {"LeNet-300-100": ("1.64", "1.58", "40"), "LeNet-5": ("0.80", "0.74", "39")}
Figure = dict[str, Any]


def main() -> None:
    """Train what is not yet trained, measure what is not yet measured, and write the tables."""
    options = _options()
    data = lenets.mnist(options.mnist) if options.mnist else lenets.digits()
    found: dict[str, Figure] = {}
    for network in options.networks:
        for words, figure in _measured(network, data, options):
            found[f"{network}|{words}"] = figure
            _write(found, data, options, quiet=True)
    _write(found, data, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, help="folder with MNIST's four files, instead of scikit-learn's digits")
    parser.add_argument("--networks", nargs="*", default=lenets.NETWORKS, choices=lenets.NETWORKS)
    parser.add_argument("--sparsities", type=float, nargs="*", default=_SPARSITIES)
    parser.add_argument("--bits", type=int, nargs="*", default=_BITS)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "graphopt-deep-compression")
    parser.add_argument("--name", default="deep_compression", help="of the table")
    return parser.parse_args()


def _measured(network: str, data: lenets.Images, options: argparse.Namespace) -> Iterator[tuple[str, Figure]]:
    """All rows of one network, each with what makes it."""
    digest = hashlib.sha256(data.train.tobytes() + data.test_labels.tobytes()).hexdigest()[:12]
    folder = options.cache / f"{network}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model.onnx"
    if not model.exists():
        lenets.train(network, data, folder / "trained.onnx")
        (folder / "trained.onnx").rename(model)
    np.savez(folder / "calib.npz", image=data.train[:_SAMPLES])
    yield "trained", {"bytes": model.stat().st_size, "error": _error(model, data)}
    for words, source, passes in _points(folder, options):
        figure = _kept(folder, words, source, passes, data)
        print(network, words, {key: figure[key] for key in ("bytes", "error") if key in figure}, flush=True)
        if "|" in words:
            yield words, figure


def _points(folder: Path, options: argparse.Namespace) -> Iterator[tuple[str, Path, str | None]]:
    """What to run on what. A sparse model is made once for all sizes of codebooks; its words hold no `|`."""
    model = folder / "model.onnx"
    yield f"{_RECIPE}|", model, None
    for ratio in options.sparsities:
        sparse = f"fold,prune{{pattern=unstructured ratio={ratio:g}}}"
        yield sparse, model, sparse
        for bits in options.bits:
            step = f"share{{bits={bits}}}"
            yield f"{sparse},|{step}", _bundle(folder, sparse) / "model.onnx", step
    yield (
        f"{_SHAPED}|",
        model,
        "fold,prune{ratio=0.5 of=params},prune{pattern=unstructured ratio=0.8},share{bits=4}",
    )
    yield f"{_SHAPED}, dense|", model, "fold,prune{ratio=0.5 of=params},share{bits=4}"


def _bundle(folder: Path, words: str) -> Path:
    return folder / re.sub(r"[^A-Za-z0-9.]+", "_", words).strip("_")


def _kept(folder: Path, words: str, source: Path, passes: str | None, data: lenets.Images) -> Figure:
    """A figure from the cache folder, or measured now; without passes the recipe's."""
    out = _bundle(folder, words)
    file = out.with_name(f"{out.name}.json")
    if file.exists():
        return json.loads(file.read_text("utf8"))
    recipe = "deep-compression" if passes is None else None
    calibration = str(folder / "calib.npz")
    graphopt.optimize(source, passes, recipe=recipe, calibration=calibration, out=out, check="none", overwrite=True)
    figure: Figure = {}
    if "|" in words:
        packed = pack(out / "model.onnx", out / "model.gopt")
        figure = {"bytes": packed.packed, "error": _error(out / "model.onnx", data)}
        figure["layers"] = _layers(out / "model.onnx", folder / "model.onnx", packed)
    file.write_text(json.dumps(figure), "utf8")
    return figure


def _error(model: Path, data: lenets.Images) -> float:
    """Per cent of the held-out images that are taken for another digit."""
    (scores,) = Reference(model).run({"image": data.test}).values()
    return float(100 * (scores.argmax(axis=1) != data.test_labels).mean())


def _layers(model: Path, original: Path, packed: Packed) -> dict[str, list[float]]:
    """For each layer: weights it had, weights that are not zero, size of the codebook, packed bytes, float bytes."""
    rows = {row.name: row.packed for row in packed.tensors}
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(model).graph.initializer}
    found: dict[str, list[float]] = {}
    for tensor in onnx.load(original).graph.initializer:
        if len(tensor.dims) < 2:
            continue
        own = {name: array for name, array in arrays.items() if name.startswith(tensor.name)}
        codes = next((array for name, array in own.items() if name.endswith("_codes")), None)
        entries = next((array for name, array in own.items() if array.dtype == np.float32 and codes is not None), None)
        if codes is not None and entries is not None:
            used = np.asarray(entries).reshape(-1)[np.asarray(codes).astype(np.int64)]
        else:
            used, entries = own[tensor.name], np.zeros(0)
        size = sum(rows.get(name, array.nbytes) for name, array in own.items())
        weights = int(np.prod(tensor.dims))
        found[tensor.name] = [weights, int(np.count_nonzero(used)), entries.size, size, 4 * weights]
    return found


def _write(
    found: Mapping[str, Figure], data: lenets.Images, options: argparse.Namespace, *, quiet: bool = False
) -> None:
    head = ("network", "what", "sparsity", "bits", "bytes", "ratio", "error, %", "points lost")
    rows: list[Sequence[object]] = []
    held = len(data.test)
    notes = [_NOTE.format(data=data.name, samples=min(_SAMPLES, len(data.train)), held=held, one=100 / held)]
    for network in options.networks:
        own = {key.partition("|")[2]: figure for key, figure in found.items() if key.startswith(f"{network}|")}
        if own:
            rows += _rows(network, own)
            notes += ["", *_verdicts(network, own), "", *_layer_table(network, own)]
    tables.write(
        options.name, f"Deep Compression without retraining: {data.name}", head, rows, "\n".join(notes), quiet=quiet
    )


_NOTE = """Trained on {data}, calibrated on {samples} of the training images, error on {held} held-out images in \
ONNX Runtime: one of them is {one:.2f} points, so that neighbouring rows differ by chance, and the best row is \
chosen on the same images. `bytes` is the whole packed file: weights, codebooks, biases, graph. `ratio` is that of \
the ONNX file with float weights to it. Nothing is retrained; the paper retrains twice, and prunes and measures on \
all of MNIST, so that its errors are of another task unless MNIST was given. Digits of 8 x 8 pixels, enlarged, leave \
the first layer more redundant than MNIST does."""


def _rows(network: str, own: Mapping[str, Figure]) -> Iterator[Sequence[object]]:
    base = own["trained"]
    before, after, ratio = _RATIOS[network]
    yield network, "trained", "", "", base["bytes"], "", f"{base['error']:.2f}", ""
    lost = f"{float(after) - float(before):+.2f}"
    yield network, "paper, retrained, MNIST", "0.92", "", "", ratio, f"{after} (was {before})", lost
    for words, figure in own.items():
        if words != "trained":
            match = re.search(r"ratio=([0-9.]+)\},\|share\{bits=(\d)", words)
            sparsity, bits = match.groups() if match else (f"{_sparsity(figure):.3f}", "4")
            name = "passes" if match else words.rstrip("|")
            gone = figure["error"] - base["error"]
            times = base["bytes"] / figure["bytes"]
            cells = (figure["bytes"], f"{times:.1f}", f"{figure['error']:.2f}", f"{gone:+.2f}")
            yield network, name, sparsity, bits, *cells


def _sparsity(figure: Figure) -> float:
    layers = list(figure["layers"].values())
    return 1 - sum(layer[1] for layer in layers) / sum(layer[0] for layer in layers)


def _best(own: Mapping[str, Figure], points: float) -> tuple[str, Figure] | None:
    """The smallest file that loses no more than this."""
    most = own["trained"]["error"] + points + 1e-9
    good = [(words, one) for words, one in own.items() if words != "trained" and one["error"] <= most]
    return min(good, key=lambda item: item[1]["bytes"]) if good else None


def _verdicts(network: str, own: Mapping[str, Figure]) -> Iterator[str]:
    base = own["trained"]
    for points, text in ((0.0, "at no point lost"), (0.5, "at no more than 0.5 points lost")):
        best = _best(own, points)
        if best is None:
            yield f"- {network}, {text}: nothing"
            continue
        words, figure = best
        times, paper = base["bytes"] / figure["bytes"], _RATIOS[network][2]
        what = words.replace("|", "")
        yield f"- {network}, {text}: **{times:.0f}x** (`{what}`, error {figure['error']:.2f} %); the paper {paper}x"


def _layer_table(network: str, own: Mapping[str, Figure]) -> Iterator[str]:
    best = _best(own, 0.0) or _best(own, 100.0)
    if best is None:
        return
    words, figure = best
    yield f"Layers of {network} with `{words.replace('|', '')}`, and the paper's (tables 2 and 3):"
    yield ""
    yield "| layer | weights | density, % | entries | bits a kept weight | packed, % of float |" + _PAPER_HEAD
    yield "|---|---|---|---|---|---|---|---|---|"
    total = np.zeros(5)
    for name, numbers in figure["layers"].items():
        total += numbers
        yield _layer_row(name.partition(".")[0], numbers, network)
    yield _layer_row("all", [*total[:2], 0, *total[3:]], network)


_PAPER_HEAD = " paper: density, % | bits | packed, % |"


def _layer_row(name: str, numbers: Sequence[float], network: str) -> str:
    weights, kept, entries, size, plain = numbers
    _, density, bits, share = _PAPER[network][name]
    own = (f"{weights:.0f}", f"{100 * kept / weights:.1f}", f"{entries:.0f}" if entries else "")
    bytes_ = (f"{8 * size / max(1, kept):.1f}", f"{100 * size / plain:.2f}")
    return f"| {' | '.join((name, *own, *bytes_, density, bits, share))} |"


if __name__ == "__main__":
    main()
