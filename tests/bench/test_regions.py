"""Regions: which part of a model became slower."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from small_models import build

from graphopt.bench.regions import slower_regions
from graphopt.errors import UsageError
from graphopt.measured import Machine, Measured, Region
from graphopt.reference import Feed
from graphopt.report.figures import slower

SIZE = 96
BODY = """
[first] a = MatMul(x, w1)
[bend] b = Relu(a)
[second] c = MatMul(b, w2)
[third] d = MatMul(c, w3)
[sum] y = Add(d, b)
"""


def chain() -> ir.Model:
    return build(f"(float[N,{SIZE}] x) => (float[N,{SIZE}] y)", BODY, dict.fromkeys(("w1", "w2", "w3"), (SIZE, SIZE)))


def burden(model: ir.Model, name: str, times: int = 24) -> ir.Model:
    """The same outputs by a longer way: what a layer reads goes through many sines first, which count for nothing."""
    copy = model.clone()
    node = next(node for node in copy.graph if node.name == name)
    source = node.inputs[0]
    assert source is not None
    last, nodes = source, list[ir.Node]()
    for i in range(times):
        nodes.append(ir.node("Sin", [last], name=f"{name}_sin{i}"))
        last = nodes[-1].outputs[0]
        last.name = f"{name}_sin{i}"
    zero = ir.Value(name=f"{name}_zero", const_value=ir.tensor(np.array(0, np.float32)), type=source.type)
    copy.graph.register_initializer(zero)
    nodes.append(ir.node("Mul", [last, zero], name=f"{name}_nothing"))
    nodes.append(ir.node("Add", [source, nodes[-1].outputs[0]], name=f"{name}_again"))
    copy.graph.insert_before(node, nodes)
    node.replace_input_with(0, nodes[-1].outputs[0])
    return copy


def feeds() -> list[Feed]:
    return [{"x": np.random.default_rng(i).standard_normal((256, SIZE)).astype(np.float32)} for i in range(2)]


def saved(tmp_path: Path, *models: ir.Model) -> list[Path]:
    paths = [tmp_path / f"{i}.onnx" for i in range(len(models))]
    for path, model in zip(paths, models, strict=True):
        ir.save(model, path)
    return paths


@pytest.mark.parametrize("name", ["second", "third"])
def test_the_part_with_more_work_in_it_is_named_and_no_other(tmp_path: Path, name: str) -> None:
    found = slower_regions(*saved(tmp_path, chain(), burden(chain(), name)), feeds())
    assert [region.layers for region in found] == [(name,)]
    assert found[0].after > 2 * found[0].before > 0


def test_the_greatest_loss_comes_first(tmp_path: Path) -> None:
    after = burden(burden(chain(), "second", 8), "third", 60)
    found = slower_regions(*saved(tmp_path, chain(), after), feeds())
    assert [region.layers for region in found] == [("third",), ("second",)]


def test_the_same_model_has_no_slower_part(tmp_path: Path) -> None:
    assert slower_regions(*saved(tmp_path, chain(), chain()), feeds()) == ()


def test_without_feeds_there_is_nothing_to_time(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no inputs to run"):
        slower_regions(*saved(tmp_path, chain(), chain()), [])


def test_what_stands_in_branches_counts_for_the_node_around_them(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[N,4] x, bool c) => (float[N,4] y) {
      [before] h = Relu(x)
      [choice] y = If(c) <
        then_branch = t () => (float[N,4] p) { [inner] p = Exp(h) },
        else_branch = e () => (float[N,4] q) { q = Identity(h) }
      >
    }"""
    paths = saved(tmp_path, ir.from_onnx_text(text), ir.from_onnx_text(text.replace("Exp", "Tanh")))
    feed: Feed = {"x": np.ones((2, 4), np.float32), "c": np.array(True)}
    assert slower_regions(*paths, [feed]) == ()


def test_reports_name_slower_parts() -> None:
    region = Region(("conv", "other", "last"), 1.0, 2.5)
    measured = Measured((), Machine("cpu", 1, "system", 1), (region,))
    assert slower(measured) == ("'conv' and 2 layers with it became slower: 1.00 ms before, 2.50 ms now",)
    assert Measured.from_json(measured.to_json()) == measured


def test_benchmarks_of_before_are_still_read() -> None:
    text = Measured((), Machine("cpu", 1, "system", 1)).to_json().replace(' "slower_regions": [],\n', "")
    assert "slower_regions" not in text
    assert Measured.from_json(text).slower_regions == ()
