from __future__ import annotations

import onnx_ir as ir
import pytest

from graphopt.errors import ModelError
from graphopt.reference import Reference

_BARE = "com.microsoft.Attention<num_heads=2>(x, w{bias})"
_SIGNATURE = "(float[N,T,8] x, float[8,24] w, float[24] b, bool c) => (float[N,T,8] y)"
_IMPORTS = 'ir_version: 10, opset_import: ["" : 17, "com.microsoft" : 1, "mine" : 1]'
_PLACES = {
    "the main graph": "y = {call}",
    "a branch": """y = If(c) <then_branch = t () => (float[N,T,8] a) {{ a = {call} }},
                             else_branch = e () => (float[N,T,8] o) {{ o = Identity(x) }}>""",
    "a function": "y = mine.attend(x, w, b)",
}
_FUNCTION = '<domain: "mine", opset_import: ["" : 17, "com.microsoft" : 1]> attend (x, w, b) => (y) {{ y = {call} }}'


def model(place: str, bias: str) -> ir.Model:
    call = _BARE.format(bias=bias)
    function = _FUNCTION.format(call=call) if place == "a function" else ""
    return ir.from_onnx_text(f"<{_IMPORTS}> m {_SIGNATURE} {{ {_PLACES[place].format(call=call)} }} {function}")


@pytest.mark.parametrize("bias", ["", ", , b"])
@pytest.mark.parametrize("place", _PLACES)
def test_an_attention_that_would_end_the_process_is_refused_before_it_runs(place: str, bias: str) -> None:
    with pytest.raises(ModelError, match="has no bias, on which ONNX Runtime crashes; give it a bias of zeros"):
        Reference(model(place, bias))


@pytest.mark.parametrize("place", _PLACES)
def test_an_attention_with_a_bias_is_not_refused(place: str) -> None:
    assert Reference(model(place, ", b")).outputs == ("y",)
