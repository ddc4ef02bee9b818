"""Every operator on the TOSA reference model, in integers, and in ONNX Runtime.

The reference model must agree with the evaluation in integers bit for bit, or where lowering rounds more than once with
the real number rounded. ONNX Runtime computes the same graph in float32: `(n * scale) / other_scale` is rounded three
times before it is rounded to an integer, half to even, where TOSA multiplies by 31 bits once and rounds half up. Both
differ where a real result is within 2**-10 steps of the middle between two integers, and then by 1. Sums of 16-bit
activations are multiplied by 15 bits, as TOSA has it for 48 bits: those are one off more often, in one of 20 elements.
"""

from __future__ import annotations

import functools

import pytest

pytest.importorskip("tosa_serializer")
pytest.importorskip("tosa_reference_model")

from npu_cases import CASES, REFUSED, SIXTEEN, model
from npu_check import Outcome, check

from graphopt_backends.npu.emitter import Refusal
from graphopt_backends.npu.network import emit
from graphopt_backends.npu.tosa import serialize

_TAKEN = [name for name in CASES if name not in REFUSED["u55"]]
_OTHER_FORMS = [name for name in CASES if name.startswith(("interpolate", "resize", "transpose", "deconv"))]


@functools.cache
def _outcome(name: str, family: str) -> Outcome:
    return check(model(name), family)


@pytest.mark.parametrize("name", _TAKEN)
def test_the_reference_model_computes_what_integers_say(name: str) -> None:
    assert _outcome(name, "u55").elements > 0


@pytest.mark.parametrize("name", [name for name in _OTHER_FORMS if name not in REFUSED["u85"]])
def test_forms_for_u85_compute_the_same(name: str) -> None:
    assert _outcome(name, "u85").elements > 0


@pytest.mark.parametrize("name", SIXTEEN)
def test_sixteen_bits_are_what_integers_say_and_one_off_in_onnx_runtime_at_most(name: str) -> None:
    assert check(model(name, dtype="int16"), "u55").elements > 0


def test_onnx_runtime_differs_in_one_of_ten_thousand_elements_at_most() -> None:
    outcomes = [_outcome(name, "u55") for name in _TAKEN]
    elements, differ = (sum(getattr(o, part) for o in outcomes) for part in ("elements", "differ"))
    assert elements > 200_000
    assert differ * 10_000 <= elements, f"{differ} of {elements}"


@pytest.mark.parametrize("family", ["u55", "u85"])
def test_what_an_npu_lacks_is_refused_with_a_reason(family: str) -> None:
    for name, reason in REFUSED[family].items():
        with pytest.raises(Refusal) as caught:
            emit(model(name), family)
        assert str(caught.value) == reason, name


@pytest.mark.parametrize("name", ["conv, groups", "softmax", "interpolate half_pixel, 8 x 10", "deconv, depthwise"])
def test_the_same_model_gives_the_same_bytes(name: str) -> None:
    assert serialize(emit(model(name), "u55")) == serialize(emit(model(name), "u55"))
