"""Builds a `Request` from what a caller gives, and refuses what cannot work before any work is done."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from graphopt.bundle import check_out
from graphopt.calibration import Dataset, metric, open_calibration, open_evaluation
from graphopt.compile.decisions import read_decisions
from graphopt.compile.request import CheckMode, Request
from graphopt.errors import UsageError
from graphopt.model_io import InputSpec, ShapeBinding, check_binding, input_specs, load_model, model_digest
from graphopt.pack import check_coder
from graphopt.pass_base import Pass
from graphopt.pipeline_text import format_pipeline, parse_target
from graphopt.plugins import Registry, load_plugins
from graphopt.recipe import Limits, Recipe, load_recipe
from graphopt.targets import Target

__all__ = ["Arrays", "Data", "resolve"]

Arrays = Mapping[str, np.ndarray[Any, Any]]
Data = str | Path | Arrays | Dataset
_MAX_THREADS = 8
_REQUIRE = "require"


def resolve(
    model: str | Path,
    passes: str | Sequence[Pass | str] | None = None,
    target: str | None = None,
    *,
    recipe: str | Path | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    calibration: Data | None = None,
    evaluation: Data | None = None,
    metric_name: str | None = None,
    limits: Limits | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    dims: Mapping[str, int] | None = None,
    check: CheckMode = "auto",
    verify: bool = True,
    measure: bool = False,
    guard: bool = False,
    decisions: str | Path | None = None,
    emit: Sequence[str] = (),
    seed: int | None = None,
    threads: int = 0,
    cc: str | None = None,
    fallback: Literal["ort"] | None = None,
    keep_opset: bool = False,
    extensions: Sequence[str] = (),
    cache: str | Path | None = None,
    force: bool = False,
    pack: bool = False,
    target_options: Mapping[str, Any] | None = None,
    require_npu: bool = False,
    disable: Sequence[str] = (),
    registry: Registry | None = None,
) -> tuple[Request, ir.Model]:
    """Resolve a compile command; returns it with the loaded model.

    Raises:
        GraphoptError: Something is unknown, missing or does not fit.
    """
    registry = registry or load_plugins(disable=disable)
    if recipe is not None and passes is not None:
        raise UsageError("--recipe", "cannot stand beside --passes", "put the passes into the recipe")
    given = load_recipe(recipe, registry) if recipe is not None else None
    pack = pack or (given is not None and given.pack)
    if pack:
        check_coder()
    wanted = target or (given.target if given else None) or "ort"
    chosen, options = _target(wanted, target_options or {}, registry, require_npu=require_npu)
    backend = registry.backends.get(chosen.backend or "")
    reads = () if backend is None else tuple(backend.reads(options))
    path = Path(model)
    loaded = load_model(path)
    specs = input_specs(loaded)
    binding = ShapeBinding(
        {**(given.binding.shapes if given else {}), **{name: tuple(sizes) for name, sizes in (shapes or {}).items()}},
        {**(given.binding.dims if given else {}), **(dims or {})},
    )
    check_binding(specs, binding)
    steps = _steps(given, passes, registry.default_pipeline(chosen), registry, data=calibration is not None)
    if not steps and chosen.backend in (None, "ort"):
        raise UsageError("--passes", "nothing to do", "name passes or a recipe; see: graphopt list")
    outputs = [value.name or "" for value in loaded.graph.outputs]
    calibration_data = _calibration(calibration, specs, binding, registry)
    evaluation_data = _evaluation(evaluation, specs, outputs, binding, registry)
    if guard and decisions is not None:
        raise UsageError("--decisions", "cannot stand beside --guard", "a replay does not look at the clock")
    if metric_name and evaluation_data is None:
        raise UsageError("--metric", "needs labelled data", "give it with --eval")
    pipeline = format_pipeline(step.step() for step in steps)
    folder = Path(out) if out is not None else Path(f"{path.stem}.{parse_target(wanted).name}".replace(":", "-"))
    check_out(folder, [path, *reads], overwrite=overwrite)
    return Request(
        model=path,
        digest=model_digest(path),
        out=folder,
        target=chosen,
        passes=steps,
        registry=registry,
        calibration=calibration_data,
        evaluation=evaluation_data,
        metric=None if evaluation_data is None else metric(metric_name, evaluation_data),
        binding=_completed(binding, specs, calibration_data or evaluation_data),
        limits=limits or (given.limits if given else None) or Limits(),
        check=check,
        verify=verify,
        measure=measure,
        guard=guard,
        decisions=None if decisions is None else read_decisions(Path(decisions), pipeline),
        emit=tuple(emit),
        seed=next((value for value in (seed, given.seed if given else None) if value is not None), 0),
        threads=threads or min(os.cpu_count() or 1, _MAX_THREADS),
        cc=cc,
        fallback=fallback,
        keep_opset=keep_opset,
        extensions=tuple(extensions),
        cache=Path(cache) if cache else Path.home() / ".cache" / "graphopt",
        force=force,
        pack=pack,
        target_options=options,
        reads=reads,
    ), loaded


def _target(wanted: str, given: Mapping[str, Any], registry: Registry, *, require_npu: bool) -> tuple[Target, Any]:
    """The target and its options; `--require-npu` stands for the option `require` of targets that have one."""
    if require_npu:
        target, having = registry.targets.resolve(wanted), registry.targets_with(_REQUIRE)
        if target not in having:
            names = ", ".join(sorted({other.name for other in having}))
            hint = f"give one that has: --target {names}" if names else "no loaded plugin brings one that has"
            raise UsageError("--require-npu", f"the target {target} has no NPU", hint)
        given = {**given, _REQUIRE: True}
    return registry.target_from_text(wanted, given)


def _steps(
    recipe: Recipe | None,
    passes: str | Sequence[Pass | str] | None,
    default: str | None,
    registry: Registry,
    *,
    data: bool,
) -> tuple[Pass, ...]:
    if recipe is None:
        return _passes(passes, registry, default)
    return recipe.passes if data else recipe.without_calibration


def _passes(given: str | Sequence[Pass | str] | None, registry: Registry, default: str | None) -> tuple[Pass, ...]:
    if given is None:
        return registry.passes_from_text(default) if default else ()
    if isinstance(given, str):
        return registry.passes_from_text(given)
    return tuple(
        step for item in given for step in ((item,) if isinstance(item, Pass) else registry.passes_from_text(item))
    )


def _calibration(
    given: Data | None, specs: Sequence[InputSpec], binding: ShapeBinding, registry: Registry
) -> Dataset | None:
    if given is None or isinstance(given, Dataset):
        return given
    return open_calibration(given, specs, binding, registry.calibration)


def _evaluation(
    given: Data | None, specs: Sequence[InputSpec], outputs: Sequence[str], binding: ShapeBinding, registry: Registry
) -> Dataset | None:
    if given is None or isinstance(given, Dataset):
        return given
    return open_evaluation(given, specs, outputs, binding, registry.calibration)


def _completed(binding: ShapeBinding, specs: Sequence[InputSpec], data: Dataset | None) -> ShapeBinding:
    """Take sizes that the user left open from the first sample, so that costs and kernels are those of real data."""
    feed = next(data.feeds(1), None) if data is not None else None
    if feed is None:
        return binding
    shapes = dict(binding.shapes)
    for spec in specs:
        bound = spec.bound(binding)
        if bound is not None and not all(isinstance(d, int) for d in bound) and spec.name in feed:
            shapes[spec.name] = feed[spec.name].shape
    return ShapeBinding(shapes, binding.dims)
