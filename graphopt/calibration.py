"""Calibration and evaluation data: where samples come from, and how they are checked against the model.

    FILE.npz            arrays named after the model's inputs
    FOLDER              one FILE.npy per input, or sub-folders named after the inputs holding one .npy per sample
    MODULE:FUNCTION     a function that yields feeds (dictionaries of arrays)
    synthetic:SEED      random values, only ever on request

An array with the rank of its input stacks samples on the first axis; an array with one axis more holds one whole feed
per entry. Evaluation data adds `labels`, or `reference.<output>` arrays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir

from graphopt.errors import DataError, GraphoptError, nearest
from graphopt.metrics import Metric, Score, metric, open_function
from graphopt.model_io import InputSpec, ShapeBinding
from graphopt.reference import Feed, random_feed
from graphopt.sample_files import Rows, Stack, let_go, read_folder, read_npz

__all__ = ["Dataset", "Metric", "Score", "metric", "open_calibration", "open_evaluation", "open_function"]

Array = np.ndarray[Any, np.dtype[Any]]
Source = str | Path | Mapping[str, Array]
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


def open_calibration(
    source: Source,
    inputs: Sequence[InputSpec],
    binding: ShapeBinding,
    readers: Callable[[str], Iterable[Dataset]] = lambda uri: (),  # noqa: ARG005
) -> Dataset:
    """Open calibration data and check it against the model's inputs.

    Args:
        source: What the user gave: text as above, or arrays as an .npz would hold them.
        inputs: The model's inputs.
        binding: Sizes fixed for dynamic dimensions.
        readers: Asks plugins; the first that knows the uri wins.

    Raises:
        DataError: The data is missing, empty, or does not fit the inputs.
    """
    dataset = _open(source, inputs, binding, readers)
    extra = [*dataset.references, *(["labels"] if dataset.labels is not None else [])]
    if extra:
        dataset = replace(dataset, labels=None, references={})
    return _checked(dataset, inputs)


def open_evaluation(
    source: Source,
    inputs: Sequence[InputSpec],
    outputs: Sequence[str],
    binding: ShapeBinding,
    readers: Callable[[str], Iterable[Dataset]] = lambda uri: (),  # noqa: ARG005
) -> Dataset:
    """Open evaluation data: samples with `labels`, or with `reference.<output>` arrays.

    Raises:
        DataError: As `open_calibration`; or there are neither labels nor references.
    """
    dataset = _checked(_open(source, inputs, binding, readers), inputs)
    uri = dataset.origin
    if dataset.labels is None and not dataset.references:
        raise DataError(uri, "has neither labels nor reference.<output> arrays", "add one, or leave --eval out")
    for name in dataset.references:
        if name not in outputs:
            raise DataError(uri, f"reference.{name}: the model has no such output", nearest(name, outputs))
    return dataset


# ---------------------------------------------------------------- reading


def _open(
    source: Source,
    inputs: Sequence[InputSpec],
    binding: ShapeBinding,
    readers: Callable[[str], Iterable[Dataset]],
) -> Dataset:
    if isinstance(source, Mapping):
        arrays = {name: np.asarray(value) for name, value in source.items()}
        return _from_arrays("arrays", arrays, _arrays_digest(arrays), inputs, binding)
    uri = str(source)
    for dataset in readers(uri):
        return dataset
    path = Path(uri)
    if uri.startswith("synthetic:"):
        return _synthetic(uri, inputs, binding)
    if path.is_dir():
        return _from_arrays(uri, *read_folder(path), inputs, binding)
    if path.suffix == ".npz" or path.is_file():
        return _from_arrays(uri, *read_npz(path), inputs, binding)
    if ":" in uri:
        return _from_function(uri)
    raise DataError(uri, "no such file, folder or module:function", "give an .npz with arrays named after the inputs")


def _arrays_digest(arrays: Mapping[str, Array]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        if array.dtype.hasobject:  # text: what is stored are addresses
            digest.update(repr(array.tolist()).encode())
        else:
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _synthetic(uri: str, inputs: Sequence[InputSpec], binding: ShapeBinding) -> Dataset:
    seed = uri.partition(":")[2]
    if not (seed.isascii() and seed.isdigit()):
        raise DataError(uri, f"{seed!r} is not a whole number", "write synthetic:0")

    def read() -> Iterator[Feed]:
        rng = np.random.default_rng(int(seed))
        return (random_feed(inputs, binding, rng) for _ in range(_SYNTHETIC_SAMPLES))

    return Dataset(uri, hashlib.sha256(uri.encode()).hexdigest(), read, synthetic=True)


def _from_function(uri: str) -> Dataset:
    function, digest = open_function(uri, "--calibration")

    def read() -> Iterator[Feed]:
        try:
            for feed in function():
                yield _as_feed(uri, feed)
        except GraphoptError:
            raise
        except Exception as e:  # the function is the user's: it can raise anything
            raise DataError(uri, f"raises {type(e).__name__}: {e}", "it takes no arguments and yields feeds") from e

    return Dataset(uri, digest, read)


def _as_feed(uri: str, feed: Any) -> Feed:
    if not isinstance(feed, Mapping):
        raise DataError(uri, f"yields {type(feed).__name__}, not dictionaries of arrays")
    return {str(name): np.asarray(value) for name, value in cast("Mapping[str, Any]", feed).items()}


def _from_arrays(
    uri: str, arrays: Mapping[str, Rows], digest: str, inputs: Sequence[InputSpec], binding: ShapeBinding
) -> Dataset:
    names = [spec.name for spec in inputs]
    truth = [k for k in arrays if k not in names and (k == "labels" or k.startswith("reference."))]
    extra = {k: rows[:] if isinstance(rows := arrays[k], Stack) else rows for k in truth}
    arrays = {k: rows for k, rows in arrays.items() if k not in extra}
    labels = extra.pop("labels", None)
    references = {k.removeprefix("reference."): array for k, array in extra.items()}
    if not arrays:
        raise DataError(uri, "holds no arrays", f"needs: {', '.join(names)}")
    for name in arrays:
        if name not in names:
            raise DataError(uri, f"array {name!r} is not an input of the model", nearest(name, names))
    for name in names:
        if name not in arrays:
            raise DataError(uri, f"has no array for the input {name!r}", f"it holds: {', '.join(arrays)}")
    text = {spec.name for spec in inputs if spec.dtype == ir.DataType.STRING and arrays[spec.name].dtype.kind == "U"}
    layout = {spec.name: _layout(uri, spec, arrays[spec.name], binding) for spec in inputs}
    counts = {name: len(arrays[name]) // step if step else len(arrays[name]) for name, step in layout.items()}
    if min(counts.values()) == 0:
        raise DataError(uri, "holds no samples")
    if len(set(counts.values())) > 1:
        raise DataError(uri, f"arrays hold different numbers of samples: {counts}")
    count = next(iter(counts.values()))

    def read() -> Iterator[Feed]:
        for i in range(count):
            feed = {k: np.asarray(a[i * s : (i + 1) * s] if (s := layout[k]) else a[i]) for k, a in arrays.items()}
            # files hold text as numpy's own type, ONNX Runtime takes objects
            yield feed | {k: feed[k].astype(object) for k in text}
            for rows in arrays.values():
                let_go(rows)

    stacked = all(step == 1 for step in layout.values()) and all(_open_batch(spec) for spec in inputs)
    return Dataset(uri, digest, read, stacked=stacked, labels=labels, references=references)


def _layout(uri: str, spec: InputSpec, array: Rows, binding: ShapeBinding) -> int:
    """Rows of the first axis that make one feed; 0 where each entry is a whole feed."""
    if spec.rank is None:
        return 1
    if array.ndim == spec.rank + 1:
        return 0
    if array.ndim != spec.rank or array.ndim == 0:
        fact = f"array {spec.name!r} has rank {array.ndim}, the input has rank {spec.rank}"
        hint = f"stack samples on the first axis: {_text(spec.shape)}" if spec.rank else "give one value a sample"
        raise DataError(uri, fact, hint)
    first = (spec.bound(binding) or (1,))[0]
    rows = first if isinstance(first, int) else 1
    if rows > 1 and len(array) % rows:
        fact = f"array {spec.name!r} holds {len(array)} rows, the model takes {rows} at a time"
        raise DataError(uri, fact, f"give a multiple of {rows}")
    return rows


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
                fact = f"a sample of {spec.name!r} has shape {_text(array.shape)}, the input takes {_text(spec.shape)}"
                raise DataError(dataset.origin, fact)
    return dataset


def _join(feeds: Sequence[Feed]) -> Feed:
    if len(feeds) == 1:
        return feeds[0]
    return {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}


def _text(shape: Sequence[int | str | None] | None) -> str:
    return "x".join("?" if size is None else str(size) for size in shape or ()) or "scalar"
