"""The conformance kit: one call holds a pass, a criterion or a backend to its contract, built-in or of a plugin.

    from graphopt.testing import check_pass

    def test_my_pass_keeps_the_contract():
        check_pass(MyPass(limit=0.5), "model.onnx")

Failures are `ContractError`s that say what the contract asks for.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.analyses.channels import CHANNEL_GROUPS
from graphopt.backend_base import Backend, BuildOptions
from graphopt.bundle import file_digests
from graphopt.calibration import Dataset
from graphopt.criterion_base import Criterion, judge
from graphopt.fidelity import compare
from graphopt.model_io import ShapeBinding, input_specs, load_model, model_bytes, save_model
from graphopt.options import build
from graphopt.pass_base import Context, Pass, PassResult
from graphopt.pipeline_text import parse_pipeline
from graphopt.reference import Reference, random_feed
from graphopt.runner import check_feeds, run_pass
from graphopt.targets import Target

__all__ = ["ContractError", "check_backend", "check_criterion", "check_pass"]

_PORTABLE = Target(name="ort")


class ContractError(AssertionError):
    """A pass, a criterion or a backend does not keep its contract."""


def check_pass(
    step: Pass,
    model: ir.Model | str | Path,
    *,
    calibration: Dataset | None = None,
    target: Target = _PORTABLE,
    binding: ShapeBinding | None = None,
    criteria: Sequence[Criterion] = (),
    feeds: int = 4,
) -> PassResult:
    """Run a pass on a copy of a model and check everything that the contract of a pass promises.

    Checked: options print back to themselves; `modified` tells the truth; the graph stays valid ONNX with its
    interface; a lossless pass keeps the outputs; the result runs in ONNX Runtime and returns what shapes and types it
    did; skipped sites carry reasons; a second run gives the same bytes.

    Args:
        step: The pass with its options.
        model: A model, or the path of one; it is not changed.
        calibration: Samples for passes that use them.
        target: What the model is made for.
        binding: Sizes for dynamic dimensions.
        criteria: Pruning criteria that the pass may name, besides the built-in ones.
        feeds: How many inputs to compare outputs on.

    Returns:
        What the pass did, for checks of your own.

    Raises:
        ContractError: The contract is broken.
        GraphoptError: The pass refuses the model.
    """
    original = model if isinstance(model, ir.Model) else load_model(model)
    _check_text(step)
    results: list[PassResult] = []
    contexts: list[Context] = []
    for _ in range(2):
        ctx = Context(
            model=original.clone(),
            target=target,
            calibration=calibration,
            binding=binding or ShapeBinding(),
            criteria={criterion.name: criterion for criterion in criteria},
        )
        results.append(run_pass(step, ctx).result)
        contexts.append(ctx)
    result, ctx = results[0], contexts[0]
    _require(results[1] == result, "two runs on the same model report the same changes")
    _require(model_bytes(ctx.model) == model_bytes(contexts[1].model), "two runs on the same model give the same bytes")
    for change in result.changes:
        skipped = change.action.startswith("skipped: ")
        _require(skipped != change.done, f"{change.site}: a site left alone says 'skipped: ' and why, a done one not")
        _require(len(change.action.removeprefix("skipped: ")) > 0, f"{change.site}: says what was done, or why not")
    _check_runs(original, ctx, feeds)
    return result


def check_criterion(
    criterion: Criterion, model: ir.Model | str | Path, *, calibration: Dataset | None = None
) -> list[np.ndarray[Any, np.dtype[np.float64]] | None]:
    """Judge all channel groups of a model twice and check what the contract of a criterion promises.

    Checked: for each group scores of its size, finite and not negative; the same scores twice; the model stays as it
    is; a criterion that says it needs no data needs none.

    Args:
        criterion: The criterion.
        model: A model with channels that can be removed, or the path of one.
        calibration: Samples, for a criterion that needs them.

    Returns:
        The scores of each group, for checks of your own.

    Raises:
        ContractError: The contract is broken, or the model has no channels to judge.
        PassError: The scores are not what the contract asks for.
    """
    original = model if isinstance(model, ir.Model) else load_model(model)
    before = model_bytes(original)
    found: list[list[Any]] = []
    for _ in range(2):
        data = calibration if criterion.needs_data else None
        ctx = Context(model=original, target=_PORTABLE, calibration=data)
        groups = ctx.fact(CHANNEL_GROUPS).free
        _require(len(groups) > 0, "the model has channels that can be removed")
        found.append(judge(criterion, original, groups, ctx))
    same = all(a is b or np.array_equal(a, b) for a, b in zip(*found, strict=True))
    _require(same, "two runs on the same model give the same scores")
    _require(model_bytes(original) == before, "the model stays as it is")
    return found[0]


def check_backend(
    backend: Backend, target: Target, model: ir.Model | str | Path, *, options: BuildOptions, tolerance: float = 1e-3
) -> None:
    """Build a model twice, compare the bytes, run the result where this machine can, compare with ONNX Runtime.

    Args:
        backend: The backend.
        target: What to build for.
        model: A model that the backend takes.
        options: Build options.
        tolerance: Largest difference allowed, as a fraction of an output's largest magnitude.

    Raises:
        ContractError: The contract is broken.
        BackendError: The backend refuses the model or the machine.
    """
    original = model if isinstance(model, ir.Model) else load_model(model)
    unsupported = backend.unsupported(original, target, options)
    _require(not unsupported, f"the backend takes the model: {unsupported}")
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        for folder in (first, second):
            save_model(original, Path(folder) / "model.onnx")
            built = backend.build(original, target, Path(folder), options)
            for name in built.files:
                _require((Path(folder) / name).is_file(), f"every file that a build names exists: {name}")
        _require(file_digests(Path(first)) == file_digests(Path(second)), "two builds give the same bytes")
        if backend.how(target) not in ("executed", "emulated"):
            return
        rng, specs = np.random.default_rng(0), input_specs(original)
        feeds = [random_feed(specs, options.binding, rng) for _ in range(4)]
        reference = Reference(original)
        got = backend.run_all(Path(first), target, feeds, 1)
        for distance in compare([reference.run(feed) for feed in feeds], got):
            scale = max(abs(distance.reference_min), abs(distance.reference_max))
            _require(distance.max_abs <= tolerance * scale + 1e-6, f"the outputs agree with ONNX Runtime: {distance}")


def _check_text(step: Pass) -> None:
    _require(dataclasses.is_dataclass(step), "a pass is a dataclass")
    (parsed,) = parse_pipeline(str(step))
    rebuilt: Any = build(type(step), parsed.values, step.name)
    _require(rebuilt == step, f"a pass prints back to the text it is parsed from: {step} gives {rebuilt}")


def _check_runs(original: ir.Model, ctx: Context, count: int) -> None:
    feeds = check_feeds(dataclasses.replace(ctx, model=original), count)
    before, after = Reference(original), Reference(ctx.model)
    for feed in feeds:
        expected, got = before.run(feed), after.run(feed)
        _require(list(expected) == list(got), "the outputs keep their names and order")
        for name, value in expected.items():
            same = value.shape == got[name].shape and value.dtype == got[name].dtype
            _require(same, f"output {name!r} keeps its shape and type")


def _require(holds: bool, promise: str) -> None:
    if not holds:
        raise ContractError(f"broken contract: {promise}")
