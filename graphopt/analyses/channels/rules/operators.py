"""How channels pass through the remaining operators, and the tables of all: `OPERATOR_RULES`, `CONTRIB_RULES`.

operator                           what is tied                                              what is pinned
Einsum                             axes of one letter                                        diagonals
Tile                               position i of n repeats with i; a single one that is      -
                                     repeated makes channels of its own
DepthToSpace, SpaceToDepth         the b*b channels that one block is made of                space
GroupNormalization, GroupNorm      whole groups of channels, with their scale and bias       space
LpNormalization                    every axis                                                its axis, unless what
                                                                                               comes in is zero
LRN, CumSum, CumProd, TopK, Trilu  axes other than theirs                                    theirs
  Compress, ReverseSequence, DFT,
  TensorScatter, CenterCropPad,
  MeanVarianceNormalization
GatherElements, ScatterElements    axes other than theirs, where sizes agree                 theirs
GatherND, ScatterND                axes behind those that are indexed                        those that are indexed
OneHot                             axes of the indices                                       the one that is made
GridSample, RoiAlign, MaxRoiPool,  batch and channel; in Col2Im a channel ~ its patch        space; channels of several
  DeformConv, Col2Im                                                                           offset groups
ConstantOfShape                    axes whose sizes are read; stated ones make their own     -
Bernoulli, Random*Like             every axis                                                -
BiasGelu, FastGelu, QuickGelu,     every axis, under broadcasting                            axes that are repeated
  Gelu, BiasAdd, BitShift
FusedConv, FusedGemm, FusedMatMul  like the operator without Fused                           like it

Operators in no table pin what they touch, NonZero, NonMaxSuppression, Unique and MaxUnpool among them: what they make
depends on numbers, or counts through all channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analyses.channels.node_view import NodeView
from graphopt.analyses.channels.rules.attention import ATTENTION_CONTRIB_RULES, ATTENTION_RULES
from graphopt.analyses.channels.rules.computing import COMPUTE_RULES, Rule, broadcast, broadcast_axes
from graphopt.analyses.channels.rules.einsum import einsum
from graphopt.analyses.channels.rules.quantized import QUANTIZED_CONTRIB_RULES, QUANTIZED_RULES
from graphopt.analyses.channels.rules.recurrent import RECURRENT_CONTRIB_RULES, RECURRENT_RULES
from graphopt.analyses.channels.shape_values import AxisName

__all__ = ["CONTRIB_RULES", "OPERATOR_RULES"]


def _tile(view: NodeView) -> None:
    source, output, repeats = view.input(0), view.node.outputs[0], view.numbers(1)
    rank = view.rank(source)
    if source is None or repeats is None or rank != len(repeats):
        return
    for axis, count in enumerate(repeats):
        inside = view.atoms(source, axis)
        if count == 1:
            view.link(source, axis, output, axis)
        elif inside is not None and count > 1:
            made = view.adopt(output, axis, count * len(inside))
            if made is None or len(made) != count * len(inside):
                continue
            view.settle(source, axis)
            view.settle(output, axis)
            if len(inside) == 1:
                view.state_sizes(1, repeats, [(axis, view.span(output, axis))])
            else:
                view.tie(np.tile(inside, count), made)


def _blocks(view: NodeView) -> None:
    """DepthToSpace and SpaceToDepth: the deep axis is a table of blocks and channels."""
    to_space = view.node.op_type == "DepthToSpace"
    source, output = view.input(0), view.node.outputs[0]
    size = view.node.attributes.get_int("blocksize", 1) ** 2
    deep, flat = (source, output) if to_space else (output, source)
    if deep is None or flat is None:
        return
    view.link(source, 0, output, 0)
    known = view.atoms(source, 1)
    if known is None or (to_space and len(known) % size):
        return
    view.adopt(output, 1, len(known) // size if to_space else len(known) * size)
    channels, stacked = view.atoms(flat, 1), view.atoms(deep, 1)
    if channels is None or stacked is None or len(stacked) != size * len(channels):
        return
    together = to_space and view.node.attributes.get_string("mode", "DCR") == "CRD"
    view.tie(np.repeat(channels, size) if together else np.tile(channels, size), stacked)
    view.settle(deep, 1)
    view.settle(flat, 1)


def _group_normalization(view: NodeView) -> None:
    source, output = view.input(0), view.node.outputs[0]
    contrib = view.node.domain == "com.microsoft"
    name = "groups" if contrib else "num_groups"
    groups = view.node.attributes.get_int(name, 1)
    axis = -1 if contrib and view.node.attributes.get_int("channels_last", 1) else 1
    channels, parameters = view.atoms(source, axis), [view.input(1), view.input(2)]
    view.link(source, 0, output, 0)
    if source is None or channels is None or len(channels) % groups or not view.link(source, axis, output, axis):
        return
    size = len(channels) // groups
    leaders = channels.reshape(groups, size)[:, 0]
    view.tie(np.repeat(leaders, size), channels)
    view.call(leaders, "groups")
    view.state_sizes(name, (groups,), [(0, view.span(output, axis, unit=size))], scalar=True)
    for i, value in enumerate(parameters):
        own = view.atoms(value, 0)
        if value is not None and own is not None and len(own) in (groups, len(channels)):
            view.role(value, 0, "other" if i else "scale")
            view.tie(np.repeat(leaders, len(own) // groups), own)
            view.settle(value, 0)


def _beside(axes_of: Callable[[NodeView, int], Sequence[int] | None]) -> Rule:
    """Rule of operators that leave all axes but some as they are.

    Args:
        axes_of: From a node and the rank of its input, the axes that it works along; None where that is not known.
    """

    def rule(view: NodeView) -> None:
        source = view.input(0)
        rank = view.rank(source)
        axes = None if not rank else axes_of(view, rank)
        if rank is None or axes is None:
            return
        theirs = {axis % rank for axis in axes}
        for axis in set(range(rank)) - theirs:
            for made in view.node.outputs:
                view.link(source, axis, made, axis)

    return rule


def _attribute(name: str, default: int) -> Callable[[NodeView, int], Sequence[int]]:
    return lambda view, rank: (view.node.attributes.get_int(name, default),)  # noqa: ARG005


def _listed(name: str, default: Sequence[int] | None) -> Callable[[NodeView, int], Sequence[int] | None]:
    return lambda view, rank: view.node.attributes.get_ints(name, default or range(rank))


def _input_axis(view: NodeView, rank: int) -> Sequence[int] | None:  # noqa: ARG001
    return view.numbers(1)


def _compress_axis(view: NodeView, rank: int) -> Sequence[int] | None:  # noqa: ARG001
    return (view.node.attributes.get_int("axis", 0),) if "axis" in view.node.attributes else None


def _dft_axes(view: NodeView, rank: int) -> Sequence[int] | None:
    axis = (view.node.attributes.get_int("axis", 1),) if view.opset < 20 else (-2,)
    stated = view.numbers(2) if view.input(2) is not None else axis
    return None if stated is None else (*stated, rank - 1)


def _lp_normalization(view: NodeView) -> None:
    """A norm over an axis: channels that are zero add nothing to it."""
    source, output = view.input(0), view.node.outputs[0]
    rank = view.rank(source)
    if not rank:
        return
    own = view.node.attributes.get_int("axis", -1) % rank
    for axis in range(rank):
        if axis != own or view.is_zero(source):
            view.link(source, axis, output, axis)


def _elements(view: NodeView) -> None:
    """GatherElements and ScatterElements: indices are positions along one axis."""
    source, index, output = view.input(0), view.input(1), view.node.outputs[0]
    rank = view.rank(source)
    if not rank:
        return
    own = view.node.attributes.get_int("axis", 0) % rank
    scatter = view.node.op_type != "GatherElements"
    for axis in range(rank):
        if axis == own:
            view.link(index, axis, view.input(2) if scatter else output, axis)
        elif (same := _same_length(view, source, index, axis)) or scatter:
            view.link(source, axis, output, axis)
            for value in (index, view.input(2) if scatter else None):
                if same:
                    view.link(source, axis, value, axis)
            if not same:
                view.maps.pin(view.atoms(source, axis), view.reason)


def _same_length(view: NodeView, a: ir.Value | None, b: ir.Value | None, axis: int) -> bool:
    left, right = view.atoms(a, axis), view.atoms(b, axis)
    return left is not None and right is not None and len(left) == len(right)


def _nd(view: NodeView) -> None:
    """GatherND and ScatterND: the last axis of the indices holds positions on the first axes."""
    source, index, output = view.input(0), view.input(1), view.node.outputs[0]
    rank, index_rank, depth = view.rank(source), view.rank(index), view.atoms(index, -1)
    if rank is None or index_rank is None or depth is None:
        return
    scatter = view.node.op_type == "ScatterND"
    batch = 0 if scatter else view.node.attributes.get_int("batch_dims", 0)
    picked = output if not scatter else view.input(2)
    for axis in range(batch):
        view.link(source, axis, output, axis)
    for axis in range(index_rank - 1):
        view.link(index, axis, picked, axis)
    for axis in range(batch + len(depth), rank):
        view.link(source, axis, picked, index_rank - 1 + axis - batch - len(depth))
        if scatter:
            view.link(source, axis, output, axis)


def _one_hot(view: NodeView) -> None:
    index, output = view.input(0), view.node.outputs[0]
    rank = view.rank(index)
    if rank is None:
        return
    own = view.node.attributes.get_int("axis", -1) % (rank + 1)
    for axis in range(rank):
        view.link(index, axis, output, axis if axis < own else axis + 1)


def _sampled(view: NodeView) -> None:
    """Operators that read pixels of each channel at positions that another input states."""
    source, output = view.input(0), view.node.outputs[0]
    if view.node.op_type == "GridSample":
        view.link(source, 0, output, 0)
        view.link(view.input(1), 0, output, 0)
    else:
        for value in (view.input(1), view.input(2)):
            view.link(value, 0, output, 0)
    view.link(source, 1, output, 1)


def _deform_conv(view: NodeView) -> None:
    if view.node.attributes.get_int("offset_group", 1) == 1:
        COMPUTE_RULES["Conv"](view.with_inputs(0, 1, 3))


def _col2im(view: NodeView) -> None:
    """A channel of the image is a patch of channels before."""
    source, output, patch = view.input(0), view.node.outputs[0], view.numbers(2)
    stacked = view.atoms(source, 1)
    if source is None or patch is None or stacked is None:
        return
    view.link(source, 0, output, 0)
    size = math.prod(patch)
    made = view.adopt(output, 1, len(stacked) // size)
    if made is not None and len(made) * size == len(stacked):
        view.tie(np.repeat(made, size), stacked)
        view.settle(source, 1)
        view.settle(output, 1)


def _constant_of_shape(view: NodeView) -> None:
    output, content = view.node.outputs[0], view.content(0)
    if content is None:
        return
    entries = list(content.reshape(-1))
    literal = all(entry.number is not None and not entry.reads for entry in entries)
    for axis, entry in enumerate(entries):
        made = view.atoms(output, axis)
        if literal and made is not None and isinstance(entry.number, int) and len(made) == entry.number:
            view.settle(output, axis)
            view.state_sizes(0, [int(e.number) for e in entries], [(axis, view.span(output, axis))])
            continue
        name: AxisName | None = entry.axis
        read = None if name is None else view.maps.axes[name[0]][name[1]]
        if read is not None and made is not None and len(read) == len(made):
            view.tie(read, made)
            view.settle(output, axis)
        else:
            view.maps.pin_axes(entry.reads, view.reason)


def _fused_conv(view: NodeView) -> None:
    """Conv, a tensor that is added, and an activation."""
    COMPUTE_RULES["Conv"](view)
    for axis in (0, 1):
        view.link(view.input(3), axis, view.node.outputs[0], axis)


def _fused_matmul(view: NodeView) -> None:
    left, right, output = view.input(0), view.input(1), view.node.outputs[0]
    attributes = view.node.attributes
    ranks = view.rank(left), view.rank(right)
    if any(attributes.get_int(name, 0) for name in ("transBatchA", "transBatchB")) or left is right:
        return
    if left is None or right is None or None in ranks or min(rank or 0 for rank in ranks) < 2:
        return
    row, inner = (-1, -2) if attributes.get_int("transA", 0) else (-2, -1)
    depth, column = (-1, -2) if attributes.get_int("transB", 0) else (-2, -1)
    constant = view.maps.origin(right) is not None
    if constant:
        view.role(right, column, "output")
        view.role(right, depth, "input")
    if constant or view.maps.origin(left) is not None or view.is_zero(left) or view.is_zero(right):
        view.link(left, inner, right, depth)
    view.link(left, row, output, -2)
    view.link(right, column, output, -1)
    broadcast_axes(view, [value for value in (left, right) if (view.rank(value) or 0) > 2], output, 2)


def _like(view: NodeView) -> None:
    """Operators that take nothing but the shape of their input, or one number per entry."""
    for axis in range(view.rank(view.input(0)) or 0):
        view.link(view.input(0), axis, view.node.outputs[0], axis)


OPERATOR_RULES: dict[str, Rule] = {
    **QUANTIZED_RULES,
    **RECURRENT_RULES,
    **ATTENTION_RULES,
    "Einsum": einsum,
    "Tile": _tile,
    "DepthToSpace": _blocks,
    "SpaceToDepth": _blocks,
    "GroupNormalization": _group_normalization,
    "LpNormalization": _lp_normalization,
    "LRN": _beside(lambda view, rank: (1,)),  # noqa: ARG005
    "CumSum": _beside(_input_axis),
    "CumProd": _beside(_input_axis),
    "TopK": _beside(_attribute("axis", -1)),
    "Compress": _beside(_compress_axis),
    "Trilu": _beside(lambda view, rank: (rank - 2, rank - 1)),  # noqa: ARG005
    "ReverseSequence": _beside(_attribute("time_axis", 0)),
    "DFT": _beside(_dft_axes),
    "TensorScatter": _beside(_attribute("axis", -2)),
    "CenterCropPad": _beside(_listed("axes", None)),
    "MeanVarianceNormalization": _beside(_listed("axes", (0, 2, 3))),
    "GatherElements": _elements,
    "ScatterElements": _elements,
    "Scatter": _elements,
    "GatherND": _nd,
    "ScatterND": _nd,
    "OneHot": _one_hot,
    "GridSample": _sampled,
    "RoiAlign": _sampled,
    "MaxRoiPool": _sampled,
    "DeformConv": _deform_conv,
    "Col2Im": _col2im,
    "ConstantOfShape": _constant_of_shape,
    "BitShift": broadcast,
    **dict.fromkeys(("Bernoulli", "RandomNormalLike", "RandomUniformLike"), _like),
}

CONTRIB_RULES: dict[tuple[str, str], Rule] = {
    **QUANTIZED_CONTRIB_RULES,
    **RECURRENT_CONTRIB_RULES,
    **ATTENTION_CONTRIB_RULES,
    **{("com.microsoft", name): broadcast for name in ("BiasGelu", "FastGelu", "Gelu", "QuickGelu", "BiasAdd")},
    ("com.microsoft", "FusedConv"): _fused_conv,
    ("com.microsoft", "FusedGemm"): COMPUTE_RULES["Gemm"],
    ("com.microsoft", "FusedMatMul"): _fused_matmul,
    ("com.microsoft", "TransposeMatMul"): _fused_matmul,
    ("com.microsoft", "GroupNorm"): _group_normalization,
    ("com.microsoft", "GridSample"): _sampled,
}
