"""Round a matrix so that the output of its layer changes least, given second moments of its input; plain numpy.

With `X` the rows that the layer reads and `H = X'X / rows`, a difference `D` `[inputs, outputs]` of the weights changes
the output by `tr(D' H D)` on average. `round_gptq` rounds input by input and lets those still to come make up for the
error (Frantar et al., "GPTQ", 2022). `refine` then alternates least-squares scales for the codes with coordinate
descent over the codes (Behdin et al., "QuantEase", 2023), and never makes the error larger.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from graphopt_passes.quant.blockwise._grids import Blocks, GridRule, fit_group, group_bounds, round_matrix

__all__ = ["damped", "output_error", "refine", "round_gptq"]

Array = np.ndarray[Any, np.dtype[Any]]

_LAZY = 128  # inputs whose errors reach the later ones together, in one product
_SWEEP = 64
_ROUNDS = 4
_GAIN = 0.003
_SYSTEM_BYTES = 64 << 20
_TRUST = 1e-4
_LEAST_SHARE = 0.2  # of a scale before: smaller ones come from systems that say nothing


def damped(moments: Array, damping: float) -> Array:
    """`H` with a share of its mean diagonal added, float64 `[inputs, inputs]`; all zeros become the identity."""
    h = np.array(moments, np.float64)
    diagonal = np.einsum("ii->i", h)
    mean = float(diagonal.mean())
    diagonal += damping * mean if mean > 0 else 1.0
    return h


def output_error(difference: Array, moments: Array) -> float:
    """`tr(D' H D)` of a difference `[inputs, outputs]`."""
    return float(np.vdot(difference, moments @ difference))


def round_gptq(weight: Array, h: Array, rule: GridRule, *, act_order: bool = True) -> Blocks:
    """Round a matrix input by input, and let the later inputs make up for the error of each.

    Args:
        weight: `[inputs, outputs]`.
        h: Damped moments `[inputs, inputs]`.
        rule: The grid.
        act_order: Round the inputs with the largest moments first; all grids are fitted before. False: in order, and
            each grid is fitted when its group is reached, to the weights as they are then.
    """
    inputs = len(weight)
    importance = np.einsum("ii->i", h).astype(np.float32)
    order = np.argsort(-importance, kind="stable") if act_order else np.arange(inputs)
    factor = _inverse_factor(h[np.ix_(order, order)]).astype(np.float32)
    blocks = _grids(weight, rule, importance, fitted=act_order)
    left = np.array(weight, np.float32)[order]
    for start in range(0, inputs, _LAZY):
        stop = min(start + _LAZY, inputs)
        errors = np.zeros((stop - start, left.shape[1]), np.float32)
        for j in range(start, stop):
            if not act_order and j % rule.group == 0:
                end = min(j + rule.group, inputs)
                rows = left[j:end].copy()
                if end > stop:
                    rows[stop - j :] -= factor[start:j, stop:end].T @ errors[: j - start]
                blocks.scales[j // rule.group], blocks.zeros[j // rule.group] = fit_group(rows, rule, importance[j:end])
            input_ = int(order[j])
            codes, real = _nearest(left[j], blocks, input_, rule.top)
            blocks.codes[input_] = codes
            error = (left[j] - real) / factor[j, j]
            left[j + 1 : stop] -= factor[j, j + 1 : stop, None] * error
            errors[j - start] = error
        left[stop:] -= factor[start:stop, stop:].T @ errors
    return blocks


def refine(weight: Array, blocks: Blocks, h: Array, rule: GridRule) -> Blocks:
    """Fit scales to codes and codes to scales in turn, as long as the error of the output falls.

    Args:
        weight: `[inputs, outputs]`.
        blocks: A rounding of it.
        h: Damped moments `[inputs, inputs]`.
        rule: The grid; zero points stay.
    """
    narrow = h.astype(np.float32)
    best, least = blocks, _loss(weight, blocks, narrow)
    for _ in range(_ROUNDS):
        scales = _least_squares_scales(weight, best, h)
        tried = Blocks(best.codes.copy(), scales, best.zeros, rule)
        _descend(weight, tried, narrow, rule.top)
        loss = _loss(weight, tried, narrow)
        if not loss < least:
            break
        gain, best, least = 1 - loss / least, tried, loss
        if gain < _GAIN:
            break
    return best


def _inverse_factor(h: Array) -> Array:
    """The upper triangle `U` with `U'U` the inverse of `h`: from one Cholesky factor of `h` read backwards."""
    backwards = np.linalg.cholesky(h[::-1, ::-1])
    return np.triu(np.linalg.inv(backwards[::-1, ::-1]))


def _grids(weight: Array, rule: GridRule, importance: Array, *, fitted: bool) -> Blocks:
    if fitted:
        return round_matrix(weight, rule, importance)
    shape = len(group_bounds(len(weight), rule.group)), weight.shape[1]
    return Blocks(np.empty(weight.shape, np.uint8), np.ones(shape, np.float32), np.zeros(shape, np.uint8), rule)


def _nearest(wish: Array, blocks: Blocks, input_: int, top: int) -> tuple[Array, Array]:
    """Codes nearest to wishes for the weights of one input, and the real numbers that they stand for."""
    scales, zeros = blocks.scales[input_ // blocks.group], blocks.zeros[input_ // blocks.group].astype(np.float32)
    codes = np.clip(np.rint(wish / scales) + zeros, 0, top)
    return codes, (codes - zeros) * scales


def _loss(weight: Array, blocks: Blocks, h: Array) -> float:
    difference = np.asarray(weight, np.float32) - blocks.real()
    return output_error(difference, h)


def _descend(weight: Array, blocks: Blocks, h: Array, top: int) -> None:
    """Move each code to its best place given all others, once, in order."""
    inputs = len(weight)
    real = blocks.real()
    pull = h @ (np.asarray(weight, np.float32) - real)
    for start in range(0, inputs, _SWEEP):
        stop = min(start + _SWEEP, inputs)
        moved = np.zeros((stop - start, real.shape[1]), np.float32)
        for j in range(start, stop):
            blocks.codes[j], new = _nearest(real[j] + pull[j] / h[j, j], blocks, j, top)
            step = new - real[j]
            moved[j - start] = step
            pull[start:stop] -= h[start:stop, j, None] * step
        pull[stop:] -= h[stop:, start:stop] @ moved


def _least_squares_scales(weight: Array, blocks: Blocks, h: Array) -> Array:
    """Scales that make the error of the output least for given codes, `[groups, outputs]`; never far from before."""
    groups, outputs = blocks.scales.shape
    found = np.empty_like(blocks.scales)
    chunk = max(1, _SYSTEM_BYTES // (8 * max(groups**2, len(weight))))
    narrow = h.astype(np.float32)
    for start in range(0, outputs, chunk):
        part = slice(start, min(start + chunk, outputs))
        before = blocks.scales[:, part].astype(np.float64)
        system, right = _normal_equations(weight[:, part], blocks, part, narrow)
        diagonal = np.einsum("nii->ni", system)
        trust = _TRUST * diagonal.mean(axis=1, keepdims=True) + 1e-30
        diagonal += trust
        solved = np.linalg.solve(system, (right + trust * before.T)[..., None])[..., 0].T
        found[:, part] = np.where(solved > _LEAST_SHARE * before, solved, before)
    return found


def _normal_equations(weight: Array, blocks: Blocks, part: slice, h: Array) -> tuple[Array, Array]:
    """Per output the products of groups of steps under `h`, `[outputs, groups, groups]`, and with the weight."""
    inputs, group = len(weight), blocks.group
    bounds = group_bounds(inputs, group)
    starts = [start for start, _ in bounds]
    zeros = np.repeat(blocks.zeros[:, part], [stop - start for start, stop in bounds], axis=0)
    steps = blocks.codes[:, part].astype(np.float32) - zeros
    right = np.add.reduceat(steps * (h @ np.asarray(weight, np.float32)), starts, axis=0).T.astype(np.float64)
    system = np.empty((steps.shape[1], len(bounds), len(bounds)))
    for i, (start, stop) in enumerate(bounds):
        products = (h[:, start:stop] @ steps[start:stop]) * steps
        system[:, i, :] = np.add.reduceat(products, starts, axis=0).T
    return system, right
