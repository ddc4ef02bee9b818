"""What the report says of layers that something else was put in the place of."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt.compile import Result
from graphopt.model_io import save_model

_PROJECTED = """p4 = Reshape(x, split) q = Transpose<perm=[0,2,1,3]>(p4) k = Transpose<perm=[0,2,3,1]>(p4)
    s = MatMul(q, k) p = Softmax<axis=-1>(s) o = MatMul(p, q) o4 = Transpose<perm=[0,2,1,3]>(o) y = Reshape(o4, join)"""
_SHAPES = "<int64[4] split = {0, 0, 4, 8}, int64[3] join = {0, 0, 32}>"
_BODIES = {
    "products": (_SHAPES, _PROJECTED),
    "operator": ("", "y = Attention<q_num_heads=4, kv_num_heads=4>(x, x, x)"),
    "operator spelled out": ("", "y = com.microsoft.MultiHeadAttention<num_heads=4>(x, x, x, , m)"),
}


def optimized(form: str, folder: Path) -> Result:
    declared, body = _BODIES[form]
    mask = ", int32[B,N] m" if "m)" in body else ""
    proto = onnx.parser.parse_model(
        f"""<ir_version: 11, opset_import: ["" : 23, "com.microsoft" : 1]>
        main (float[B,N,32] x{mask}) => (float[B,N,32] y) {declared} {{ {body} }}"""
    )
    path = save_model(ir.from_proto(proto), folder / "m.onnx")[0]
    return graphopt.optimize(path, "sparse-attention{width=4}", out=folder / "out", dims={"B": 2, "N": 40})


@pytest.mark.parametrize(("form", "layers"), [("products", 2), ("operator", 1), ("operator spelled out", 1)])
def test_attention_that_was_replaced_is_not_called_gone(form: str, layers: int, tmp_path: Path) -> None:
    report = optimized(form, tmp_path).report
    (change,) = report.steps[0].changes
    rows = [row for row in report.layers if row.after is None]
    assert len(rows) == layers
    for row in rows:
        (note,) = row.notes
        together = "" if row.name == change.site else f"replaced together with {change.site}: "
        assert (note.action, note.done, note.replaced) == (f"{together}{change.action}", True, True)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "gone: merged" not in page
    assert page.count("window of 4") >= layers


def test_a_model_that_would_crash_onnx_runtime_is_rewritten_and_said_not_to_run(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 17, "com.microsoft" : 1]>
        main (float[B,N,32] x, float[32,96] w) => (float[B,N,32] y)
        { y = com.microsoft.Attention<num_heads=4>(x, w) }"""
    )
    path = save_model(ir.from_proto(proto), tmp_path / "m.onnx")[0]
    report = graphopt.optimize(path, "sparse-attention{width=4}", out=tmp_path / "out").report
    assert [change.done for change in report.steps[0].changes] == [True]
    assert report.fidelity.not_run == "not run: its Attention 'y' has no bias, on which ONNX Runtime crashes"
