"""`graphopt bench`: from paths to subjects of one benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from graphopt.bench import Plan, Subject, bench, bundle_subjects, feeds_for
from graphopt.bundle import Manifest, read_manifest
from graphopt.calibration import open_calibration
from graphopt.errors import ModelError
from graphopt.measured import Measured
from graphopt.model_io import InputSpec, ShapeBinding, check_binding, input_specs, load_model
from graphopt.plugins import load_plugins

__all__ = ["bench_subjects"]


def bench_subjects(
    paths: Sequence[Path],
    *,
    data: str | None,
    plan: Plan,
    shapes: Mapping[str, tuple[int, ...]],
    dims: Mapping[str, int],
    disable: Sequence[str],
) -> Measured:
    """Measure models and bundles side by side; the first path is what all others are compared with.

    Without sizes for dynamic dimensions those count that the first bundle was made with.

    Raises:
        ModelError: A path is neither a model nor a bundle.
        DataError: The data does not fit the first model.
    """
    registry = load_plugins(disable=disable)
    subjects: list[Subject] = []
    bundles: list[Manifest] = []
    for path in paths:
        side = "result" if subjects else "original"
        manifest = read_manifest(path) if path.is_dir() else None
        if manifest is not None:
            bundles.append(manifest)
            backend = registry.targets.resolve(manifest.target).backend
            subjects += bundle_subjects(path, manifest.target, backend, manifest.kernel)
        elif path.is_file():
            subjects.append(Subject(path.name, path, side))
        else:
            raise ModelError(
                str(path), "is neither a model nor a bundle" if path.exists() else "no such file or bundle"
            )
    first = subjects[0].model
    specs = input_specs(load_model(first))
    binding = ShapeBinding(shapes, dims) or next((_sizes(manifest, specs) for manifest in bundles), ShapeBinding())
    check_binding(specs, binding)
    dataset = open_calibration(data, specs, binding, registry.calibration) if data else None
    return bench(subjects, feeds_for(first, dataset, binding), plan, disable=disable)


def _sizes(manifest: Manifest, specs: Sequence[InputSpec]) -> ShapeBinding:
    """Sizes that a bundle was made with, of the inputs and dimensions that a model has too."""
    sizes = {name: tuple(int(size) for size in text.split("x") if size) for name, text in manifest.shapes.items()}
    dims = {dim for spec in specs for dim in spec.shape or () if isinstance(dim, str)}
    shapes = {spec.name: sizes[spec.name] for spec in specs if spec.name in sizes}
    return ShapeBinding(shapes, {name: size[0] for name, size in sizes.items() if name in dims and size})
