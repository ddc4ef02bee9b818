"""Calibration and evaluation data: where samples come from, how they are checked, and how outputs are scored.

    FILE.npz            arrays named after the model's inputs
    FOLDER              one FILE.npy per input, or sub-folders named after the inputs holding one .npy per sample
    MODULE:FUNCTION     a function that yields feeds (dictionaries of arrays)
    synthetic:SEED      random values, only ever on request

An array with the rank of its input stacks samples on the first axis; an array with one axis more holds one whole feed
per entry. Evaluation data adds `labels`, or `reference.<output>` arrays.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from graphopt.errors import DataError, nearest
from graphopt.model_io import InputSpec, ShapeBinding
from graphopt.reference import Feed, random_feed

__all__ = ["Dataset", "Metric", "Score", "metric", "open_calibration", "open_evaluation", "open_function"]

Array = np.ndarray[Any, np.dtype[Any]]
_SYNTHETIC_SAMPLES = 64


@dataclass(frozen=True)
class Dataset:
    """Samples that can be read again and again.

    Attributes:
        origin: What the user wrote.
        digest: sha256 of what the samples follow from; None if unknown, and then nothing is cached.
        read: Starts a new pass over the feeds.
        stacked: Each feed is one sample on the first axis, so that feeds may be joined into batches.
        synthetic: The values are random.
        labels: Labels, one entry a sample (evaluation only).
        references: Expected outputs by name (evaluation only).
    """

    origin: str
    digest: str | None
    read: Callable[[], Iterator[Feed]]
    stacked: bool = False
    synthetic: bool = False
    labels: Array | None = None
    references: Mapping[str, Array] = field(default_factory=dict[str, Array])

    def feeds(self, limit: int | None = None) -> Iterator[Feed]:
        """Read the feeds one by one, `limit` of them at most."""
        for i, feed in enumerate(self.read()):
            if limit is not None and i >= limit:
                return
            yield feed

    def batches(self, size: int, limit: int | None = None) -> Iterator[Feed]:
        """Read the feeds joined into batches where they are stacked, else one by one."""
        pending: list[Feed] = []
        for feed in self.feeds(limit):
            pending.append(feed)
            if len(pending) >= (size if self.stacked else 1):
                yield _join(pending)
                pending = []
        if pending:
            yield _join(pending)


@dataclass(frozen=True)
class Score:
    """A metric's value on the user's labelled data.

    Attributes:
        metric: Name of the metric.
        value: Percent for top1 and top5; the metric's own unit otherwise.
        samples: Number of samples scored.
        higher_is_better: False for perplexity and errors.
    """

    metric: str
    value: float
    samples: int
    higher_is_better: bool = True

    def drop_from(self, before: Score) -> float:
        """Loss against `before`: points where higher is better, else relative percent. Negative: a gain."""
        if self.higher_is_better:
            return before.value - self.value
        return 100 * (self.value - before.value) / before.value if before.value else float(self.value > 0) * 100


@dataclass(frozen=True)
class Metric:
    """How outputs are scored: `score(outputs, dataset)` on all outputs, stacked on the first axis."""

    name: str
    score: Callable[[Feed, Dataset], float]
    higher_is_better: bool = True
    digest: str | None = ""


def open_calibration(
    uri: str,
    inputs: Sequence[InputSpec],
    binding: ShapeBinding,
    readers: Callable[[str], Iterable[Dataset]] = lambda uri: (),  # noqa: ARG005
) -> Dataset:
    """Open calibration data and check it against the model's inputs.

    Args:
        uri: What the user gave.
        inputs: The model's inputs.
        binding: Sizes fixed for dynamic dimensions.
        readers: Asks plugins; the first that knows the uri wins.

    Raises:
        DataError: The data is missing, empty, or does not fit the inputs.
    """
    dataset = _open(uri, inputs, binding, readers)
    extra = [*dataset.references, *(["labels"] if dataset.labels is not None else [])]
    if extra:
        dataset = replace(dataset, labels=None, references={})
    return _checked(dataset, inputs)


def open_evaluation(
    uri: str,
    inputs: Sequence[InputSpec],
    outputs: Sequence[str],
    binding: ShapeBinding,
    readers: Callable[[str], Iterable[Dataset]] = lambda uri: (),  # noqa: ARG005
) -> Dataset:
    """Open evaluation data: samples with `labels`, or with `reference.<output>` arrays.

    Raises:
        DataError: As `open_calibration`; or there are neither labels nor references.
    """
    dataset = _checked(_open(uri, inputs, binding, readers), inputs)
    if dataset.labels is None and not dataset.references:
        raise DataError(uri, "has neither labels nor reference.<output> arrays", "add one, or leave --eval out")
    for name in dataset.references:
        if name not in outputs:
            raise DataError(uri, f"reference.{name}: the model has no such output", nearest(name, outputs))
    return dataset


def metric(name: str | None, dataset: Dataset) -> Metric:
    """Find a metric by name, or the one that fits the data: top1 for labels, mse for references.

    Raises:
        DataError: There is no such metric, or it needs what the data lacks.
    """
    name = name or ("top1" if dataset.labels is not None else "mse")
    if ":" in name:
        function, digest = open_function(name, "--metric")
        return Metric(name, function, getattr(function, "higher_is_better", True), digest)
    if name not in _METRICS:
        raise DataError(f"--metric {name}", "no such metric", nearest(name, _METRICS))
    if name == "mse" and not dataset.references:
        raise DataError("--metric mse", "needs reference.<output> arrays in the evaluation data")
    if name != "mse" and dataset.labels is None:
        raise DataError(f"--metric {name}", "needs labels in the evaluation data")
    return _METRICS[name]


def open_function(text: str, subject: str) -> tuple[Callable[..., Any], str | None]:
    """Import `module:function`; returns it with the sha256 of its module's source (None if there is no source).

    Raises:
        DataError: The module or the function cannot be found.
    """
    module_name, _, function_name = text.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ImportError as e:
        raise DataError(f"{subject} {text}", f"module cannot be imported: {e}", "run where it is importable") from e
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [name for name, value in inspect.getmembers(module, callable) if not name.startswith("_")]
        raise DataError(f"{subject} {text}", "the module has no such function", nearest(function_name, names))
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):
        return function, None
    return function, hashlib.sha256(source.encode()).hexdigest()


# ---------------------------------------------------------------- reading


def _open(
    uri: str,
    inputs: Sequence[InputSpec],
    binding: ShapeBinding,
    readers: Callable[[str], Iterable[Dataset]],
) -> Dataset:
    for dataset in readers(uri):
        return dataset
    path = Path(uri)
    if uri.startswith("synthetic:"):
        return _synthetic(uri, inputs, binding)
    if path.is_dir():
        return _from_arrays(uri, *_read_folder(path), inputs, binding)
    if path.suffix == ".npz" or path.is_file():
        return _from_arrays(uri, *_read_npz(path), inputs, binding)
    if ":" in uri:
        return _from_function(uri)
    raise DataError(uri, "no such file, folder or module:function", "give an .npz with arrays named after the inputs")


def _synthetic(uri: str, inputs: Sequence[InputSpec], binding: ShapeBinding) -> Dataset:
    seed = uri.partition(":")[2]
    if not seed.isdigit():
        raise DataError(uri, f"{seed!r} is not a whole number", "write synthetic:0")

    def read() -> Iterator[Feed]:
        rng = np.random.default_rng(int(seed))
        return (random_feed(inputs, binding, rng) for _ in range(_SYNTHETIC_SAMPLES))

    return Dataset(uri, hashlib.sha256(uri.encode()).hexdigest(), read, synthetic=True)


def _from_function(uri: str) -> Dataset:
    function, digest = open_function(uri, "--calibration")

    def read() -> Iterator[Feed]:
        for feed in function():
            if not isinstance(feed, Mapping):
                raise DataError(uri, f"yields {type(feed).__name__}, not dictionaries of arrays")
            yield {str(k): np.asarray(v) for k, v in cast("Mapping[str, Any]", feed).items()}

    return Dataset(uri, digest, read)


def _read_npz(path: Path) -> tuple[dict[str, Array], str]:
    if not path.is_file():
        raise DataError(str(path), "no such file")
    try:
        with np.load(path, allow_pickle=False) as npz:
            arrays = {name: npz[name] for name in npz.files}
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as e:
        raise DataError(str(path), "not an .npz file of plain arrays, or damaged", "write it with numpy.savez") from e
    with path.open("rb") as stream:
        return arrays, hashlib.file_digest(stream, "sha256").hexdigest()


def _read_folder(path: Path) -> tuple[dict[str, Array], str]:
    digest, arrays = hashlib.sha256(), dict[str, Array]()
    for file in sorted(path.rglob("*.npy")):
        digest.update(str(file.relative_to(path)).encode() + file.read_bytes())
    try:
        for entry in sorted(path.iterdir()):
            if entry.suffix == ".npy":
                arrays[entry.stem] = np.load(entry, allow_pickle=False)
            elif entry.is_dir() and (files := sorted(entry.glob("*.npy"))):
                arrays[entry.name] = np.stack([np.load(file, allow_pickle=False) for file in files])
    except (ValueError, OSError, EOFError) as e:
        raise DataError(str(path), f"an .npy file cannot be read: {e}") from e
    return arrays, digest.hexdigest()


def _from_arrays(
    uri: str, arrays: dict[str, Array], digest: str, inputs: Sequence[InputSpec], binding: ShapeBinding
) -> Dataset:
    labels = arrays.pop("labels", None)
    references = {k.removeprefix("reference."): arrays.pop(k) for k in list(arrays) if k.startswith("reference.")}
    names = [spec.name for spec in inputs]
    if not arrays:
        raise DataError(uri, "holds no arrays", f"needs: {', '.join(names)}")
    for name in arrays:
        if name not in names:
            raise DataError(uri, f"array {name!r} is not an input of the model", nearest(name, names))
    for name in names:
        if name not in arrays:
            raise DataError(uri, f"has no array for the input {name!r}", f"it holds: {', '.join(arrays)}")
    layout = {spec.name: _layout(uri, spec, arrays[spec.name], binding) for spec in inputs}
    counts = {name: len(arrays[name]) // step if step else len(arrays[name]) for name, step in layout.items()}
    if min(counts.values()) == 0:
        raise DataError(uri, "holds no samples")
    if len(set(counts.values())) > 1:
        raise DataError(uri, f"arrays hold different numbers of samples: {counts}")
    count = next(iter(counts.values()))

    def read() -> Iterator[Feed]:
        for i in range(count):
            yield {k: a[i * s : (i + 1) * s] if (s := layout[k]) else np.asarray(a[i]) for k, a in arrays.items()}

    stacked = all(step == 1 for step in layout.values()) and all(_open_batch(spec) for spec in inputs)
    return Dataset(uri, digest, read, stacked=stacked, labels=labels, references=references)


def _layout(uri: str, spec: InputSpec, array: Array, binding: ShapeBinding) -> int:
    """Rows of the first axis that make one feed; 0 where each entry is a whole feed."""
    if spec.rank is None:
        return 1
    if array.ndim == spec.rank + 1:
        return 0
    if array.ndim != spec.rank or array.ndim == 0:
        fact = f"array {spec.name!r} has rank {array.ndim}, the input has rank {spec.rank}"
        raise DataError(uri, fact, f"stack samples on the first axis: {spec.shape}")
    first = (spec.bound(binding) or (1,))[0]
    return first if isinstance(first, int) else 1


def _open_batch(spec: InputSpec) -> bool:
    return bool(spec.shape) and not isinstance((spec.shape or (1,))[0], int)


def _checked(dataset: Dataset, inputs: Sequence[InputSpec]) -> Dataset:
    """Check the first feed: names, types, shapes."""
    feed = next(dataset.feeds(1), None)
    if feed is None:
        raise DataError(dataset.origin, "holds no samples")
    names = [spec.name for spec in inputs]
    for name in feed:
        if name not in names:
            raise DataError(dataset.origin, f"{name!r} is not an input of the model", nearest(name, names))
    for spec in inputs:
        if spec.name not in feed:
            raise DataError(dataset.origin, f"has no array for the input {spec.name!r}", f"it holds: {', '.join(feed)}")
        array = feed[spec.name]
        if array.dtype != spec.dtype.numpy():
            fact = f"array {spec.name!r} is {array.dtype}, the input takes {spec.dtype.numpy()}"
            raise DataError(dataset.origin, fact, f"convert it with .astype({str(spec.dtype.numpy())!r})")
        if spec.shape is not None:
            fits = array.ndim == len(spec.shape)
            fits = fits and all(not isinstance(d, int) or d == s for d, s in zip(spec.shape, array.shape, strict=True))
            if not fits:
                fact = f"a sample of {spec.name!r} has shape {array.shape}, the input takes {spec.shape}"
                raise DataError(dataset.origin, fact)
    return dataset


def _join(feeds: Sequence[Feed]) -> Feed:
    if len(feeds) == 1:
        return feeds[0]
    return {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}


# ---------------------------------------------------------------- metrics


def _first(outputs: Feed) -> Array:
    return next(iter(outputs.values()))


def _labels(outputs: Feed, dataset: Dataset) -> tuple[Array, Array]:
    scores, labels = _first(outputs), np.asarray(dataset.labels)
    if scores.shape[:-1] != labels.shape:
        fact = f"labels have shape {labels.shape}, the first output has {scores.shape}"
        raise DataError(dataset.origin, fact, "one label for each row of the output")
    return scores, labels


def _topk(k: int) -> Callable[[Feed, Dataset], float]:
    def score(outputs: Feed, dataset: Dataset) -> float:
        scores, labels = _labels(outputs, dataset)
        best = np.argsort(-scores, axis=-1, kind="stable")[..., :k]
        return 100 * float((best == labels[..., None]).any(-1)[labels >= 0].mean())

    return score


def _perplexity(outputs: Feed, dataset: Dataset) -> float:
    scores, labels = _labels(outputs, dataset)
    logits = scores.astype(np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    picked = np.take_along_axis(logits, labels.clip(0)[..., None], -1)[..., 0]
    return float(np.exp((np.log(np.exp(logits).sum(-1)) - picked)[labels >= 0].mean()))


def _mse(outputs: Feed, dataset: Dataset) -> float:
    errors = [np.square(outputs[k].reshape(v.shape) - v.astype(np.float64)) for k, v in dataset.references.items()]
    return float(np.mean([e.mean() for e in errors]))


_METRICS = {
    "top1": Metric("top1", _topk(1)),
    "top5": Metric("top5", _topk(5)),
    "perplexity": Metric("perplexity", _perplexity, higher_is_better=False),
    "mse": Metric("mse", _mse, higher_is_better=False),
}
