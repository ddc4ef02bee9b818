"""Targets: looked up by what the user writes."""

from __future__ import annotations

import pytest

from graphopt.errors import ExitCode, PluginError, UsageError
from graphopt.targets import Isa, Target, TargetTable, host_features, host_machine

ORT = Target(name="ort", default=True)
A76 = Target(name="arm", device="cortex-a76", default=True)
A53 = Target(name="arm", device="cortex-a53")
CAM = Target(name="acme", device="cam1")
TABLE = TargetTable([A76, ORT, CAM, A53])


@pytest.mark.parametrize(
    ("text", "target"),
    [("ort", ORT), ("arm", A76), ("arm:cortex-a76", A76), ("arm:cortex-a53", A53), ("acme:cam1", CAM), ("acme", CAM)],
)
def test_a_target_is_found_by_family_or_device(text: str, target: Target) -> None:
    assert TABLE.resolve(text) is target


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("amr", "--target amr: no such target; did you mean 'arm'?"),
        ("arm:cortex-a75", "--target arm:cortex-a75: no such target; did you mean 'arm:cortex-a76'?"),
        ("", "--target : no such target; known: acme:cam1, arm, arm:cortex-a53, arm:cortex-a76, ort"),
        ("ort:fast", "--target ort:fast: no such target; known: acme:cam1, arm, arm:cortex-a53, arm:cortex-a76, ort"),
    ],
)
def test_an_unknown_target_gets_the_nearest_name(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        TABLE.resolve(text)
    assert str(caught.value) == message


def test_a_family_of_several_devices_without_a_default_must_be_spelled_out() -> None:
    table = TargetTable([Target(name="npu", device="a"), Target(name="npu", device="b")])
    with pytest.raises(UsageError) as caught:
        table.resolve("npu")
    assert str(caught.value) == "--target npu: is several devices; write one of npu:a, npu:b"


def test_two_targets_of_one_name_clash() -> None:
    with pytest.raises(PluginError, match="target arm:cortex-a76: registered twice") as caught:
        TargetTable([A76, A76])
    assert caught.value.exit_code == ExitCode.PLUGIN


def test_targets_are_listed_in_order_of_their_names() -> None:
    assert [str(target) for target in TABLE] == ["acme:cam1", "arm:cortex-a53", "arm:cortex-a76", "ort"]
    assert [str(target) for target in TABLE.devices("arm")] == ["arm:cortex-a76", "arm:cortex-a53"]
    assert list(TABLE.devices("x86")) == []


def test_an_isa_knows_the_machine_it_belongs_to() -> None:
    assert Isa(name="cortex-a76", triple="aarch64-linux-gnu").machine == "aarch64"


def test_the_host_is_described_as_linux_does() -> None:
    assert host_machine()
    features = host_features()
    assert all(" " not in feature for feature in features)
    if host_machine() == "x86_64":
        assert "sse2" in features
