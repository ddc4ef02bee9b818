"""How factors of channels pass through operators that move, pick, repeat or sum elements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from graphopt.analyses.channels.partition import Indices
from graphopt_passes.quant.adjust.scales import Refused, Rule, View

__all__ = ["MOVE_RULES"]


def _transpose(view: View) -> Sequence[Indices]:
    atoms = view.atoms(0)
    order = view.node.attributes.get_ints("perm", tuple(reversed(range(atoms.ndim))))
    return (atoms.transpose(tuple(order)),)


def _unsqueeze(view: View) -> Sequence[Indices]:
    atoms, axes = view.atoms(0), view.integers(1, "axes") or ()
    rank = atoms.ndim + len(axes)
    return (np.expand_dims(atoms, tuple(axis % rank for axis in axes)),)


def _squeeze(view: View) -> Sequence[Indices]:
    atoms, axes = view.atoms(0), view.integers(1, "axes")
    if axes is None:
        raise Refused("it drops every axis of one")
    return (_without(atoms, axes),)


def _without(atoms: Indices, axes: Sequence[int]) -> Indices:
    if any(atoms.shape[axis] != 1 for axis in axes):
        raise Refused("the channels are on an axis that it drops")
    return np.squeeze(atoms, tuple(axis % atoms.ndim for axis in axes))


def _reshape(view: View) -> Sequence[Indices]:
    """A Reshape that keeps apart what differs: behind some axis, the same number of elements in and out.

    Sizes before that axis may be dynamic. What the channels are on lies behind it.
    """
    atoms, output = view.atoms(0), view.node.outputs[0]
    before, after = view.shapes.of(view.node.inputs[0]), view.shapes.of(output)
    if before is None or after is None:
        raise Refused("its shapes are unknown")
    if atoms.size == 1:
        return (atoms.reshape((1,) * len(after)),)
    first = next(axis for axis, size in enumerate(atoms.shape) if size != 1)
    inner = [size for size in before[first:] if isinstance(size, int)]
    if len(inner) != len(before) - first:
        raise Refused("its sizes behind the channels are dynamic")
    count, kept, rest = math.prod(inner), len(after), 1
    while kept and rest < count:
        kept -= 1
        size = after[kept]
        if not isinstance(size, int):
            raise Refused("its sizes behind the channels are dynamic")
        rest *= size
    if rest != count:
        raise Refused("it mixes channels with other axes")
    whole = np.broadcast_to(atoms.reshape(atoms.shape[first:]), inner)
    sizes = [int(size) for size in after[kept:] if isinstance(size, int)]
    return (_narrow(whole.reshape((1,) * kept + tuple(sizes))),)


def _narrow(atoms: Indices) -> Indices:
    """Give axes along which nothing differs the length one."""
    for axis in range(atoms.ndim):
        start = atoms.take([0], axis)
        if (atoms == start).all():
            atoms = start
    return atoms


def _concat(view: View) -> Sequence[Indices]:
    node = view.node
    parts, axis = [view.atoms(i) for i in range(len(node.inputs))], node.attributes.get_int("axis", 0)
    rank = parts[0].ndim
    axis %= rank
    whole = parts[0].take([0], axis)
    for part in parts[1:]:
        if any(a != b for i, (a, b) in enumerate(zip(part.shape, parts[0].shape, strict=True)) if i != axis):
            whole = _all_alike(view, parts)
            return (whole,)
    if all(part.shape[axis] == 1 for part in parts) and len({part.tobytes() for part in parts}) == 1:
        return (parts[0],)
    sized: list[Indices] = []
    for value, part in zip(node.inputs, parts, strict=True):
        size = (view.shapes.of(value) or (None,) * rank)[axis]
        if not isinstance(size, int):
            return (_all_alike(view, parts),)
        sized.append(np.repeat(part, size, axis) if part.shape[axis] == 1 else part)
    return (_narrow(np.concatenate(sized, axis)),)


def _all_alike(view: View, parts: Sequence[Indices]) -> Indices:
    """Parts along a dynamic axis, such as a cache of keys and the newest one: they share their factors."""
    whole = parts[0]
    for part in parts[1:]:
        whole = view.scales.unite(whole, part)
    return whole


def _split(view: View) -> Sequence[Indices]:
    atoms, node = view.atoms(0), view.node
    axis = node.attributes.get_int("axis", 0) % atoms.ndim
    if atoms.shape[axis] == 1:
        return [atoms] * len(node.outputs)
    sizes = [(view.shapes.of(output) or (None,) * atoms.ndim)[axis] for output in node.outputs]
    known = [size for size in sizes if isinstance(size, int)]
    if len(known) != len(sizes) or sum(known) != atoms.shape[axis]:
        raise Refused("the sizes of its parts are unknown")
    return np.split(atoms, np.cumsum(known)[:-1].tolist(), axis)


def _slice(view: View) -> Sequence[Indices]:
    atoms = view.atoms(0)
    starts, ends = view.integers(1, "starts"), view.integers(2, "ends")
    axes, steps = view.integers(3, "axes"), view.integers(4, "steps")
    if starts is None or ends is None:
        raise Refused("what it keeps is computed")
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis, step = axes[i] if axes else i, steps[i] if steps else 1
        if atoms.shape[axis] != 1:
            end = None if step < 0 and end < -atoms.shape[axis] else end
            atoms = np.moveaxis(np.moveaxis(atoms, axis, 0)[start:end:step], 0, axis)
    return (atoms,)


def _gather(view: View) -> Sequence[Indices]:
    atoms = view.atoms(0)
    axis = view.node.attributes.get_int("axis", 0) % max(1, atoms.ndim)
    rank = view.shapes.rank(view.node.inputs[1])
    if rank is None or atoms.shape[axis] != 1:
        raise Refused("it picks channels")
    return (atoms.reshape(atoms.shape[:axis] + (1,) * rank + atoms.shape[axis + 1 :]),)


def _reduce(view: View) -> Sequence[Indices]:
    atoms, axes = view.atoms(0), view.integers(1, "axes")
    if not axes:
        raise Refused("it reduces every axis")
    if any(atoms.shape[axis] != 1 for axis in axes):
        raise Refused("it sums over channels")
    return (atoms if view.node.attributes.get_int("keepdims", 1) else _without(atoms, axes),)


def _pad(view: View) -> Sequence[Indices]:
    """Padding with zeros, or with what is there; channels of zeros beside the others take any factor."""
    atoms, node = view.atoms(0), view.node
    if node.attributes.get_string("mode", "constant") == "constant":
        fill = view.constant(2)
        if node.attributes.get_float("value", 0.0) or (fill is not None and fill.numpy().any()):
            raise Refused("it pads with another number than zero")
        if view.given(2) and fill is None:
            raise Refused("it pads with a computed number")
    pads = view.integers(1, "pads")
    if pads is None:
        raise Refused("its pads are unknown")
    axes = view.integers(3, "axes") or tuple(range(atoms.ndim))
    for i, axis in enumerate(axes):
        if atoms.shape[axis] != 1 and (pads[i] or pads[i + len(axes)]):
            if node.attributes.get_string("mode", "constant") != "constant" or min(pads[i], pads[i + len(axes)]) < 0:
                raise Refused("it repeats or drops channels")
            atoms = np.concatenate(
                [_zeros(view, atoms, axis, pads[i]), atoms, _zeros(view, atoms, axis, pads[i + len(axes)])], axis
            )
    return (atoms,)


def _zeros(view: View, atoms: Indices, axis: int, count: int) -> Indices:
    """Atoms of channels that are zero, which any factor leaves as they are."""
    if any(size != 1 for i, size in enumerate(atoms.shape) if i != axis % atoms.ndim):
        raise Refused("its input has channels on another axis")
    shape = list(atoms.shape)
    shape[axis] = count
    return view.scales.partition.new(count).reshape(shape)


def _resize(view: View) -> Sequence[Indices]:
    atoms, attributes = view.atoms(0), view.node.attributes
    if attributes.get_string("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        raise Refused("it fills in another number")
    if any(size != 1 for axis, size in enumerate(atoms.shape) if axis != 1):
        raise Refused("its input has channels on another axis")
    sizes = view.shapes.of(view.node.outputs[0])
    if atoms.size > 1 and (sizes is None or sizes[1] != atoms.shape[1]):
        raise Refused("it may resize the channels")
    return (atoms,)


def _expand(view: View) -> Sequence[Indices]:
    atoms, rank = view.atoms(0), view.shapes.rank(view.node.outputs[0])
    if rank is None:
        raise Refused("the rank of its result is unknown")
    return (atoms.reshape((1,) * (rank - atoms.ndim) + atoms.shape),)


MOVE_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"), _reduce),
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    "Concat": _concat,
    "Expand": _expand,
    "Flatten": _reshape,
    "Gather": _gather,
    "Pad": _pad,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
"""Rules of standard operators."""
