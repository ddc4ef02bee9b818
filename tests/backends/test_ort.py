"""The reference backend and the table of targets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from graphopt.backend_base import BuildOptions
from graphopt.errors import PluginError, UsageError
from graphopt.model_io import save_model
from graphopt.reference import Reference
from graphopt.targets import TargetTable
from graphopt_backends import graphopt_backends, graphopt_targets


def test_ort_builds_nothing_and_runs_the_model_that_ships(mlp, backend, tmp_path: Path) -> None:
    ort, target = backend("ort")
    save_model(mlp, tmp_path / "model.onnx")
    build = ort.build(mlp, target, tmp_path, BuildOptions())
    assert build.kernel is None
    assert build.files == ()
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    feed = {"x": np.ones((4, 12), np.float32)}
    np.testing.assert_array_equal(ort.load(tmp_path, target, 1)(feed)["y"], Reference(mlp).run(feed)["y"])


def test_every_target_has_a_backend_and_every_family_one_default(targets) -> None:
    names = {b.name for b in graphopt_backends()}
    assert all(target.backend in names for target in targets)
    for family in {target.name for target in targets}:
        assert sum(target.default for target in targets if target.name == family) == 1


def test_short_names_mean_the_documented_devices(targets) -> None:
    assert str(targets.resolve("ort")) == "ort"
    assert str(targets.resolve("x86")) == "x86:native"
    assert str(targets.resolve("arm")) == "arm:cortex-a76"
    with pytest.raises(UsageError, match="did you mean 'arm:cortex-a53'"):
        targets.resolve("arm:cortexa53")


def test_target_registered_twice_is_refused() -> None:
    with pytest.raises(PluginError, match="registered twice"):
        TargetTable([*graphopt_targets(), graphopt_targets()[0]])


def test_weights_have_seven_bits_where_products_would_saturate(targets) -> None:
    for target in targets:
        dot = target.isa is not None and target.isa.dot != "none"
        if target.name == "ort" or (target.name == "x86" and not dot):
            assert target.integers.weight_bits == 7
        else:
            assert target.integers.weight_bits == 8
