"""How factors of channels pass through operators: layers that make and read channels, and arithmetic.

role        operators                                             factors
layer       Conv, ConvTranspose, Gemm, MatMul                     read on the inputs, made on the outputs
norm        LayerNormalization, RMSNormalization, ...             made by scale and bias; the input is fixed
affine      BatchNormalization, Mul and Div by one number a channel   read and made, like a depthwise layer
recurrent   GRU, LSTM, RNN                                        read by the input weights
same        Relu, LeakyRelu, PRelu, Clip from zero, pooling, ...  f(s x) = s f(x) for positive s
joint       Add, Sub, Sum                                         all operands have the same; constants follow
product     Mul, Div, MatMul of two activations                   those of one operand, the other one is fixed
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from graphopt.analyses.channels.partition import Indices
from graphopt_passes.quant.adjust.moves import MOVE_RULES
from graphopt_passes.quant.adjust.scales import Refused, Rule, View

__all__ = ["CONTRIB_RULES", "RULES"]

_INFINITE = 3e38


def _same(view: View) -> Sequence[Indices]:
    return (view.atoms(0),)


def _clip(view: View) -> Sequence[Indices]:
    """A Clip that is a Relu, or nothing."""
    bounds: list[float | None] = []
    for index, word in ((1, "min"), (2, "max")):
        tensor = view.constant(index)
        if word in view.node.attributes:
            bounds.append(view.node.attributes.get_float(word, 0.0))
        elif view.given(index) and tensor is None:
            raise Refused("its bounds are computed")
        else:
            bounds.append(None if tensor is None else float(tensor.numpy().reshape(-1)[0]))
    low, high = bounds
    if (low not in (None, 0.0) and low > -_INFINITE) or (high is not None and high < _INFINITE):  # type: ignore[operator]
        raise Refused("its bounds would have to move with the channels")
    return (view.atoms(0),)


def _pool(view: View) -> Sequence[Indices]:
    return (_images(view),)


def _images(view: View) -> Indices:
    """Atoms of an input whose channels are on axis 1 only."""
    atoms = view.atoms(0)
    view.only_on(atoms, 1)
    return atoms


def _joint(view: View) -> Sequence[Indices]:
    """Operands with the same factors; what a constant adds is scaled with them."""
    computed = [i for i in range(len(view.node.inputs)) if view.constant(i) is None]
    if not computed:
        raise Refused("all operands are constant")
    atoms = view.atoms(computed[0])
    for index in computed[1:]:
        atoms = view.scales.unite(atoms, view.atoms(index))
    for index in sorted(set(range(len(view.node.inputs))) - set(computed)):
        tensor = view.constant(index)
        if tensor is None:
            continue
        if tensor.size == 1 and not tensor.numpy().any():
            continue
        rank = len(tensor.shape)
        if rank > atoms.ndim:
            atoms = atoms.reshape((1,) * (rank - atoms.ndim) + atoms.shape)
        view.follow(index, made=_fitting(atoms, rank))
    return (atoms,)


def _fitting(atoms: Indices, rank: int) -> Indices:
    """Atoms without the leading axes of one that a constant of that rank lacks."""
    extra = atoms.ndim - rank
    return atoms.reshape(atoms.shape[extra:]) if extra > 0 and set(atoms.shape[:extra]) <= {1} else atoms


def _product(view: View) -> Sequence[Indices]:
    constants = [i for i in (0, 1) if view.constant(i) is not None]
    if len(constants) == 2:
        raise Refused("both operands are constant")
    if constants:
        return _by_constant(view, constants[0])
    left, right = view.atoms(0), view.atoms(1)
    if not view.scales.free(left).any() and view.node.op_type == "Mul":
        left, right = right, left
    _fix(view, right)
    return (_stretched(left, right),)


def _stretched(atoms: Indices, other: Indices) -> Indices:
    rank = max(atoms.ndim, other.ndim)
    return atoms.reshape((1,) * (rank - atoms.ndim) + atoms.shape)


def _fix(view: View, atoms: Indices) -> None:
    if view.scales.free(atoms).any():
        view.scales.pin(atoms, f"{view.label} multiplies two activations")


def _by_constant(view: View, index: int) -> Sequence[Indices]:
    """One number for each channel is a depthwise layer; another constant leaves the factors as they are."""
    if view.node.op_type == "Div" and index == 0:
        raise Refused("divides by an activation")
    atoms, tensor = view.atoms(1 - index), view.constant(index)
    sizes = () if tensor is None else tuple(int(size) for size in tensor.shape.numpy())
    rank = max(atoms.ndim, len(sizes))
    atoms = atoms.reshape((1,) * (rank - atoms.ndim) + atoms.shape)
    shape = (1,) * (rank - len(sizes)) + sizes
    varied = [axis for axis in range(rank) if shape[axis] != 1]
    covers = all(atoms.shape[axis] in (1, shape[axis]) for axis in range(rank))
    if len(varied) != 1 or not covers or any(atoms.shape[axis] != 1 for axis in range(rank) if axis != varied[0]):
        return (atoms,)
    made = view.scales.partition.new(int(np.prod(shape))).reshape(shape)
    read, own = _fitting(atoms, len(sizes)), _fitting(made, len(sizes))
    if view.node.op_type == "Mul":
        view.follow(index, made=own, read=read)
    else:
        view.follow(index, made=read, read=own)
    return (made,)


def _conv(view: View) -> Sequence[Indices]:
    atoms, sizes = _images(view), view.weight(1)
    groups, taps = view.node.attributes.get_int("group", 1), (1,) * (len(sizes) - 2)
    outputs, inputs = sizes[:2]
    channels = np.broadcast_to(atoms.reshape(-1), (inputs * groups,)).reshape(groups, inputs)
    read = channels if groups == 1 else channels.repeat(outputs // groups, axis=0)
    made = view.scales.partition.new(outputs)
    if view.given(2):
        view.follow(2, made=made)
    view.follow(1, made=made.reshape(outputs, 1, *taps), read=read.reshape(*read.shape, *taps), layer=True)
    return (made.reshape(1, outputs, *taps),)


def _conv_transpose(view: View) -> Sequence[Indices]:
    atoms, sizes = _images(view), view.weight(1)
    groups, taps = view.node.attributes.get_int("group", 1), (1,) * (len(sizes) - 2)
    inputs, share = sizes[:2]
    made = view.scales.partition.new(groups * share)
    if view.given(2):
        view.follow(2, made=made)
    rows = made.reshape(groups, share).repeat(inputs // groups, axis=0)
    read = np.broadcast_to(atoms.reshape(-1), (inputs,)).reshape(inputs, 1, *taps)
    view.follow(1, made=rows.reshape(inputs, share, *taps), read=read, layer=True)
    return (made.reshape(1, groups * share, *taps),)


def _gemm(view: View) -> Sequence[Indices]:
    attributes, sizes = view.node.attributes, view.weight(1)
    if attributes.get_int("transA", 0):
        raise Refused("its input is transposed")
    read = view.only_on(view.atoms(0), 1)
    transposed = bool(attributes.get_int("transB", 0))
    made = view.scales.partition.new(sizes[0] if transposed else sizes[1])
    if view.given(2):
        tensor = view.constant(2)
        rank = 0 if tensor is None else len(tensor.shape)
        view.follow(2, made=made if rank < 2 else made.reshape(1, -1))
    if transposed:
        view.follow(1, made=made[:, None], read=read[None], layer=True)
    else:
        view.follow(1, made=made[None], read=read[:, None], layer=True)
    return (made.reshape(1, -1),)


def _matmul(view: View) -> Sequence[Indices]:
    if view.constant(0) is not None:
        raise Refused("its weight stands on the left")
    if view.constant(1) is None:
        return _of_activations(view)
    atoms, sizes = view.atoms(0), view.weight(1)
    if len(sizes) != 2 or atoms.ndim < 2:
        raise Refused("its weight is no matrix")
    read, made = view.only_on(atoms, -1), view.scales.partition.new(sizes[1])
    view.follow(1, made=made[None], read=read[:, None], layer=True)
    return (made.reshape((1,) * (atoms.ndim - 1) + (-1,)),)


def _of_activations(view: View) -> Sequence[Indices]:
    """Channels of the right operand, such as the values that attention weighs, are columns of the result."""
    left, right = view.atoms(0), view.atoms(1)
    if left.ndim < 2 or right.ndim < 2:
        raise Refused("multiplies vectors")
    _fix(view, left)
    if right.shape[-2] != 1:
        _fix(view, right)
        raise Refused("sums over its channels")
    return (_stretched(right, left),)


def _last_norm(view: View) -> Sequence[Indices]:
    """A normalization over the last axis with a scale, and maybe a bias, for each channel."""
    atoms = view.atoms(0)
    axis = view.node.attributes.get_int("axis", -1)
    tensor = view.constant(1)
    if axis not in (-1, atoms.ndim - 1) or tensor is None or len(tensor.shape) != 1:
        raise Refused("does not normalize the last axis by constants")
    view.scales.pin(atoms, f"{view.label} normalizes over channels")
    made = view.scales.partition.new(tensor.size)
    view.follow(1, made=made)
    if view.given(2):
        view.follow(2, made=made)
    return (made.reshape((1,) * (atoms.ndim - 1) + (-1,)),)


def _image_norm(view: View) -> Sequence[Indices]:
    """A normalization of images with scale and bias for each channel."""
    atoms, tensor = view.atoms(0), view.constant(1)
    old_groups = view.node.op_type == "GroupNormalization" and "stash_type" not in view.node.attributes
    if tensor is None or len(tensor.shape) != 1 or old_groups:
        raise Refused("has no constant scale for each channel")
    view.scales.pin(atoms, f"{view.label} normalizes its input")
    made = view.scales.partition.new(tensor.size)
    view.follow(1, made=made)
    view.follow(2, made=made)
    return (made.reshape(1, -1, *(1,) * (atoms.ndim - 2)),)


def _batch_norm(view: View) -> Sequence[Indices]:
    atoms, tensor = _images(view), view.constant(1)
    if tensor is None or view.node.attributes.get_int("training_mode", 0):
        raise Refused("is no affine map with constants")
    read, made = atoms.reshape(-1), view.scales.partition.new(tensor.size)
    view.follow(1, made=made, read=read)
    view.follow(2, made=made)
    view.follow(3, made=read)
    return (made.reshape(1, -1, *(1,) * (atoms.ndim - 2)),)


def _recurrent(view: View) -> Sequence[Indices]:
    """The input weights read; state and results are fixed."""
    read = view.only_on(view.atoms(0), -1)
    sizes = view.weight(1)
    view.follow(1, read=np.broadcast_to(read, (sizes[-1],)).reshape(1, 1, -1), layer=True)
    for value in view.node.inputs[1:]:
        if value in view.scales.values:
            view.scales.pin(view.scales.values[value], f"{view.label} keeps its state")
    return ()


RULES: Mapping[str, Rule] = {
    **MOVE_RULES,
    **dict.fromkeys(("Abs", "Dropout", "Identity", "LeakyRelu", "Neg", "PRelu", "Relu"), _same),
    **dict.fromkeys(("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"), _pool),
    **dict.fromkeys(("Add", "Sub", "Sum"), _joint),
    **dict.fromkeys(("Mul", "Div"), _product),
    **dict.fromkeys(("GRU", "LSTM", "RNN"), _recurrent),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _last_norm),
    "BatchNormalization": _batch_norm,
    "Clip": _clip,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "GroupNormalization": _image_norm,
    "InstanceNormalization": _image_norm,
    "MatMul": _matmul,
}
"""Rules of standard operators."""

CONTRIB_RULES: Mapping[str, Rule] = {"SimplifiedLayerNormalization": _last_norm}
"""Rules of ONNX Runtime's own operators."""
