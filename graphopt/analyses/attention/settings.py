"""Two settings of a model's open dimensions, at which it can hopefully run.

Every dimension gets a prime number of its own, so that products of sizes come apart again in one way only. Models that
cannot run so are tried with sequences of the same length, then with larger sizes, which images want. What runs at none
of them may have been traced: exporters leave dimensions open, and write the size that the example had into a Reshape.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from graphopt.analyses.constants import Constants
from graphopt.model_io import InputSpec, ShapeBinding

__all__ = ["Setting", "settings", "settings_at", "written_sizes"]

Setting = tuple[ShapeBinding, ShapeBinding]

_PRIMES = ((3, 5, 11, 13, 17, 23, 41, 47), (2, 7, 19, 29, 31, 37, 43, 53))
_LARGER = 32
_MOST_WRITTEN = 12
_TOKENS, _STATES, _CACHE = 2, 3, 4
"""Ranks of inputs with a length: of token ids and masks, of what is computed from them, of keys and values."""


def settings(specs: Sequence[InputSpec], binding: ShapeBinding) -> Iterator[Setting]:
    """Pairs of settings, the most telling first, each of them once.

    Args:
        specs: Inputs of the model.
        binding: Sizes that the user fixed.
    """
    related, tried = _related(specs, binding), list[Setting]()
    for names, scale in (({}, 1), *([(related, 1)] if related else []), ({}, _LARGER)):
        pair = _setting(specs, binding, names, scale, 0), _setting(specs, binding, names, scale, 1)
        if pair not in tried:
            tried.append(pair)
            yield pair


def settings_at(sizes: Sequence[int], specs: Sequence[InputSpec], binding: ShapeBinding) -> Iterator[Setting]:
    """Pairs of settings that give one open dimension a size that the model seems to insist on.

    Args:
        sizes: Such sizes, as from `written_sizes`.
        specs: Inputs of the model.
        binding: Sizes that the user fixed.
    """
    names = dict.fromkeys(d for spec in specs for d in spec.bound(binding) or () if isinstance(d, str))
    for size in sizes:
        for name in names:
            fixed = ShapeBinding(binding.shapes, {**binding.dims, name: size})
            yield _setting(specs, fixed, {}, 1, 0), _setting(specs, fixed, {}, 1, 1)


def written_sizes(model: ir.Model, constants: Constants) -> tuple[int, ...]:
    """Sizes above 1 that stand in computed shapes of Reshape, those that stand in most of them first.

    Args:
        model: The model.
        constants: Its constants.
    """
    found = Counter[int]()
    for node in model.graph:
        shape = node.inputs[1] if node.op_type == "Reshape" else None
        joined = None if shape is None else shape.producer()
        parts = joined.inputs if joined is not None and joined.op_type == "Concat" else ()
        tensors = [constants.of(part) for part in parts]
        if None in tensors:
            written = (int(size) for tensor in tensors if tensor is not None for size in tensor.numpy().reshape(-1))
            found.update(size for size in written if size > 1)
    return tuple(size for size, _ in sorted(found.items(), key=lambda item: (-item[1], item[0]))[:_MOST_WRITTEN])


def _related(specs: Sequence[InputSpec], binding: ShapeBinding) -> dict[str, str]:
    """Lengths that follow from that of the tokens: of masks and the like, over caches as well where there are any."""
    shapes = [(spec, spec.bound(binding) or ()) for spec in specs]
    ranks = ((_TOKENS if spec.dtype.is_integer() else _STATES, shape) for spec, shape in shapes)
    lengths = [shape[1:2] for rank, shape in ranks if len(shape) == rank]
    named = list(dict.fromkeys(name for length in lengths for name in length if isinstance(name, str)))
    cached = [shape[2] for _, shape in shapes if len(shape) == _CACHE]
    past = next((f" + {length}" for length in cached if isinstance(length, str)), "")
    return dict.fromkeys(named[1:], f"{named[0]}{past}") if named else {}


def _setting(
    specs: Sequence[InputSpec], binding: ShapeBinding, related: Mapping[str, str], scale: int, side: int
) -> ShapeBinding:
    """Give every open dimension a number; names such as `past + 1` follow from those that they consist of."""
    dims, primes = dict(binding.dims), _PRIMES[side]
    wide = {size for spec in specs for size in (spec.bound(binding) or ())[1:] if len(spec.shape or ()) >= _STATES}
    names = list(dict.fromkeys(d for spec in specs for d in spec.bound(binding) or () if isinstance(d, str)))
    meant = {name: related.get(name, name) for name in names}
    simple = [name for name in names if meant[name] == name and not _parts(name) & set(names) - {name}]
    dims |= {name: primes[i % len(primes)] * (scale if name in wide else 1) for i, name in enumerate(simple)}
    for name in names:
        size = _sum(meant[name], dims)
        dims.setdefault(name, primes[-1] if size is None else size)
    shapes = {spec.name: spec.concrete(ShapeBinding(binding.shapes, dims)) for spec in specs if spec.shape is not None}
    return ShapeBinding(shapes, dims)


def _parts(name: str) -> set[str]:
    """Names in an expression."""
    return set(name.replace("+", " ").replace("*", " ").replace("-", " ").split())


def _sum(text: str, known: Mapping[str, int]) -> int | None:
    """Value of an expression of names and integers such as `past_sequence_length + 1`, None if it is none."""
    if text in known:
        return known[text]
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:
        return None
    return _value(tree, known)


def _value(tree: ast.expr, known: Mapping[str, int]) -> int | None:
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
        return tree.value
    if isinstance(tree, ast.Name):
        return known.get(tree.id)
    if not isinstance(tree, ast.BinOp):
        return None
    left, right = _value(tree.left, known), _value(tree.right, known)
    if left is None or right is None:
        return None
    if isinstance(tree.op, ast.Add):
        return left + right
    if isinstance(tree.op, ast.Sub):
        return left - right
    return left * right if isinstance(tree.op, ast.Mult) else None
