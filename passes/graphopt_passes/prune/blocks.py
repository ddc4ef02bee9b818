"""Which residual blocks leave the model: those that its outputs miss least for what they cost.

A block is judged by the outputs of the whole model, on a few samples without labels: how much they change when its sum
passes the shortcut on (BlockDrop, Wu et al., 2018; ShortGPT, Men et al., 2024, judge each block alone). Blocks make up
for each other, so what a block costs is measured again after others have gone.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.analyses import CONSTANTS, SHAPES, Constants, Cost
from graphopt.analyses.names import Names
from graphopt.calibration import Dataset
from graphopt.pass_base import Change, Context
from graphopt.reference import Feed, Reference
from graphopt_passes.prune.criteria.output import output_distance
from graphopt_passes.prune.residual_blocks import Block, find_blocks, remove_block

__all__ = ["BlockRemoval", "OutputJudge", "Savings", "Step", "cheapest_blocks", "prune_blocks", "without"]

_SAMPLES = 32
_BATCH = 16
_KEPT_BYTES = 256 << 20


@dataclass(frozen=True)
class Step:
    """One more block that goes.

    Attributes:
        block: The block.
        saving: What it saves where the blocks before it are gone.
        change: How much the outputs have changed once it is gone, with those before it.
    """

    block: Block
    saving: float
    change: float


@dataclass(frozen=True, eq=False)
class BlockRemoval:
    """What became of the residual blocks of a model.

    Attributes:
        steps: Those that were removed, in the order in which they went.
        changes: One entry for every sum of branches.
    """

    steps: tuple[Step, ...] = ()
    changes: tuple[Change, ...] = ()

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks that were removed."""
        return tuple(step.block for step in self.steps)

    @property
    def sums(self) -> dict[tuple[str, int], np.ndarray]:
        """Their sums, which are not what they were, with the positions that they lost: none."""
        return {(block.output, 0): np.empty(0, dtype=np.int64) for block in self.blocks}


class Savings:
    """What blocks save, in the unit of a budget.

    Args:
        model: The model that the blocks were found in.
        cost: What its nodes cost.
        constants: Its constants; those that go are the ones that only removed nodes read.
        of: What is counted.
    """

    def __init__(self, model: ir.Model, cost: Cost, constants: Constants, of: str) -> None:
        nodes = list(model.graph)
        order = {id(node): i for i, node in enumerate(nodes)}
        self._macs = [0] * len(nodes)
        self._weights = list[tuple[int, set[int]]]()
        if of == "macs":
            label = Names(model).label
            counted = [cost.nodes.get(label(node)) for node in nodes]
            self._macs = [0 if node is None else node.macs or 0 for node in counted]
            return
        for value in (*model.graph.initializers.values(), *(output for node in nodes for output in node.outputs)):
            tensor = constants.of(value)
            if tensor is not None and not value.is_graph_output():
                users = {order.get(id(user), -1) for user, _ in value.uses()}
                self._weights.append((tensor.size if of == "params" else tensor.nbytes, users))

    def of(self, nodes: Iterable[int]) -> float:
        """What the model saves without these nodes."""
        gone = set(nodes)
        weights = sum(amount for amount, users in self._weights if users and users <= gone)
        return float(sum(self._macs[i] for i in gone) + weights)


class OutputJudge:
    """How far the outputs of a changed model are from the original's.

    Args:
        model: The original.
        data: Samples, of which 32 are used, or fewer where their outputs take more than 256 MB.
        ctx: How ONNX Runtime runs.

    Raises:
        ModelError: ONNX Runtime cannot run the model.
    """

    def __init__(self, model: ir.Model, data: Dataset, ctx: Context) -> None:
        self._ctx = ctx
        self._feeds, self._wanted = list[Feed](), list[Feed]()
        session, kept = self._session(model), 0
        for feed in data.batches(_BATCH, _SAMPLES):
            outputs = session.run(feed)
            kept += sum(np.asarray(array).nbytes for array in outputs.values())
            if self._feeds and kept > _KEPT_BYTES:
                break
            self._feeds.append(feed)
            self._wanted.append(outputs)

    def of(self, model: ir.Model) -> float:
        """Squared distance of the outputs in parts of their energy, the mean over all outputs."""
        session = self._session(model)
        found = [session.run(feed) for feed in self._feeds]
        changes = [output_distance([f[k] for f in self._wanted], [f[k] for f in found]) for k in self._wanted[0]]
        return float(np.mean(changes))

    def _session(self, model: ir.Model) -> Reference:
        return Reference(model, threads=self._ctx.threads, extensions=self._ctx.extensions)


def without(model: ir.Model, blocks: Sequence[Block]) -> ir.Model:
    """A copy of a model whose blocks are gone; weights are shared."""
    copy = model.clone()
    for block in blocks:
        remove_block(copy, block)
    return copy


def cheapest_blocks(
    model: ir.Model,
    blocks: Sequence[Block],
    savings: Savings,
    wanted: float,
    judge: OutputJudge,
    ctx: Context,
    limit: float = math.inf,
) -> list[Step]:
    """Choose blocks one by one, each the one that changes the outputs least for what it saves.

    What a block costs hardly ever falls while others go, so only blocks that look cheapest are measured again.

    Args:
        model: The model; it is not changed.
        blocks: Blocks that may go.
        savings: What they save.
        wanted: What to save; it is exceeded only where that comes nearer to it.
        judge: Measures what goes wrong.
        ctx: Shows progress.
        limit: Most that the outputs may change for each unit saved.

    Returns:
        The choice, in the order in which the blocks go.
    """
    steps, gone, saved, change = list[Step](), set[int](), 0.0, 0.0
    queue = list[tuple[float, float, int, int, float]]()  # of equal ones the largest goes, then the first
    for i, block in enumerate(ctx.progress(blocks, "judging blocks")):
        saving = savings.of(block.nodes)
        if _is_nearer(0.0, saving, wanted):
            after = judge.of(without(model, [block]))
            queue.append((after / saving, -saving, i, 0, after))
    heapq.heapify(queue)
    while queue:
        price, _, i, age, after = heapq.heappop(queue)
        saving = savings.of(gone | set(blocks[i].nodes)) - saved
        if not _is_nearer(saved, saving, wanted):
            continue  # it lies in another that went, or would save too much
        if age < len(steps):
            after = judge.of(without(model, [*(step.block for step in steps), blocks[i]]))
            heapq.heappush(queue, ((after - change) / saving, -saving, i, len(steps), after))
            continue
        if price > limit:
            break
        steps.append(Step(blocks[i], saving, after))
        gone |= set(blocks[i].nodes)
        saved, change = saved + saving, after
    return steps


def _is_nearer(saved: float, saving: float, wanted: float) -> bool:
    return saving > 0 and abs(saved + saving - wanted) < abs(saved - wanted)


def prune_blocks(
    model: ir.Model,
    ctx: Context,
    savings: Savings,
    wanted: float,
    *,
    refuse: Callable[[Block], str | None],
    others: Callable[[OutputJudge], float],
) -> BlockRemoval:
    """Remove the blocks that the outputs miss least, as long as nothing else would be missed less.

    Args:
        model: The model; removed blocks leave an Identity that `join_shortcuts` takes away.
        ctx: Its samples judge, and its facts are out of date afterwards.
        savings: What blocks save.
        wanted: What to save.
        refuse: Says why a block has to stay, or None.
        others: Measures how much the outputs change for each unit saved where other units go; infinite without any.

    Raises:
        ModelError: ONNX Runtime cannot run the model.
    """
    blocks, refused = find_blocks(model, ctx.fact(SHAPES), ctx.fact(CONSTANTS))
    reasons = dict(refused) | {block.name: reason for block in blocks if (reason := refuse(block)) is not None}
    allowed = [block for block in blocks if block.name not in reasons]
    steps = list[Step]()
    if allowed and ctx.calibration is not None and wanted > 0:
        judge = OutputJudge(model, ctx.calibration, ctx)
        steps = cheapest_blocks(model, allowed, savings, wanted, judge, ctx, limit=others(judge))
    gone = {i for step in steps for i in step.block.nodes}
    saved = savings.of(gone)
    for block in allowed:
        nearer = _is_nearer(saved, savings.of(gone | set(block.nodes)) - saved, wanted)
        reasons[block.name] = "other units are missed less" if nearer else "the ratio is met more closely without it"
    for step in steps:
        remove_block(model, step.block)
    return BlockRemoval(tuple(steps), tuple(_changes(blocks, steps, reasons, [name for name, _ in refused])))


def _changes(
    blocks: Sequence[Block], steps: Sequence[Step], reasons: Mapping[str, str], refused: Sequence[str]
) -> Iterator[Change]:
    gone = {step.block.name: step for step in steps}
    outer = {
        block.name: step.block.name for step in steps for block in blocks if set(block.nodes) < set(step.block.nodes)
    }
    before = 0.0
    for step in steps:
        if step.block.name not in outer:
            count, change = len(step.block.layers), round(step.change - before, 6)
            details = {"layers": count, "saving": int(step.saving), "output_change": change}
            yield Change(step.block.name, f"removed a residual block of {count} layers", details=details)
        before = step.change
    for block in blocks:
        if block.name in outer:
            yield Change.skipped(block.name, f"block: it left with the block of {outer[block.name]!r}")
        elif block.name not in gone:
            yield Change.skipped(block.name, f"block: {reasons[block.name]}")
    for name in refused:
        yield Change.skipped(name, f"not a residual block: {reasons[name]}")
