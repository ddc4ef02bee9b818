"""Resize and Upsample: which pixels each pixel of the result is made of (ONNX operator Resize, opset 10 to 19).

GridSample, whose pixels are only known when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from graphopt_backends._fold import is_constant, static_shape
from graphopt_backends.kernels.resample import Resample
from graphopt_backends.kernels.sample import Sample
from graphopt_backends.network.linear import channels_last, image_order
from graphopt_backends.network.network import Network, constant_of, shape_of
from graphopt_backends.network.regions import Region

__all__ = ["CHECKS", "CONVERTERS", "taps_of"]

_MODES = ("nearest", "linear", "cubic")
_ROUND: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "ceil": np.ceil,
    "floor": np.floor,
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
}


def taps_of(
    mode: str, coordinates: str, size: int, result: int, scale: float, *, rounding: str, cubic: float, outside: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Positions and weights of the pixels along one axis that make each pixel of the result.

    Args:
        mode: nearest, linear or cubic.
        coordinates: How a pixel of the result is found in the image (`coordinate_transformation_mode`).
        size: Pixels of the image.
        result: Pixels of the result.
        scale: Of the axis, as given or from the sizes.
        rounding: `nearest_mode`.
        cubic: `cubic_coeff_a`.
        outside: `exclude_outside`.

    Returns:
        Positions [result, taps] and weights [result, taps].
    """
    x = np.arange(result, dtype=np.float64)
    if coordinates == "asymmetric":
        place = x / scale
    elif coordinates == "align_corners":
        place = x * (size - 1) / (result - 1) if result > 1 else np.zeros(1)
    elif coordinates == "pytorch_half_pixel" and result == 1:
        place = np.zeros(1)
    elif coordinates == "half_pixel_symmetric":
        adjusted = result / (scale * size)
        place = size / 2 * (1 - adjusted) + (x + 0.5) / scale - 0.5
    else:
        place = (x + 0.5) / scale - 0.5
    if mode == "nearest":
        nearest = np.clip(_ROUND[rounding](place), 0, size - 1)
        return nearest.astype(np.int32)[:, None], np.ones((result, 1), np.float32)
    count = 2 if mode == "linear" else 4
    first = np.floor(place) - (count // 2 - 1)
    positions = first[:, None] + np.arange(count)
    distance = np.abs(place[:, None] - positions)
    weights = 1 - distance if mode == "linear" else _cubic(distance, cubic)
    if outside and mode == "cubic":
        weights = np.where((positions < 0) | (positions >= size), 0, weights)
        weights /= weights.sum(1, keepdims=True)
    return np.clip(positions, 0, size - 1).astype(np.int32), weights.astype(np.float32)


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' convolution kernel (1981)."""
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0))


def _resize(network: Network, node: ir.Node, _: Region | None) -> None:
    value = node.inputs[0]
    assert value is not None
    source, pitch = channels_last(network, network.view(value), node)
    shape = shape_of(node.outputs[0])
    mode = node.attributes.get_string("mode", "nearest")
    usual = "half_pixel" if node.op_type == "Resize" and len(node.inputs) > 2 else "asymmetric"
    coordinates = node.attributes.get_string("coordinate_transformation_mode", usual)
    rounding = node.attributes.get_string("nearest_mode", "round_prefer_floor" if usual == "half_pixel" else "floor")
    scales = _scales(node, source.shape, shape)
    tables = [
        taps_of(
            mode, coordinates, source.shape[axis], shape[axis], scales[axis], rounding=rounding,
            cubic=node.attributes.get_float("cubic_coeff_a", -0.75),
            outside=bool(node.attributes.get_int("exclude_outside", 0)),
        )
        for axis in range(2, source.rank)
    ]  # fmt: skip
    if source.rank == 3:
        tables.insert(0, (np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32)))
    sizes = [(1, *s) if len(s) == 1 else s for s in (source.shape[2:], shape[2:])]
    (rows, row_weights), (columns, column_weights) = tables
    kernel = Resample(
        network.isa, source.dtype, source.shape[0], (sizes[0][0], sizes[0][1]), source.shape[1],
        (sizes[1][0], sizes[1][1]), (rows.shape[1], columns.shape[1]), pitch,
    )  # fmt: skip
    weights = [] if kernel.taps == (1, 1) else [network.constant(row_weights), network.constant(column_weights)]
    result = network.new(node.outputs[0], image_order(source.rank))
    network.call(kernel, [source, network.constant(rows), network.constant(columns), *weights, result], node)


def _scales(node: ir.Node, source: tuple[int, ...], result: tuple[int, ...]) -> list[float]:
    """Scales as they were given; from the sizes where those were."""
    index = 1 if node.op_type == "Upsample" or len(node.inputs) == 2 else 2
    value = node.inputs[index] if len(node.inputs) > index else None
    given = constant_of(value).reshape(-1) if value is not None and is_constant(value) else np.zeros(0)
    if len(given) == len(source):
        return [float(scale) for scale in given]
    return [after / before for before, after in zip(source, result, strict=True)]


def _check(node: ir.Node) -> bool:
    value = node.inputs[0]
    if value is None or len(shape_of(value)) not in (3, 4) or shape_of(value)[:2] != shape_of(node.outputs[0])[:2]:
        return False
    mode = node.attributes.get_string("mode", "nearest")
    plain = mode in _MODES and not node.attributes.get_int("antialias", 0) and "axes" not in node.attributes
    coordinates = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    return plain and coordinates != "tf_crop_and_resize" and (mode == "nearest" or value.dtype == ir.DataType.FLOAT)


def _sample(network: Network, node: ir.Node, _: Region | None) -> None:
    source, pitch = channels_last(network, network.input(node), node)
    grid, output = network.contiguous(network.input(node, 1), node), node.outputs[0]
    batch, channels, height, width = source.shape
    shape = shape_of(output)
    kernel = Sample(
        network.isa, batch, (height, width), channels, (shape[2], shape[3]),
        node.attributes.get_string("mode", "linear") in _LINEAR,
        node.attributes.get_string("padding_mode", "zeros") == "border",
        bool(node.attributes.get_int("align_corners", 0)), pitch,
    )  # fmt: skip
    network.call(kernel, [source, grid, network.new(output, image_order(4))], node)


_LINEAR = ("linear", "bilinear")


def _sample_check(node: ir.Node) -> bool:
    return (
        node.outputs[0].dtype == ir.DataType.FLOAT and static_shape(node.outputs[0]) is not None
        and all(value is not None and len(static_shape(value) or ()) == 4 for value in node.inputs)
        and node.attributes.get_string("mode", "linear") in (*_LINEAR, "nearest")
        and node.attributes.get_string("padding_mode", "zeros") in ("zeros", "border")
    )  # fmt: skip


CONVERTERS: Mapping[str, Callable[[Network, ir.Node, Region | None], None]] = {
    "GridSample": _sample,
    "Resize": _resize,
    "Upsample": _resize,
}

CHECKS: Mapping[str, Callable[[ir.Node], bool]] = {"GridSample": _sample_check, "Resize": _check, "Upsample": _check}
