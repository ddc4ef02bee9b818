"""What a model is made for: a named device with what passes and backends must both know of it.

A target is written NAME or NAME:DEVICE. Targets come from plugins through the hook `graphopt_targets`; the records
here say what one is, and the CPU descriptions (`Isa`) that several of them share.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from graphopt.errors import PluginError, UsageError, nearest

__all__ = [
    "INTEGER_OPERATORS", "WEIGHT_AXES", "IntegerRules", "Isa", "Target", "TargetTable", "WeightAxis",
    "host_cache_bytes", "host_features", "host_machine",
]  # fmt: skip

INTEGER_OPERATORS = frozenset(
    {
        "Add", "AveragePool", "Concat", "Conv", "Flatten", "Gemm", "GlobalAveragePool", "MatMul", "MaxPool", "Mul",
        "Pad", "Relu", "Reshape", "Resize", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
"""Operators that runtimes with QDQ fusion execute on integers, or that move integers without arithmetic."""


@dataclass(frozen=True)
class WeightAxis:
    """Where an operator has a weight, and which of its axes has a scale for each index.

    Attributes:
        input: Input of the node.
        axis: That of the output channels; of a ConvTranspose its groups share them.
        flipped_by: Attribute that, where it is 1, says that the two axes of the matrix are exchanged.
    """

    input: int
    axis: int
    flipped_by: str = ""

    def __str__(self) -> str:
        return f"{self.axis} of input {self.input}" + (f", the other with {self.flipped_by}" if self.flipped_by else "")


WEIGHT_AXES: Mapping[str, tuple[WeightAxis, ...]] = {
    "Conv": (WeightAxis(1, 0),),
    "ConvTranspose": (WeightAxis(1, 1),),
    "Gather": (WeightAxis(0, -1),),
    "Gemm": (WeightAxis(1, 1, "transB"),),
    "GRU": (WeightAxis(1, 1), WeightAxis(2, 1)),
    "LSTM": (WeightAxis(1, 1), WeightAxis(2, 1)),
    "MatMul": (WeightAxis(1, -1), WeightAxis(0, -2)),
    "RNN": (WeightAxis(1, 1), WeightAxis(2, 1)),
}
"""Operators with weights, and the axis with a scale for each index where a target has scales for each channel.

Of a MatMul one factor is the weight. Its integer products take a scale a column of a matrix on the right, and one for
all of any other factor.
"""


_AS_LINUX_SAYS: Mapping[str, str] = {
    "avx512bf16": "avx512_bf16",
    "avx512vnni": "avx512_vnni",
    "avxvnni": "avx_vnni",
    "bmi": "bmi1",
    "dotprod": "asimddp",
    "fullfp16": "asimdhp",
    "lzcnt": "abm",
    "neon": "asimd",
    "v8.2a": "",
    "v8.4a": "",
    "v8.6a": "",
    "v9a": "",
    "vfp4": "vfpv4",
}
"""LLVM's features that Linux spells in another way; nothing where other features stand for it."""


@dataclass(frozen=True, kw_only=True)
class Isa:
    """A CPU as a kernel generator sees it.

    Attributes:
        name: Name of the device, as in `arm:cortex-a76`.
        triple: LLVM target triple; its first part is the machine that `uname -m` prints.
        cpu: LLVM's name of the CPU, or None for the baseline of the architecture.
        features: LLVM feature flags, each with its sign.
        vector_bits: Width of a vector register.
        registers: Number of vector registers.
        dot: Integer dot-product instruction; `i8mm` has those of `sdot`, and products of small matrices.
        tiles: Registers of two dimensions, whose products of bytes one instruction computes (AMX).
        lane_operands: Multiplications take one lane of a vector register; else they repeat a number from memory.
        level1_bytes: Data cache of a core.
        level2_bytes: The next cache, or its part that one core can count on.
        cores: Cores that kernels are split for.
    """

    name: str
    triple: str
    cpu: str | None = None
    features: tuple[str, ...] = ()
    vector_bits: int = 128
    registers: int = 32
    dot: Literal["none", "sdot", "i8mm", "vnni", "avx-vnni"] = "none"
    tiles: bool = False
    lane_operands: bool = False
    level1_bytes: int = 32 << 10
    level2_bytes: int = 512 << 10
    cores: int = 1

    @property
    def machine(self) -> str:
        """Architecture as `uname -m` prints it."""
        return self.triple.partition("-")[0]

    @property
    def required(self) -> tuple[str, ...]:
        """Features that a machine must have, as Linux names them."""
        wanted = [feature[1:] for feature in self.features if feature.startswith("+")]
        names = [_AS_LINUX_SAYS.get(name, name.replace("-", "_")) for name in wanted]
        return tuple(name for name in names if name)


@dataclass(frozen=True, kw_only=True)
class IntegerRules:
    """How a target computes on integers.

    Attributes:
        operators: ONNX operators that may stay in integers.
        activation: Element type of quantized activations.
        symmetric_activations: True: the zero point of activations is 0 (int8) or 128 (uint8).
        weight_bits: 7 where sums of two u8 x s8 products saturate for lack of a dot-product instruction, else 8.
        per_channel: One scale per output channel of a weight, along the axis of `WEIGHT_AXES`.
        power_of_two: All scales are powers of two, as shifts want.
        static_only: Activation ranges must be known before; dynamic and weight-only forms do not run.
        integers_only: Nothing is computed in float: every operator of `operators` stands between integers wherever its
            inputs come from and its results go, results of the model included; functions of one number are tables.
            What else a model has runs on another processor.
        weights_at_load: What depends on constants alone is computed once, when a model is loaded, except for
            DequantizeLinear, which runs on every run.
    """

    operators: frozenset[str] = INTEGER_OPERATORS
    activation: Literal["uint8", "int8"] = "uint8"
    symmetric_activations: bool = False
    weight_bits: Literal[7, 8] = 8
    per_channel: bool = True
    power_of_two: bool = False
    static_only: bool = False
    integers_only: bool = False
    weights_at_load: bool = False


@dataclass(frozen=True, kw_only=True)
class Target:
    """A device to compile for.

    Attributes:
        name: Family, as in `arm`.
        device: Member of the family, as in `cortex-a76`; empty where the family has one member.
        backend: Name of the backend that compiles for it; None: the ONNX model itself is what ships.
        summary: One line for `graphopt list`.
        default: True: NAME alone means this device.
        round_to: Channel counts that kernels like are multiples of this.
        isa: The CPU, where there is one.
        integers: How it computes on integers.
    """

    name: str
    device: str = ""
    backend: str | None = None
    summary: str = ""
    default: bool = False
    round_to: int = 1
    isa: Isa | None = None
    integers: IntegerRules = field(default_factory=IntegerRules)

    def __str__(self) -> str:
        return f"{self.name}:{self.device}" if self.device else self.name


class TargetTable:
    """All known targets, looked up by what the user writes."""

    def __init__(self, targets: Iterable[Target]) -> None:
        self._targets: dict[str, Target] = {}
        for target in targets:
            if str(target) in self._targets:
                raise PluginError(f"target {target}", "registered twice", "remove one of the plugins: --no-plugin NAME")
            self._targets[str(target)] = target

    def __iter__(self) -> Iterator[Target]:
        return iter(sorted(self._targets.values(), key=str))

    def devices(self, name: str) -> Sequence[Target]:
        """All devices of a family, the default first."""
        return sorted((t for t in self._targets.values() if t.name == name), key=lambda t: (not t.default, str(t)))

    def resolve(self, text: str) -> Target:
        """Find the target written NAME or NAME:DEVICE; options in braces after it are not looked at.

        Raises:
            UsageError: There is no such target.
        """
        text = text.partition("{")[0].rstrip()
        if text in self._targets:
            return self._targets[text]
        devices = self.devices(text)
        if devices and (devices[0].default or len(devices) == 1):
            return devices[0]
        if devices:
            raise UsageError(f"--target {text}", "is several devices", f"write one of {', '.join(map(str, devices))}")
        names = {*self._targets, *(t.name for t in self._targets.values() if t.default)}
        raise UsageError(f"--target {text}", "no such target", nearest(text, names))


def host_machine() -> str:
    """Architecture of this machine as `uname -m` prints it."""
    return platform.machine()


def host_features() -> frozenset[str]:
    """CPU feature flags of this machine as Linux names them; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf8")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            return frozenset(value.split())
    return frozenset()


def host_cache_bytes(level: int) -> int | None:
    """Bytes of the data cache of a level that the first core of this machine has; None where nothing tells."""
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            have, kind, size = ((folder / name).read_text("utf8").strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if have == str(level) and kind != "Instruction" and size.endswith("K"):
            return int(size[:-1]) << 10
    return None
