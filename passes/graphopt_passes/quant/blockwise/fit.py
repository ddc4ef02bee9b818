"""Choose codes for the weights of a layer, by data where there is any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from graphopt.analyses import LayerMoments
from graphopt_passes.quant._maths import decibel
from graphopt_passes.quant.blockwise._grids import Blocks, Fit, GridRule, round_matrix
from graphopt_passes.quant.blockwise._rounding import damped, output_error, refine, round_gptq
from graphopt_passes.quant.blockwise.layout import Layout

__all__ = ["Algorithm", "Method", "Rounded", "needs_data", "round_weight"]

Array = np.ndarray[Any, np.dtype[Any]]
Algorithm = Literal["auto", "rtn", "gptq", "awq", "hqq"]

_NOISE_ROWS = 1 << 22


@dataclass(frozen=True)
class Method:
    """How weights are rounded.

    Attributes:
        bits: 2, 4 or 8.
        group_size: Inputs with one scale; 0: all.
        symmetric: Zero points are fixed in the middle.
        algorithm: rtn: nearest codes in the range of each group. hqq, gptq, awq: see `_grids`, `_rounding`,
            `_scaling`. auto: gptq with data; without, the grids of least squares error.
        damping: Share of the mean diagonal of moments that gptq adds to it.
        act_order: gptq rounds inputs with large moments first.
    """

    bits: Literal[8, 4, 2]
    group_size: int = 32
    symmetric: bool = False
    algorithm: Algorithm = "auto"
    damping: float = 0.05
    act_order: bool = True

    def rule(self, inputs: int, *, data: bool = False) -> GridRule:
        """The grid of a matrix with so many inputs, fitted with data or without.

        A group larger than the matrix keeps its size: ONNX Runtime knows 128, but not 100.
        """
        fits: dict[Algorithm, Fit] = {"rtn": "minmax", "hqq": "hqq"}
        fit = fits.get(self.algorithm, "mse")
        return GridRule(self.bits, self.group_size or inputs, self.symmetric, "mse" if data else fit)


@dataclass(frozen=True, eq=False)
class Rounded:
    """A rounded weight.

    Attributes:
        blocks: Its codes.
        how: What found them, for reports.
        weight_sqnr: Signal to noise of the weight in dB.
        layer_sqnr: Signal to noise of the layer's output under the moments of its input, in dB; None without data.
    """

    blocks: Blocks
    how: str
    weight_sqnr: float
    layer_sqnr: float | None = None


def needs_data(algorithm: Algorithm) -> bool:
    """Whether an algorithm is nothing without data."""
    return algorithm in ("gptq", "awq")


def round_weight(weight: Array, layout: Layout, method: Method, moments: LayerMoments | None) -> Rounded:
    """Round one weight.

    Args:
        weight: The weight in its own shape, float32; may be memory-mapped.
        layout: How it is a matrix.
        method: How to round it.
        moments: Moments of what the layer reads, in the order of the matrix; None: unknown.
    """
    matrix = layout.matrix(weight)
    if moments is None or method.algorithm in ("rtn", "hqq") or not _fits(moments, layout):
        blocks, how = round_matrix(matrix, method.rule(layout.inputs)), _plain_name(method.algorithm)
    elif moments.xx is None or method.algorithm == "awq":
        importance = (moments.squares / max(1, moments.rows)).mean(axis=0)
        blocks = round_matrix(matrix, method.rule(layout.inputs, data=True), importance)
        how = "least squares weighted by data"
    else:
        parts = np.split(matrix, len(moments.xx), axis=1)
        found = [
            _by_moments(part, xx / max(1, moments.rows), method) for part, xx in zip(parts, moments.xx, strict=True)
        ]
        blocks, how = found[0] if len(found) == 1 else _joined(found), "gptq"
    return Rounded(blocks, how, _weight_sqnr(matrix, blocks), _layer_sqnr(matrix, blocks, moments, layout))


def _plain_name(algorithm: Algorithm) -> str:
    return algorithm if algorithm in ("rtn", "hqq") else "least squares"


def _fits(moments: LayerMoments, layout: Layout) -> bool:
    """The moments are those of the matrix's inputs, and say something finite."""
    parts, inputs = moments.squares.shape
    return inputs == layout.inputs and layout.outputs % parts == 0 and moments.finite and moments.rows > 0


def _by_moments(matrix: Array, h: Array, method: Method) -> Blocks:
    rule, h = method.rule(len(matrix), data=True), damped(h, method.damping)
    return refine(matrix, round_gptq(matrix, h, rule, act_order=method.act_order), h, rule)


def _joined(parts: list[Blocks]) -> Blocks:
    codes, scales, zeros = (
        np.concatenate([getattr(part, name) for part in parts], axis=1) for name in ("codes", "scales", "zeros")
    )
    return Blocks(codes, scales, zeros, parts[0].rule)


def _weight_sqnr(matrix: Array, blocks: Blocks) -> float:
    signal = noise = 0.0
    step = blocks.group * max(1, _NOISE_ROWS // (blocks.group * matrix.shape[1]))
    for start in range(0, len(matrix), step):
        stop = min(start + step, len(matrix))
        rows = np.ascontiguousarray(matrix[start:stop], np.float32)
        difference = rows - blocks.rows(start, stop)
        signal += float(np.vdot(rows, rows))
        noise += float(np.vdot(difference, difference))
    return decibel(signal, noise)


def _layer_sqnr(matrix: Array, blocks: Blocks, moments: LayerMoments | None, layout: Layout) -> float | None:
    if moments is None or moments.xx is None or not _fits(moments, layout):
        return None
    signal = noise = 0.0
    width = matrix.shape[1] // len(moments.xx)
    for i, xx in enumerate(moments.xx):
        part, h = slice(i * width, (i + 1) * width), xx.astype(np.float32) / np.float32(max(1, moments.rows))
        wide = np.asarray(matrix[:, part], np.float32)
        signal += output_error(wide, h)
        noise += output_error(wide - blocks.outputs(part).real(), h)
    return decibel(signal, max(0.0, noise))
