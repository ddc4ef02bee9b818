"""Batches other than the compiled one: cut into feeds of its size, and their outputs put together again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from graphopt.errors import DataError
from graphopt.reference import Feed
from graphopt_backends._plan import ANY, Plan

__all__ = ["count_batches", "cut_batches", "joined", "lie_one_after_the_other"]


def count_batches(plan: Plan, feed: Feed) -> int:
    """How many compiled batches a feed holds.

    Raises:
        DataError: An input has another shape than the model was compiled for, or no multiple of its batch.
    """
    found = 0
    for spec in plan.inputs:
        array, shape, axis = feed[spec.name], spec.shape, spec.batch_axis
        if shape is None:
            continue
        if len(array.shape) != len(shape) or any(array.shape[i] != n for i, n in enumerate(shape) if i != axis):
            fact = f"has shape {array.shape}, the model was compiled for {shape}"
            if plan.batch != ANY and array.shape[1:] == shape[1:]:
                fact += f", and its batch is {plan.batch}"
            raise DataError(f"input {spec.name!r}", fact, "compile with other sizes: --dim or --shape")
        if axis is None:
            continue
        samples, batch = array.shape[axis], shape[axis]
        if not samples or samples % batch:
            fact = f"has a batch of {samples}, the model was compiled for {batch} at a time"
            raise DataError(f"input {spec.name!r}", fact, f"give a multiple of {batch}, or compile with --dim")
        if found and samples // batch != found:
            fact = f"has a batch of {samples} where another input has {found * batch}"
            raise DataError(f"input {spec.name!r}", fact, "give all inputs the same number of samples")
        found = samples // batch
    return found or 1


def cut_batches(plan: Plan, feed: Feed, count: int) -> list[Feed]:
    """Cut a feed of `count` compiled batches into feeds of one each."""
    if count == 1:
        return [feed]
    axes = {spec.name: spec.batch_axis for spec in plan.inputs}
    cut: dict[str, list[Any]] = {}
    for name, array in feed.items():
        axis = axes.get(name)
        cut[name] = [array] * count if axis is None else np.split(array, count, axis)
    return [{name: pieces[i] for name, pieces in cut.items()} for i in range(count)]


def joined(plan: Plan, feeds: Sequence[Feed]) -> Feed:
    """Put the outputs of batches together."""
    if len(feeds) == 1:
        return feeds[0]
    axes = {spec.name: spec.batch_axis or 0 for spec in plan.outputs}
    return {name: np.concatenate([feed[name] for feed in feeds], axis) for name, axis in axes.items()}


def lie_one_after_the_other(plan: Plan) -> bool:
    """True if batches lie one after the other in memory, and one library of kernels is all there is to run."""
    ends = (*plan.inputs, *plan.outputs)
    alone = len(plan.parts) == 1 and plan.parts[0].engine == "kernels"
    return plan.batch == ANY and alone and all(spec.batch_axis == 0 for spec in ends)
