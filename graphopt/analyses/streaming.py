"""Running samples through a model and looking at values inside it, in bounded memory."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import onnx_ir as ir
from threadpoolctl import threadpool_limits

from graphopt.analyses.lifting import lift
from graphopt.analyses.names import Names
from graphopt.analyses.shapes import CONCRETE_SHAPES, Shapes
from graphopt.calibration import Dataset
from graphopt.errors import DataError
from graphopt.pass_base import Context
from graphopt.reference import Feed, Reference

__all__ = ["Seen", "ahead", "expose", "needed_samples", "stream"]

_BATCH = 16
_RUN_BYTES = 256 << 20
_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


@dataclass(frozen=True, eq=False)
class Seen:
    """Some values of one batch.

    Attributes:
        batch: Number of the batch, from 0.
        samples: How many samples are joined in it.
        values: Arrays by name.
    """

    batch: int
    samples: int
    values: Feed


def needed_samples(ctx: Context, who_needs: str) -> Dataset:
    """The calibration data.

    Args:
        ctx: Holds it.
        who_needs: How the error starts: "moments need".

    Raises:
        DataError: There is none.
    """
    if ctx.calibration is None:
        raise DataError("calibration", f"{who_needs} samples", "give --calibration")
    return ctx.calibration


def stream(
    model: ir.Model, names: Sequence[str], ctx: Context, label: str, samples: int | None = None
) -> Iterator[Seen]:
    """Run the calibration data through a model and yield values in it.

    A batch is run once, or several times for a part of the values each, so that what is exposed at a time stays below
    256 MB; batches are as large as that allows, 16 samples at most.

    Args:
        model: The model; it does not change.
        names: Values to look at: inputs, or computed; those in subgraphs by their names in `Names`, see `lift`.
        ctx: Holds the data and says how ONNX Runtime runs.
        label: What the progress bar calls it.
        samples: How many samples to use at most; None: all.

    Returns:
        Some values of a batch; each comes once a batch. Read to the end.

    Raises:
        DataError: There is no calibration data.
        ModelError: ONNX Runtime cannot run the model on it.
    """
    data = needed_samples(ctx, f"{label} needs")
    fed = {value.name for value in model.graph.inputs}
    computed = [name for name in dict.fromkeys(names) if name not in fed]
    exposed, outputs = _exposed(model, computed)
    session = Reference(exposed, threads=ctx.threads, extensions=ctx.extensions) if computed else None
    sizes = _sizes(computed, ctx.fact(CONCRETE_SHAPES))
    batch = max(1, min(_BATCH, _RUN_BYTES // max(1, sum(sizes.values()))))

    def runs() -> Iterator[tuple[int, Feed, Sequence[str]]]:
        for number, feed in enumerate(ctx.progress(data.batches(batch, samples), label)):
            yield number, feed, ()
            yield from ((number, feed, chunk) for chunk in _chunks(sizes, feed))

    def seen(run: tuple[int, Feed, Sequence[str]]) -> Seen:
        number, feed, chunk = run
        joined = len(next(iter(feed.values()))) if data.stacked else 1
        if session is None or not chunk:
            return Seen(number, joined, {name: feed[name] for name in dict.fromkeys(names) if name in feed})
        found = session.run(feed, [outputs[name] for name in chunk])
        return Seen(number, joined, {name: found[outputs[name]] for name in chunk})

    return ahead(seen, runs())


def ahead(function: Callable[[_Item], _Made], items: Iterable[_Item]) -> Iterator[_Made]:
    """What a function makes of items, each by another thread while the one before is looked at.

    Whoever looks multiplies matrices on one core meanwhile: more threads than cores wait for each other, which took
    two thirds more processor time than it saved.
    """
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(1) as pool:
        coming = deque[Future[_Made]]()
        for item in items:
            coming.append(pool.submit(function, item))
            if len(coming) > 1:
                yield coming.popleft().result()
        for last in coming:
            yield last.result()


def expose(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """Return a copy whose outputs are its own and the values of those names; weights are shared, not copied."""
    return _exposed(model, names)[0]


def _exposed(model: ir.Model, names: Sequence[str]) -> tuple[ir.Model, dict[str, str]]:
    """The copy of `expose`, and what the values are called as its outputs."""
    copy = model.clone()
    known, fixed = {value.name for value in copy.graph.outputs}, set(copy.graph.inputs)
    called = Names(copy)
    computed = (value for value in called.values() if not value.is_initializer() and value not in fixed)
    by_name = {called.key(value): value for value in computed}
    inside = [name for name in names if name in by_name and by_name[name].graph is not copy.graph]
    by_name |= dict(zip(inside, lift(copy, [by_name[name] for name in inside]), strict=True))
    for name in names:
        if name not in known and name in by_name:
            by_name[name].shape = None  # the runtime knows better than a stale annotation
            copy.graph.outputs.append(by_name[name])
    return copy, {name: by_name[name].name or "" for name in names if name in by_name}


def _sizes(names: Sequence[str], shapes: Shapes) -> dict[str, int]:
    """Bytes of each value for one sample; an unknown shape counts a tenth of the memory limit."""
    found: dict[str, int] = {}
    for name in names:
        dims = shapes.shapes.get(name)
        sizes = [d for d in dims or () if isinstance(d, int)]
        found[name] = 4 * math.prod(sizes) if dims is not None and len(sizes) == len(dims) else _RUN_BYTES // 10
    return found


def _chunks(sizes: Mapping[str, int], feed: Feed) -> Iterator[list[str]]:
    """Cut names into groups whose values stay below the memory limit."""
    batch = max((array.shape[0] for array in feed.values() if array.ndim), default=1)
    chunk: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if chunk and filled + size * batch > _RUN_BYTES:
            yield chunk
            chunk, filled = [], 0
        chunk.append(name)
        filled += size * batch
    if chunk:
        yield chunk
