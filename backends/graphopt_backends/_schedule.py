"""Default schedules for CPU loops: inline, parallel over the outer axes, vectorised on the last one.

A function that the rule does not fit keeps TVM's plain loops.
"""

from __future__ import annotations

import logging
from typing import Any

from graphopt.targets import Isa

__all__ = ["schedule_module"]

_PARALLEL = 8192
_SMALL_ROW = 64
_log = logging.getLogger(__name__)


def schedule_module(module: Any, isa: Isa) -> Any:
    """Schedule every primitive function of a fused module."""
    import tvm
    from tvm import tirx

    functions: dict[Any, Any] = {}
    for variable, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc) and not (function.attrs and "tirx.is_scheduled" in function.attrs):
            try:
                function = _schedule(function, isa.vector_bits // 32).with_attr("tirx.is_scheduled", True)
            except Exception as e:  # the scheduler raises untyped errors for loops it cannot transform
                _log.debug("%s keeps its plain loops: %s", variable.name_hint, str(e).strip().splitlines()[:1])
        functions[variable] = function
    return tvm.IRModule(functions, attrs=module.attrs)


class _UnfitError(Exception):
    """The rule does not fit this function."""


def _schedule(function: Any, lanes: int) -> Any:
    import tvm
    from tvm import s_tir
    from tvm.s_tir.dlight.analysis import normalize_prim_func

    schedule = s_tir.Schedule(tvm.IRModule({"main": function}), error_render_level="none")
    blocks = normalize_prim_func(schedule)
    if blocks is None:
        raise _UnfitError("not in normal form")
    reduces = any(block.is_reduction() for block in blocks)
    # a condition (padding, mostly) inlined into a reduction is evaluated lane by lane in its innermost loop
    held = [block for block in blocks if reduces and _has_condition(schedule, block)]
    for block in [*held, *_inline(schedule, [block for block in blocks if block not in held])]:
        _schedule_block(schedule, block, 1 if _has_condition(schedule, block) else lanes)
    return schedule.mod["main"]


def _inline(schedule: Any, blocks: list[Any]) -> list[Any]:
    """Inline as many blocks as possible into those that read or write their results; returns the rest."""
    from tvm.s_tir.dlight.base import try_inline

    return try_inline(schedule, blocks)


def _has_condition(schedule: Any, block: Any) -> bool:
    """True if the block chooses between values: the printed form is the only one that this TVM offers to a search."""
    text = schedule.get(block.block_rv).script()
    return "if_then_else" in text or "Select" in text


def _schedule_block(schedule: Any, block: Any, lanes: int) -> None:
    def extent(loop: Any) -> int:
        return int(schedule.get(loop).extent)

    loops = schedule.get_loops(block.block_rv)
    kinds = [axis.kind for axis in block.iters]
    if len(loops) != len(kinds) or any(kind not in "SR" for kind in kinds):
        raise _UnfitError("loops and axes differ")
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == "S"]
    reduced = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == "R"]
    spatial = [loop for loop in spatial if extent(loop) > 1] or spatial[:1]
    if not spatial:
        return
    size = 1
    for loop in spatial + reduced:
        size *= extent(loop)
    outer, vector = _split(schedule, spatial, bool(reduced), lanes)
    if reduced:
        schedule.reorder(*outer, *reduced, *([vector] if vector is not None else []))
    fused = outer[:-1] if len(outer) > 1 and not reduced else outer
    top = schedule.fuse(*fused) if len(fused) > 1 else fused[0]
    if size >= _PARALLEL:
        schedule.parallel(top)
    if vector is not None:
        schedule.vectorize(vector)  # before decompose_reduction: afterwards the update block is rejected
    if reduced and block.is_reduction():
        start = schedule.decompose_reduction(block.block_rv, reduced[0])
        inner = schedule.get_loops(start)[-1]
        if vector is not None and extent(inner) == lanes:
            schedule.vectorize(inner)


def _split(schedule: Any, spatial: list[Any], reduces: bool, lanes: int) -> tuple[list[Any], Any]:
    """Split the last spatial axis by the vector width; returns the outer loops and the vector loop, if any."""
    last = spatial[-1]
    size = int(schedule.get(last).extent)
    if lanes == 1:
        return spatial, None
    if size % lanes == 0:
        rest, vector = schedule.split(last, [None, lanes])
        return [*spatial[:-1], rest], vector
    if not reduces and size < _SMALL_ROW:
        fused = schedule.fuse(*spatial) if len(spatial) > 1 else last
        if int(schedule.get(fused).extent) % lanes == 0:
            rest, vector = schedule.split(fused, [None, lanes])
            return [rest], vector
        return [fused], None
    return spatial, None
