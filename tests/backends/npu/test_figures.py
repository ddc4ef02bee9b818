"""The tables that Vela writes, read from kept ones: made by Vela 5.2.0 of three convolutions in a row."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphopt.backend_base import Estimate
from graphopt.errors import BackendError
from graphopt_backends.npu.figures import estimate, read_steps, read_summary

SAMPLES = Path(__file__).parent / "samples"


def _text(accelerator: str, table: str) -> str:
    return (SAMPLES / f"{accelerator}.{table}.csv").read_text("utf8")


def _estimate(accelerator: str) -> Estimate:
    texts = _text(accelerator, "summary"), _text(accelerator, "layers")
    return estimate("model_vela.npz", "Vela 5.2.0", accelerator, *texts, {"plain": ("/first/Conv", "/first/Relu")})


def test_the_figures_of_a_network_are_those_that_vela_prints() -> None:
    found = _estimate("ethos-u55-128")
    assert found.cycles == 8560
    assert found.seconds == pytest.approx(8560 / 500e6)
    assert found.macs == 3 * 8 * 8 * 16 * 16 * 9
    assert found.utilisation == pytest.approx(found.macs / (128 * 8560))
    assert found.busy == {"NPU": 7104, "SRAM": 768, "off-chip flash": 8560}
    assert found.memory == {"SRAM": 2048, "off-chip flash": 8560}
    assert found.traffic["off-chip flash"] == 8560
    assert found.weight_bytes == 3 * 16 * 16 * 9
    assert found.encoded_bytes == 8080
    assert found.settings == "ethos-u55-128 at 500 MHz, Ethos_U55_High_End_Embedded, Shared_Sram"


@pytest.mark.parametrize("accelerator", ["ethos-u55-128", "ethos-u65-512", "ethos-u85-256"])
def test_operations_have_their_cycles_whatever_their_names_hold(accelerator: str) -> None:
    found = _estimate(accelerator)
    assert [step.name for step in found.steps] == ["plain", 'with, comma and "quotes"', "two\nlines"]
    assert found.steps[0].sites == ("/first/Conv", "/first/Relu")
    assert found.steps[1].sites == ()
    assert sum(step.cycles for step in found.steps) == found.cycles
    assert sum(step.macs for step in found.steps) == found.macs
    for step in found.steps:
        assert step.operator == "Conv2D"
        assert step.cycles >= max(step.busy.values()) > 0
        assert step.utilisation == pytest.approx(step.macs / (step.cycles * int(accelerator.rpartition("-")[2])))


def test_steps_that_vela_puts_before_one_belong_to_its_nodes() -> None:
    text = _text("ethos-u55-128", "layers").replace(",plain\n", ",plain_int32\n")
    assert next(read_steps(text, {"plain": ("/first/Conv",)})).sites == ("/first/Conv",)
    assert next(read_steps(text, {"plain_int32": ("/other",), "plain": ("/first/Conv",)})).sites == ("/other",)
    assert next(read_steps(text, {"lain": ("/first/Conv",)})).sites == ()


def test_columns_may_come_in_another_order_but_not_be_missing() -> None:
    summary = read_summary(_text("ethos-u55-128", "summary"))
    names = sorted(summary)
    turned = ",".join(names) + "\n" + ",".join(summary[name] for name in names) + "\n"
    assert estimate("p", "v", "ethos-u55-128", turned, "", {}).cycles == 8560
    with pytest.raises(BackendError) as caught:
        estimate("p", "v", "ethos-u55-128", turned.replace("cycles_npu", "cycles_of_npu"), "", {})
    assert str(caught.value).startswith("Vela's table: lacks the column 'cycles_npu'")


@pytest.mark.parametrize(
    ("text", "fact"),
    [("", "has 0 lines, not 2"), ("a,b\n1\n", "has 1 cells for 2 columns"), ("a\n1\n2\n", "has 3 lines, not 2")],
)
def test_a_summary_of_another_form_is_refused_in_one_line(text: str, fact: str) -> None:
    with pytest.raises(BackendError) as caught:
        read_summary(text)
    assert str(caught.value) == f"Vela's summary: {fact}; install the version that graphopt[npu] asks for"


def test_operations_of_another_form_are_refused_in_one_line() -> None:
    layers = _text("ethos-u55-128", "layers")
    with pytest.raises(BackendError, match="ends in the column 'Title', not 'Name'"):
        list(read_steps(layers.replace(",Name\n", ",Title\n"), {}))
    with pytest.raises(BackendError, match="says 'many' where a number was expected, in 'Op Cycles'"):
        list(read_steps(layers.replace(",2848,33.2", ",many,33.2"), {}))
